"""Check arrays with one entry per row; the errors name the first invalid row."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxcl.typing import Bool, Int

__all__ = ["check_rows", "checked_int32"]

_ROWS_AT_ONCE = 65_536
_INT32 = np.iinfo(np.int32)


def check_rows(
    array: np.ndarray,
    allowed: Callable[[np.ndarray], Bool[np.ndarray, "..."]],
    *,
    what: str,
    wanted: str,
    first_row: int = 0,
) -> None:
    """Check that all entries of an array are allowed.

    Args:
      array: one entry per row, a number or an array of numbers.
      allowed: a function from a slice of the array to a boolean array, which says which rows, or
        which of their numbers, are allowed.
      what: the name of the array, for the message.
      wanted: a description of the allowed entries, for the message.
      first_row: the number of the first row.

    Raises:
      ValueError: if a row has an entry that is not allowed; the message names the first such row.
    """
    for first in range(0, len(array), _ROWS_AT_ONCE):
        part = array[first : first + _ROWS_AT_ONCE]
        good = allowed(part).reshape(len(part), -1).all(axis=1)
        if not good.all():
            row = int(np.argmin(good))
            entry = np.array2string(np.asarray(part[row]), threshold=8, edgeitems=3)
            raise ValueError(f"{what} has {entry} in row {first_row + first + row}; use {wanted}")


def checked_int32(
    labels: Sequence[Any] | np.ndarray, *, what: str, first_row: int = 0
) -> Int[np.ndarray, " n"]:
    """Convert labels to int32.

    Args:
      labels: integers or booleans, one per row.
      what: the name of the labels, for the message.
      first_row: the number of the first row.

    Raises:
      ValueError: if a label is not an integer or does not fit into int32; the message names the
        first such row.
    """
    array = np.asarray(labels)
    if array.dtype.kind not in "iub":
        array = np.array(labels, object)
    check_rows(array, _fit_int32, what=what, wanted="integers in int32", first_row=first_row)
    return array.astype(np.int32)


def _fit_int32(labels: np.ndarray) -> Bool[np.ndarray, " n"]:
    if labels.dtype.kind == "O":
        integers = [isinstance(label, int | np.integer | np.bool_) for label in labels]
        labels = np.where(integers, labels, _INT32.max + 1)
    return (labels >= _INT32.min) & (labels <= _INT32.max)
