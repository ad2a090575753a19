"""Each training row's explicit negatives, as row numbers of the same split, from a file."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from jaxcl.data.row_checks import check_rows
from jaxcl.data.row_files import Column, RowArrays, read_arrays
from jaxcl.data.sources import PairSource
from jaxcl.data.table import Table
from jaxcl.host.paths import AnyPath
from jaxcl.host.progress import say
from jaxcl.typing import Bool, Float, Int, PyTree

__all__ = ["RowNegatives", "explicit_columns", "read_negatives"]


class RowNegatives(NamedTuple):
    """The rows whose keys are the explicit negatives of each row.

    Attributes:
      rows: row numbers, padded with −1 where a row has fewer negatives than others.
      teacher_scores: a teacher's scores of the row's own key, then of each negative, or `None`.
      fingerprint: the sha256 of the file.
    """

    rows: Int[np.ndarray, "n m"]
    teacher_scores: Float[np.ndarray, "n _"] | None
    fingerprint: str

    def columns(self, table: Table, rows: Int[np.ndarray, " b"]) -> dict[str, PyTree]:
        """The columns that `jaxcl.step.batch_loss.make_loss` reads for a batch of these rows."""
        numbers = self.rows[rows]
        valid = numbers >= 0
        negatives = np.where(valid, numbers, 0)
        columns: dict[str, PyTree] = {
            "negatives": explicit_columns(table, negatives, valid, table.labels(negatives))
        }
        if self.teacher_scores is not None:
            columns["teacher_scores"] = self.teacher_scores[rows]
        return columns


def explicit_columns(
    table: Table,
    numbers: Int[np.ndarray, "b m"],
    valid: Bool[np.ndarray, "b m"],
    labels: Mapping[str, Int[np.ndarray, "b m"]],
) -> dict[str, PyTree]:
    """The column `"negatives"` of a batch.

    Args:
      table: the table whose keys are the negatives.
      numbers: each row's negatives, as rows of the table.
      valid: `False` where a row has fewer negatives than others.
      labels: the labels of the negatives.
    """
    inputs = jax.tree.map(
        lambda leaf: leaf.reshape(*numbers.shape, *leaf.shape[1:]),
        table.side("key", numbers.ravel()),
    )
    return {"inputs": inputs, "valid": valid, **labels}


def read_negatives(
    path: AnyPath,
    *,
    num_rows: int,
    scored: bool,
    source: str | None = None,
    pairs: PairSource | None = None,
) -> RowNegatives:
    """Read an `.npz` with `rows` and, if needed, `teacher_scores`.

    Args:
      path: the file. `rows` has the shape `[rows of the split, most negatives of a row]` and is
        padded with −1; `teacher_scores` has `[rows of the split, 1 + most negatives]`. The entries
        must be in the order of the split; TFDS shuffles a split when it prepares it. In a file with
        `ids` (`jaxcl.data.row_files.read_arrays`) they may be in any order, and `rows` holds row
        numbers of the file; negatives that are not in the split are left out.
      num_rows: the number of rows in the training split.
      scored: whether to read a teacher's scores, which must then be in the file.
      source: the split's fingerprint; the file's own `source`, if it has one, must be the same.
      pairs: the training split, to match ids.

    Raises:
      ValueError: if the file is missing, damaged, or does not belong to this split.
    """
    columns = {"rows": Column("integers", (num_rows, None))}
    if scored:
        columns["teacher_scores"] = Column("numbers", (num_rows, None))
    read = read_arrays(path, columns, setting="data.negatives", source=source, pairs=pairs)
    rows, scores = read.arrays["rows"], read.arrays.get("teacher_scores")
    check_rows(
        rows,
        lambda part: (part >= -1) & (part < read.num_file_rows),
        what=f"data.negatives={path}: rows",
        wanted=f"rows from 0 to {read.num_file_rows - 1}, or -1 for none",
    )
    if read.file_rows is not None:
        rows = _renumbered(rows, read, path)
    if scores is not None:
        if scores.shape[1] != 1 + rows.shape[1]:
            raise ValueError(
                f"data.negatives={path}: teacher_scores have the shape {list(scores.shape)}; use "
                f"[{num_rows}, {1 + rows.shape[1]}]: the key's score, then each negative's"
            )
        scores = scores.astype(np.float32)
    return RowNegatives(rows.astype(np.int32), scores, read.fingerprint)


def _renumbered(
    rows: Int[np.ndarray, "n m"], read: RowArrays, path: AnyPath
) -> Int[np.ndarray, "n m"]:
    """Convert rows of the file to rows of the split; −1 for rows outside the split."""
    split_rows = np.full(read.num_file_rows + 1, -1)  # the last entry is for −1
    split_rows[read.file_rows] = np.arange(len(rows))
    renumbered = split_rows[rows]
    if left_out := int(((rows >= 0) & (renumbered < 0)).sum()):
        say(f"data.negatives={path}: {left_out:,} negatives are not in the training split")
    return renumbered
