"""Match the rows of a file to the rows of a split by their ids."""

import numpy as np

from jaxcl.data.source_fields import read_fields
from jaxcl.data.sources import PairSource
from jaxcl.typing import Int

__all__ = ["match_rows"]

_ROWS_AT_ONCE = 8192


def match_rows(ids: np.ndarray, pairs: PairSource, *, field: str) -> Int[np.ndarray, " n"]:
    """Find the row of a file that has the id of each row of a split.

    Args:
      ids: the id of each row of the file.
      pairs: the split.
      field: the field that holds the ids of the split's rows.

    Raises:
      ValueError: if the split has no such field, an id occurs twice in the file or in the split, or
        a row of the split has an id that the file lacks.
    """
    row_of = {row_id: row for row, row_id in enumerate(ids.tolist())}
    if len(row_of) < len(ids):
        values, counts = np.unique(ids, return_counts=True)
        raise ValueError(f"ids contains {values[counts > 1].tolist()[0]!r} twice; use each id once")
    file_rows: dict[int, int] = {}
    for first in range(0, len(pairs), _ROWS_AT_ONCE):
        rows = range(first, min(first + _ROWS_AT_ONCE, len(pairs)))
        for row, record in zip(rows, read_fields(pairs, rows, (field,)), strict=True):
            if field not in record:
                raise ValueError(f"id_field={field!r} is not read; add it to data.metadata_fields")
            row_id = record[field]
            if not isinstance(row_id, str | int | np.integer) or row_id not in row_of:
                raise ValueError(f"ids lacks {row_id!r}, the {field} of row {row}; add it")
            if (other := file_rows.setdefault(row_of[row_id], row)) != row:
                raise ValueError(
                    f"rows {other} and {row} have the same {field} {row_id!r}; give an id_field "
                    "whose values differ"
                )
    return np.fromiter(file_rows, np.int64, len(pairs))
