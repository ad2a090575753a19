"""Each training row's embeddings by a model that judges similarity, from a file."""

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxcl.data.row_files import check_same_rows, read_arrays
from jaxcl.typing import SIDES, Float, Int

__all__ = ["RowGuides", "guide_dim", "read_guides"]


class RowGuides(NamedTuple):
    """A frozen model's embeddings of the training rows.

    Attributes:
      query: of their queries.
      key: of their keys.
      fingerprint: of the file.
    """

    query: Float[np.ndarray, "n g"]
    key: Float[np.ndarray, "n g"]
    fingerprint: str

    def columns(self, rows: Int[np.ndarray, " b"]) -> dict[str, Float[np.ndarray, "b g"]]:
        """The columns that `jaxcl.step.batch_loss.make_loss` reads for a batch of these rows."""
        return {side: getattr(self, side)[rows].astype(np.float32) for side in SIDES}


def read_guides(path: Path, *, num_rows: int, source: str | None = None) -> RowGuides:
    """Reads an `.npz` with `query` and `key`, `[rows of the split, any width]` each.

    Where it has a `source`, the fingerprint of the split, that must be the one given.

    Raises:
      ValueError: for a file that is missing, damaged, or not of this split.
    """
    path = Path(path).expanduser()
    width = guide_dim(path)
    found, fingerprint = read_arrays(path, setting="data.guides")
    check_same_rows(path, found, source, setting="data.guides")
    sides = {side: found[side] for side in SIDES}
    for side, vectors in sides.items():
        if vectors.shape != (num_rows, width) or not np.issubdtype(vectors.dtype, np.floating):
            raise ValueError(
                f"data.guides={path}: {side} is {vectors.dtype}{list(vectors.shape)}; wanted are "
                f"floats, [{num_rows}, {width}]"
            )
        if not np.isfinite(vectors).all():
            raise ValueError(f"data.guides={path}: {side} has numbers that are not finite")
    return RowGuides(**sides, fingerprint=fingerprint)


def guide_dim(path: Path | str) -> int:
    """The width of the embeddings in such a file, from its header alone."""
    path = Path(path).expanduser()
    try:
        with zipfile.ZipFile(path) as archive:
            missing = [side for side in SIDES if f"{side}.npy" not in archive.namelist()]
            if missing:
                raise ValueError(f"it has no {', '.join(missing)}")
            with archive.open("key.npy") as file:
                np.lib.format.read_magic(file)
                shape, _, _ = np.lib.format.read_array_header_1_0(file)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"data.guides={path} cannot be read: {error}") from error
    if len(shape) != 2:
        raise ValueError(f"data.guides={path}: key has the shape {shape}; wanted is [rows, width]")
    return shape[1]
