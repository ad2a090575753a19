"""Files with something for each training row: what is read of them, and whose rows they are of."""

import hashlib
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

__all__ = ["DAMAGED", "check_same_rows", "read_arrays"]

DAMAGED = (
    *(OSError, EOFError, TypeError, ValueError, KeyError, zipfile.BadZipFile, zlib.error),
    *(NotImplementedError, RuntimeError),  # another compression, "encrypted"
)
"""What zip and NumPy raise for a file of which some bits have changed."""


def read_arrays(path: Path, *, setting: str) -> tuple[dict[str, np.ndarray], str]:
    """The arrays of an `.npz`, and a fingerprint of the file.

    Raises:
      ValueError: for a file that is missing or damaged; it names the setting that gave it.
    """
    try:
        with path.open("rb") as file:
            fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
        with np.load(path) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except DAMAGED as error:
        raise ValueError(f"{setting}={path} cannot be read: {error}") from error
    return found, fingerprint


def check_same_rows(
    path: Path, found: Mapping[str, np.ndarray], source: str | None, *, setting: str
) -> None:
    """Checks that a file was made from the rows of a training split.

    Args:
      path: of the file.
      found: its arrays; `source` among them, if it is there, is the fingerprint of its rows.
      source: that of the training split; `None` if it is not known.
      setting: which gave the file.

    Raises:
      ValueError: if they differ.
    """
    theirs = str(found.get("source", source))
    if source is not None and theirs != source:
        raise ValueError(
            f"{setting}={path} was made from other rows ({_short(theirs)}) than those of this "
            f"run's training split ({_short(source)}): data or installed packages have changed "
            "since, or it is another split. Make it by a run that has these rows"
        )


def _short(fingerprint: str) -> str:
    name, _, digest = fingerprint.rpartition(":")
    return f"{name}:{digest[:8]}" if name else digest
