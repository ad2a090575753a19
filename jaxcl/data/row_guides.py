"""A guide model's embeddings of each training row, from a file."""

from typing import NamedTuple

import numpy as np

from jaxcl.data.row_checks import check_rows
from jaxcl.data.row_files import Column, read_arrays
from jaxcl.data.sources import PairSource
from jaxcl.host.npz import npz_headers
from jaxcl.host.paths import AnyPath, as_path
from jaxcl.typing import SIDES, Bool, Float, Int

_MIN_SQUARE = 1e-10
"""The smallest squared norm, far above the ε below which normalisation treats a vector as zero."""

__all__ = ["RowGuides", "guide_dim", "read_guides"]


class RowGuides(NamedTuple):
    """A guide model's embeddings of the training rows.

    Attributes:
      query: the embeddings of the queries.
      key: the embeddings of the keys.
      fingerprint: the sha256 of the file.
    """

    query: Float[np.ndarray, "n g"]
    key: Float[np.ndarray, "n g"]
    fingerprint: str

    def columns(self, rows: Int[np.ndarray, " b"]) -> dict[str, Float[np.ndarray, "b g"]]:
        """The columns that `jaxcl.step.batch_loss.make_loss` reads for a batch of these rows."""
        return {side: getattr(self, side)[rows].astype(np.float32) for side in SIDES}


def read_guides(
    path: AnyPath, *, num_rows: int, source: str | None = None, pairs: PairSource | None = None
) -> RowGuides:
    """Read an `.npz` with `query` and `key`, each `[rows of the split, any width]`.

    `jaxcl.data.row_files.read_arrays` explains how rows are matched, and which files it refuses.

    Raises:
      ValueError: if `read_arrays` refuses the file, or an embedding's norm is too small or large.
    """
    path = as_path(path)
    columns = {side: Column("floats", (num_rows, guide_dim(path))) for side in SIDES}
    sides, fingerprint, *_ = read_arrays(
        path, columns, setting="data.guides", source=source, pairs=pairs
    )
    for side, vectors in sides.items():
        check_rows(
            vectors,
            _has_norm,
            what=f"data.guides={path}: {side}",
            wanted="embeddings of norm 1, or of a norm between 1e-5 and 1e19",
        )
    return RowGuides(**sides, fingerprint=fingerprint)


def _has_norm(vectors: Float[np.ndarray, "n g"]) -> Bool[np.ndarray, " n"]:
    """Whether cosines with each vector are defined; a zero vector is allowed and gives cosine 0."""
    vectors = vectors.astype(np.float32)
    with np.errstate(over="ignore"):
        squares = np.einsum("ng,ng->n", vectors, vectors)
    return np.isfinite(squares) & ((squares > _MIN_SQUARE) | ~vectors.any(axis=1))


def guide_dim(path: AnyPath | str) -> int:
    """The width of the embeddings in a file of guides, read from its header alone."""
    path = as_path(path)
    try:
        shape = npz_headers(path, SIDES)["key"].shape
    except ValueError as error:
        raise ValueError(f"data.guides={error}") from error
    if len(shape) != 2 or shape[1] < 1:
        raise ValueError(f"data.guides={path}: key has the shape {shape}; use [rows, width]")
    return shape[1]
