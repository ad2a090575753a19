"""Digests of many image files, computed again only for files that have changed."""

import errno
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxcl.data.checked_array import CheckedArray, DamagedArray
from jaxcl.data.column_folder import column_records, write_columns
from jaxcl.data.images.decoding import BadImage
from jaxcl.data.images.image_references import read_inside
from jaxcl.data.images.image_threads import in_threads
from jaxcl.host.progress import progress_bar
from jaxcl.typing import Int, UInt8

__all__ = ["digest_of_files"]

_INDEX_FILE = "files.json"
_FORMAT = 2
_DIGEST_BYTES = 16
_UNREAD = bytes(_DIGEST_BYTES)
"""The digest of a file that cannot be read."""
_FILES_AT_ONCE = 64


class _Index(NamedTuple):
    """The files that earlier calls hashed.

    Attributes:
      position: file name -> position in the arrays.
      status: the size of each file, and the times of the last changes of its content and status.
      digests: the digest of each file.
    """

    position: Mapping[str, int]
    status: Int[np.ndarray, "n 3"]
    digests: UInt8[np.ndarray, "n 16"]


def digest_of_files(folder: Path, names: Sequence[str], *, directory: Path) -> str:
    """A sha256 of the names and the contents of files.

    The digests of the files are cached in `directory`, unless it is read-only. A file is read again
    if its size or a time differs: that of its content, or that of its status, which no program can
    set.

    Args:
      folder: the folder of the files.
      names: the paths of the files, relative to `folder`. Files that cannot be read share a fixed
        digest.
      directory: the folder of the cached digests.

    Raises:
      OSError: if the digests cannot be written, except to a read-only directory.
    """
    where = str(folder.absolute())
    made_from = {"format": _FORMAT, "folder": where}
    path = directory / hashlib.sha256(where.encode()).hexdigest()[:16]
    index = _read_index(path, made_from)
    names = sorted(set(names))
    status = np.zeros((len(names), 3), np.int64)
    digests = np.zeros((len(names), _DIGEST_BYTES), np.uint8)
    changed = []
    for number, name in enumerate(names):
        status[number] = _status(folder / name)
        earlier = index.position.get(name)
        unchanged = earlier is not None and (index.status[earlier] == status[number]).all()
        # A file that could not be read is tried again: its status may stay as it was.
        if unchanged and index.digests[earlier].any():
            digests[number] = index.digests[earlier]
        else:
            changed.append(number)
    if changed:
        digests[changed] = _digests(folder, [names[number] for number in changed])
        current_names = set(names)
        other_files = {
            name: number for name, number in index.position.items() if name not in current_names
        }
        numbers = list(other_files.values())  # other files of rows may refer to these images
        _write_index(
            path,
            made_from,
            [*names, *other_files],
            np.concatenate([status, index.status[numbers]]),
            np.concatenate([digests, index.digests[numbers]]),
        )
    content = hashlib.sha256()
    for name, digest in zip(names, digests, strict=True):
        content.update(name.encode(errors="surrogateescape") + b"\0" + digest.tobytes())
    return content.hexdigest()


def _status(path: Path) -> tuple[int, int, int]:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return 0, 0, 0
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _digests(folder: Path, names: Sequence[str]) -> UInt8[np.ndarray, "n 16"]:
    def digests(part: Sequence[str]) -> bytes:
        return b"".join(_digest(folder, name) for name in part)

    parts = [names[i : i + _FILES_AT_ONCE] for i in range(0, len(names), _FILES_AT_ONCE)]
    joined = bytearray()
    with progress_bar(f"hashing the images in {folder.name}", len(names)) as advance:
        for part in in_threads(digests, parts, purpose="reading"):
            joined += part
            advance(len(part) // _DIGEST_BYTES)
    return np.frombuffer(joined, np.uint8).reshape(-1, _DIGEST_BYTES)


def _digest(folder: Path, name: str) -> bytes:
    try:
        content = read_inside(folder, name)
    except BadImage:
        return _UNREAD
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()


def _read_index(path: Path, made_from: Mapping[str, Any]) -> _Index:
    try:
        columns = {
            name: CheckedArray(path / f"{name}.npy", record).copy()
            for name, record in column_records(path / _INDEX_FILE, made_from).items()
        }
        names = columns["names"].tobytes().decode(errors="surrogateescape").split("\0")
        return _Index(
            {name: position for position, name in enumerate(names)},
            columns["status"].reshape(-1, 3),
            columns["digests"].reshape(-1, _DIGEST_BYTES),
        )
    except (DamagedArray, KeyError):  # or missing
        return _Index({}, np.zeros((0, 3), np.int64), np.zeros((0, _DIGEST_BYTES), np.uint8))


def _write_index(
    path: Path,
    made_from: Mapping[str, Any],
    names: Sequence[str],
    status: Int[np.ndarray, "n 3"],
    digests: UInt8[np.ndarray, "n 16"],
) -> None:
    joined = "\0".join(names).encode(errors="surrogateescape")

    def write(folder: Path) -> None:
        np.save(folder / "names.npy", np.frombuffer(joined, np.uint8))
        np.save(folder / "status.npy", status.ravel())
        np.save(folder / "digests.npy", digests.ravel())

    try:
        write_columns(path, _INDEX_FILE, made_from, write, what="the digests of images to")
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
