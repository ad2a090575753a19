"""Types of numeric settings with their ranges, shared by several sections."""

from typing import Annotated

from jaxcl.typing import Range

__all__ = ["Label", "Margin", "Seed"]

Seed = Annotated[int, Range(least=0, below=2**63)]
Label = Annotated[int, Range(least=-(2**31), below=2**31)]  # of a group or a source
Margin = Annotated[float, Range(least=-2, most=2)]  # a difference of cosines
