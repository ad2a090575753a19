"""Files with something for each training row: their arrays, and the rows that they belong to."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxcl.data.row_checks import check_rows
from jaxcl.host.files import open_regular
from jaxcl.host.npz import ArrayHeader, npz_headers, read_npz
from jaxcl.typing import Bool

__all__ = ["Column", "read_arrays"]

_KINDS = {"integers": "iu", "floats": "f", "numbers": "iuf"}
_SOURCE = "source"
_MAX_SOURCE_BYTES = 4096


class Column(NamedTuple):
    """An array that a file must have.

    Attributes:
      kind: `"integers"`, `"floats"` or `"numbers"`.
      shape: each axis's size; None for at least 1.
    """

    kind: str
    shape: tuple[int | None, ...]


def read_arrays(
    path: Path, columns: Mapping[str, Column], *, setting: str, source: str | None = None
) -> tuple[dict[str, np.ndarray], str]:
    """Read arrays with an entry for each training row from an `.npz`.

    Args:
      path: the file. Where it has a `source`, the fingerprint of the split that it was made from,
        that must be the one given.
      columns: name -> the array that is wanted; others are not read.
      setting: the setting that gave the file, for messages.
      source: the fingerprint of the training split; `None` if it is not known.

    Returns:
      The arrays, in which all floats are finite in float32, and a fingerprint of the file.

    Raises:
      ValueError: for a file that is missing or damaged, lacks an array, has one of another kind or
        shape or with numbers that are not finite, or was made from other rows.
    """
    try:
        headers = npz_headers(path, list(columns), optional=[_SOURCE])
        if _SOURCE in headers and source is not None:
            _check_same_rows(path, headers[_SOURCE], source)
        for name, column in columns.items():
            _check_header(headers[name], column, what=f"{path}: {name}")
        arrays = read_npz(path, list(columns))
        with open_regular(path) as file:
            fingerprint = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{setting}={error}") from error
    for name, array in arrays.items():
        if array.dtype.kind == "f":
            check_rows(array, _finite, what=f"{setting}={path}: {name}", wanted="finite float32")
    return arrays, fingerprint


def _finite(part: np.ndarray) -> Bool[np.ndarray, "..."]:
    with np.errstate(over="ignore"):
        return np.isfinite(part.astype(np.float32))


def _check_header(header: ArrayHeader, column: Column, *, what: str) -> None:
    sizes = zip(header.shape, column.shape, strict=False)
    fits = len(header.shape) == len(column.shape) and all(
        size >= 1 if wanted is None else size == wanted for size, wanted in sizes
    )
    if not fits or header.dtype.kind not in _KINDS[column.kind]:
        wanted = ", ".join("at least 1" if size is None else str(size) for size in column.shape)
        raise ValueError(
            f"{what} is {header.dtype}{list(header.shape)}; wanted are {column.kind}, [{wanted}]"
        )


def _check_same_rows(path: Path, header: ArrayHeader, source: str) -> None:
    if header.shape or header.dtype.kind != "U" or header.dtype.itemsize > _MAX_SOURCE_BYTES:
        raise ValueError(f"{path}: source is {header.dtype}{list(header.shape)}; wanted is a text")
    theirs = str(read_npz(path, [_SOURCE])[_SOURCE])
    if theirs != source:
        raise ValueError(
            f"{path} was made from other rows ({_short(theirs)}) than this run's training split "
            f"({_short(source)}): data or installed packages have changed since, or it is "
            "another split. Make it by a run that has these rows"
        )


def _short(fingerprint: str) -> str:
    name, _, digest = fingerprint.rpartition(":")
    return f"{name}:{digest[:8]}" if name else digest
