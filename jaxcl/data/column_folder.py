"""Folders of named columns that are computed once, then verified whenever they are read."""

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxcl.data.checked_array import CheckedArray, DamagedArray, array_record
from jaxcl.host.files import read_sealed_json, write_sealed_json
from jaxcl.host.progress import say
from jaxcl.host.staging import put_in_place, staging_folder

__all__ = ["cached_columns", "column_records", "write_columns"]

_INDEX_FILE = "columns.json"


def cached_columns(
    path: Path,
    made_from: Mapping[str, Any],
    compute: Callable[[], Mapping[str, np.ndarray]],
    *,
    what: str,
) -> dict[str, np.ndarray]:
    """Read the columns in a folder, and compute them first if necessary.

    Args:
      path: the folder.
      made_from: everything that the columns depend on, in JSON types; `path` is named after it.
      compute: returns the columns by name, as one-dimensional arrays.
      what: a name for the columns, for messages.

    Returns:
      The columns by name, in memory. Damaged columns are computed again.

    Raises:
      OSError: if the folder cannot be written, or is damaged right after it was written.
    """
    if os.path.lexists(path):
        try:
            return _read(path, made_from)
        except DamagedArray as damage:
            say(f"{what} are computed again: {damage}")
    columns = compute()
    write_columns(
        path, _INDEX_FILE, made_from, functools.partial(_save, columns=columns), what=f"{what} to"
    )
    try:
        return _read(path, made_from)
    except DamagedArray as damage:
        raise OSError(
            f"{damage}, right after it was written; set run.data_dir to a folder on another disk"
        ) from damage


def column_records(index_file: Path, made_from: Mapping[str, Any]) -> dict[str, Any]:
    """Read the record of each column, by column name, from the index of a folder.

    Args:
      index_file: the index that `write_columns` wrote.
      made_from: everything that the columns depend on, as it was given to `write_columns`.

    Raises:
      DamagedArray: if the index cannot be read, or describes other data.
    """
    try:
        index = read_sealed_json(index_file)
    except (OSError, ValueError) as error:
        raise DamagedArray(f"{index_file} cannot be read ({error})") from error
    if index["made_from"] != made_from:
        raise DamagedArray(f"{index_file.parent} was made from other data than its name says")
    return index["columns"]


def _read(path: Path, made_from: Mapping[str, Any]) -> dict[str, np.ndarray]:
    # Copies, so that later damage to the files does not affect the columns.
    return {
        name: np.array(CheckedArray(path / f"{name}.npy", record).whole())
        for name, record in column_records(path / _INDEX_FILE, made_from).items()
    }


def write_columns(
    path: Path,
    index_file: str,
    made_from: Mapping[str, Any],
    write: Callable[[Path], Mapping[str, Any] | None],
    *,
    what: str,
) -> None:
    """Write a folder of `.npy` files with a sealed index, whole or not at all.

    Files are not synced to disk. If a power failure damages them, their digests differ, and callers
    write the folder again.

    Args:
      path: the folder; an older one is replaced.
      index_file: the name of the index, which holds `made_from` and, under `columns`, the record of
        each file for `CheckedArray`.
      made_from: everything that the columns depend on, in JSON types.
      write: writes the files into a folder, and returns further entries of the index, or `None`.
      what: a name for the content, for the message about a full disk.

    Raises:
      OSError: if the folder cannot be written.
    """
    replace = os.path.lexists(path)
    try:
        with staging_folder(path) as folder:
            staged = folder / "columns"
            staged.mkdir()
            entries = write(staged) or {}
            columns = {file.stem: array_record(file) for file in sorted(staged.glob("*.npy"))}
            index = {"made_from": made_from, "columns": columns, **entries}
            write_sealed_json(staged / index_file, index)
            put_in_place(staged, path, replace=replace)
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(  # the error for a full disk does not name a file
            f"cannot write {what} {path} ({error}); make room there, or set run.data_dir to "
            "another folder"
        ) from error


def _save(folder: Path, columns: Mapping[str, np.ndarray]) -> None:
    for name, column in columns.items():
        np.save(folder / f"{name}.npy", column)
