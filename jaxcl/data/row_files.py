"""Files with something for each training row: their arrays, and the rows that they belong to."""

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxcl.data.row_checks import check_rows
from jaxcl.data.row_ids import match_rows
from jaxcl.data.sources import PairSource
from jaxcl.host.files import open_regular
from jaxcl.host.npz import ArrayHeader, npz_headers, read_npz
from jaxcl.host.paths import AnyPath
from jaxcl.typing import Bool, Int

__all__ = ["Column", "RowArrays", "read_arrays"]

_KINDS = {"integers": "iu", "floats": "f", "numbers": "iuf"}
_SOURCE = "source"
_IDS = ("ids", "id_field")
_MAX_TEXT_BYTES = 4096


class Column(NamedTuple):
    """An array that a file must have.

    Attributes:
      kind: `"integers"`, `"floats"` or `"numbers"`.
      shape: each axis's size; None for at least 1.
    """

    kind: str
    shape: tuple[int | None, ...]


class RowArrays(NamedTuple):
    """The arrays of a file, in the order of a split.

    Attributes:
      arrays: by name, an entry for each row of the split; all floats are finite in float32.
      fingerprint: of the file.
      file_rows: the row of the file for each row of the split, where the file has ids.
      num_file_rows: the number of rows of the file.
    """

    arrays: dict[str, np.ndarray]
    fingerprint: str
    file_rows: Int[np.ndarray, " n"] | None
    num_file_rows: int


def read_arrays(
    path: AnyPath,
    columns: Mapping[str, Column],
    *,
    setting: str,
    source: str | None = None,
    pairs: PairSource | None = None,
) -> RowArrays:
    """Read arrays with an entry for each training row from an `.npz`.

    Args:
      path: the file. Where it has a `source`, the fingerprint of the split that it was made from,
        that must be the one given. Where it has `ids`, a text or an integer for each of its rows,
        and `id_field`, the name of the metadata field of the split that holds its ids, rows are
        matched by them; otherwise they are in the order of the split.
      columns: name -> the array that is wanted; others are not read.
      setting: the setting that gave the file, for messages.
      source: the fingerprint of the training split; `None` if it is not known.
      pairs: the training split, to match ids.

    Raises:
      ValueError: for a file that is missing or damaged, lacks an array, has one of another kind or
        shape or with numbers that are not finite, or was made from other rows; for ids that do not
        name each row of the split.
    """
    try:
        headers = npz_headers(path, list(columns), optional=[_SOURCE, *_IDS])
        if _SOURCE in headers and source is not None:
            _check_same_rows(path, headers, source)
        file_rows = _match(path, headers, pairs) if headers.keys() & set(_IDS) else None
        for name, column in columns.items():
            if file_rows is not None:
                column = column._replace(shape=(headers["ids"].shape[0], *column.shape[1:]))
            _check_header(headers[name], column, what=f"{path}: {name}")
        arrays = read_npz(path, list(columns))
        with open_regular(path) as file:
            fingerprint = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{setting}={error}") from error
    for name, array in arrays.items():
        if array.dtype.kind == "f":
            check_rows(array, _finite, what=f"{setting}={path}: {name}", wanted="finite float32")
    num_file_rows = min(map(len, arrays.values()))
    if file_rows is not None:
        arrays = {name: array[file_rows] for name, array in arrays.items()}
    return RowArrays(arrays, fingerprint, file_rows, num_file_rows)


def _match(
    path: AnyPath, headers: Mapping[str, ArrayHeader], pairs: PairSource | None
) -> Int[np.ndarray, " n"]:
    _check_text(path, headers, "id_field")
    if pairs is None or "ids" not in headers:
        raise ValueError(f"{path} has id_field, but ids or the split to match them are missing")
    ids = headers["ids"]
    if len(ids.shape) != 1 or ids.dtype.kind not in "iuU":
        raise ValueError(
            f"{path}: ids is {ids.dtype}{list(ids.shape)}; wanted are texts or integers, one a row"
        )
    arrays = read_npz(path, _IDS)
    try:
        return match_rows(arrays["ids"], pairs, field=str(arrays["id_field"]))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_text(path: AnyPath, headers: Mapping[str, ArrayHeader], name: str) -> None:
    if name not in headers:
        raise ValueError(f"{path} has no {name}; add it")
    shape, dtype = headers[name]
    if shape or dtype.kind != "U" or dtype.itemsize > _MAX_TEXT_BYTES:
        raise ValueError(f"{path}: {name} is {dtype}{list(shape)}; wanted is a text")


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


def _check_same_rows(path: AnyPath, headers: Mapping[str, ArrayHeader], source: str) -> None:
    _check_text(path, headers, _SOURCE)
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
