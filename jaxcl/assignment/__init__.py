"""Which rows share a batch: pure functions of the step."""

from jaxcl.assignment.uniform import uniform_rows

__all__ = ["uniform_rows"]
