"""Read files with an entry for each training row, and match the entries to the rows."""

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
      shape: the size of each axis; None for any size of at least 1.
    """

    kind: str
    shape: tuple[int | None, ...]


class RowArrays(NamedTuple):
    """The arrays of a file, in the order of a split's rows.

    Attributes:
      arrays: the arrays by name, with an entry for each row of the split; all floats are finite in
        float32.
      fingerprint: the sha256 of the file.
      file_rows: the row of the file for each row of the split; `None` for a file without ids.
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
      path: the file. It may have a `source`, the fingerprint of the split that it was made from,
        which must equal the argument `source`. It may have `ids`, a text or an integer for each of
        its rows, and `id_field`, the metadata field of the split that holds the same ids; rows are
        then matched by their ids. Otherwise, rows must be in the order of the split.
      columns: name -> the required array; other arrays are not read.
      setting: the setting that names the file, for messages.
      source: the fingerprint of the training split; `None` if it is not known.
      pairs: the training split, to match ids.

    Raises:
      ValueError: if the file is missing or damaged, lacks an array, was made from other rows, has
        an array of another kind or shape or with numbers that are not finite, or has ids that do
        not match the rows of the split.
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
            # The stub asks for a buffered reader, but any file that reads bytes will do.
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
            f"{path}: ids is {ids.dtype}{list(ids.shape)}; use texts or integers, one per row"
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
        raise ValueError(f"{path}: {name} is {dtype}{list(shape)}; use a text")


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
            f"{what} is {header.dtype}{list(header.shape)}; use {column.kind} of shape [{wanted}]"
        )


def _check_same_rows(path: AnyPath, headers: Mapping[str, ArrayHeader], source: str) -> None:
    _check_text(path, headers, _SOURCE)
    file_source = str(read_npz(path, [_SOURCE])[_SOURCE])
    if file_source != source:
        raise ValueError(
            f"{path} was made from other rows ({_short(file_source)}) than this run's training "
            f"split ({_short(source)}): data or installed packages have changed since, or it is "
            "another split. Write it again for these rows"
        )


def _short(fingerprint: str) -> str:
    name, _, digest = fingerprint.rpartition(":")
    return f"{name}:{digest[:8]}" if name else digest
