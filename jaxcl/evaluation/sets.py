"""Opens the evaluation sets of users, and tells their kind from the content of the path."""

from collections.abc import Callable
from typing import NamedTuple

from jaxcl.evaluation.protocol import EvaluationSet
from jaxcl.host.paths import AnyPath

__all__ = ["KINDS", "Kind", "open_set"]


class Kind(NamedTuple):
    """A kind of evaluation set.

    Attributes:
      expected: a noun phrase for such a path, such as "a BEIR folder", for messages.
      recognises: whether a path that exists is of this kind; it reads little.
      open: opens such a path, and raises a `ValueError` for content that is wrong.
    """

    expected: str
    recognises: Callable[[AnyPath], bool]
    open: Callable[[AnyPath], EvaluationSet]


KINDS: dict[str, Kind] = {}
"""Name of a kind -> how to recognise and open it. The first that recognises a path opens it."""


def open_set(path: AnyPath) -> EvaluationSet:
    """Open an evaluation set of any kind.

    Args:
      path: a file or folder of one of `KINDS`.

    Raises:
      FileNotFoundError: if there is no such file or folder.
      ValueError: if it is of no known kind, or its content is wrong.
      OSError: if it cannot be read.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no evaluation set {path}; give a file or a folder")
    for kind in KINDS.values():
        if kind.recognises(path):
            return kind.open(path)
    expected = "; or ".join(kind.expected for kind in KINDS.values())
    raise ValueError(f"{path} is no evaluation set; give {expected}")
