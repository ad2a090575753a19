"""The score of each training row, which a loss compares with the similarity of its pair."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxcl.data.column_folder import cached_columns
from jaxcl.data.row_checks import check_rows
from jaxcl.data.source_fields import read_fields
from jaxcl.data.sources import PairSource
from jaxcl.host.progress import progress_bar
from jaxcl.typing import Bool, Float, Int

__all__ = ["RowScores", "open_scores"]

_FORMAT = 1
_ROLE = "scores"
_ROWS_AT_ONCE = 8192


class RowScores(NamedTuple):
    """The scores of the training rows.

    Attributes:
      scores: one finite number per row.
    """

    scores: Float[np.ndarray, " n"]

    def columns(self, rows: Int[np.ndarray, " b"]) -> dict[str, Float[np.ndarray, " b"]]:
        """The column that `jaxcl.step.batch_loss.make_loss` reads for a batch of these rows."""
        return {"score": self.scores[rows]}


def open_scores(source: PairSource, *, data_dir: Path) -> RowScores:
    """Open the `"score"` of each row of a source, read once and cached in the shared folder.

    Args:
      source: the training rows; each needs a `"score"`, a number.
      data_dir: the folder that runs share.

    Raises:
      ValueError: if a row has no score, or one that is not a finite number in float32.
      OSError: if the cache cannot be written.
    """
    made_from = {"format": _FORMAT, "source": source.fingerprint}

    def compute() -> dict[str, np.ndarray]:
        scores = np.empty(len(source), np.float32)
        with progress_bar("reading scores", len(source)) as advance:
            for first in range(0, len(source), _ROWS_AT_ONCE):
                rows = np.arange(first, min(first + _ROWS_AT_ONCE, len(source)))
                records = read_fields(source, rows, ("score",))
                numbers = [_number(record, first + row) for row, record in enumerate(records)]
                with np.errstate(over="ignore"):
                    scores[rows] = numbers
                advance(len(rows))
        check_rows(scores, _finite, what="the training rows: score", wanted="finite float32")
        return {"scores": scores}

    name = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]
    columns = cached_columns(data_dir / _ROLE / name, made_from, compute, what="the rows' scores")
    return RowScores(columns["scores"])


def _number(record: Any, row: int) -> float:
    value = record.get("score")
    if not isinstance(value, bool | int | float | np.number | np.bool_):
        fault = "no score" if value is None else f"the score {value!r:.60}"
        raise ValueError(f"row {row:,} of the training rows has {fault}; give each row a number")
    return float(value)


def _finite(scores: Float[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    return np.isfinite(scores)
