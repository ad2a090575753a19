"""Each training row's explicit negatives, as row numbers of the same split, from a file."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxcl.data.row_files import check_same_rows, read_arrays
from jaxcl.data.table import Table
from jaxcl.typing import Float, Int, PyTree

__all__ = ["RowNegatives", "read_negatives"]


class RowNegatives(NamedTuple):
    """The rows whose keys stand against each row's query.

    Attributes:
      rows: row numbers; −1 where a row has fewer than others.
      teacher_scores: what a teacher gives the row's own key, then each negative; `None` without.
      fingerprint: of the file.
    """

    rows: Int[np.ndarray, "n m"]
    teacher_scores: Float[np.ndarray, "n _"] | None
    fingerprint: str

    def columns(self, table: Table, rows: Int[np.ndarray, " b"]) -> dict[str, PyTree]:
        """The columns that `jaxcl.step.batch_loss.make_loss` reads for a batch of these rows."""
        numbers = self.rows[rows]
        valid = numbers >= 0
        theirs = np.where(valid, numbers, 0)
        inputs = jax.tree.map(
            lambda leaf: leaf.reshape(*theirs.shape, *leaf.shape[1:]),
            table.side("key", theirs.ravel()),
        )
        columns: dict[str, PyTree] = {
            "negatives": {
                "inputs": inputs,
                "valid": valid,
                **table.labels(theirs),
            }
        }
        if self.teacher_scores is not None:
            columns["teacher_scores"] = self.teacher_scores[rows]
        return columns


def read_negatives(
    path: Path, *, num_rows: int, scored: bool, source: str | None = None
) -> RowNegatives:
    """Reads an `.npz` with `rows`, and with `teacher_scores` if those are wanted.

    Args:
      path: the file. `rows` are integers `[rows of the split, most negatives of a row]`, −1 where a
        row has fewer; `teacher_scores` are `[rows of the split, 1 + most negatives]`.
      num_rows: of the training split.
      scored: whether a teacher's scores are wanted; without it none are read.
      source: the split's fingerprint; the file's own `source`, if it has one, must be the same.

    Raises:
      ValueError: for a file that is missing, damaged, or not of this split.
    """
    found, fingerprint = read_arrays(path, setting="data.negatives")
    wanted = ["rows", *["teacher_scores"] * scored]
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(
            f"data.negatives={path} has no {', '.join(missing)}; it has {', '.join(found)}"
        )
    check_same_rows(path, found, source, setting="data.negatives")
    rows = found["rows"]
    if rows.ndim != 2 or rows.shape[1] < 1 or not np.issubdtype(rows.dtype, np.integer):
        raise ValueError(
            f"data.negatives={path}: rows are {rows.dtype}{list(rows.shape)}; wanted are integers, "
            f"[{num_rows}, at least 1]"
        )
    if rows.shape[0] != num_rows or rows.min() < -1 or rows.max() >= num_rows:
        raise ValueError(
            f"data.negatives={path} has {rows.shape[0]} rows that name rows {rows.min()} to "
            f"{rows.max()}, but the training split has {num_rows}; make it from this split"
        )
    scores = found["teacher_scores"].astype(np.float32) if scored else None
    if scores is not None and scores.shape != (num_rows, 1 + rows.shape[1]):
        raise ValueError(
            f"data.negatives={path}: teacher_scores are {list(scores.shape)}; wanted are "
            f"[{num_rows}, {1 + rows.shape[1]}]: the key's, then each negative's"
        )
    return RowNegatives(rows.astype(np.int32), scores, fingerprint)
