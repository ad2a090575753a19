"""Reads untrusted `.npz` files: nothing is unpickled, and memory is bounded by the file's size.

Headers are checked before the arrays that they describe are read. Arrays that are not requested
are not decompressed.
"""

import contextlib
import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxcl.host.files import open_regular
from jaxcl.host.paths import AnyPath

__all__ = ["ArrayHeader", "npz_headers", "read_npz"]

_DAMAGED = (
    *(OSError, EOFError, TypeError, ValueError, KeyError, zipfile.BadZipFile, zlib.error),
    *(NotImplementedError, RuntimeError, MemoryError),  # unknown compression, encryption
)
"""The errors that zipfile and NumPy raise for damaged files."""

_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # the ones that NumPy writes
_FREE_BYTES = 256 * 2**20
_MAX_RATIO = 100
"""The largest allowed compression ratio of an array of more than `_FREE_BYTES`."""


class ArrayHeader(NamedTuple):
    """The shape and type of an array in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype


def npz_headers(
    path: AnyPath, names: Sequence[str], *, optional: Sequence[str] = ()
) -> dict[str, ArrayHeader]:
    """Read the headers of these arrays, and of the optional arrays that the file has.

    Raises:
      ValueError: if the file cannot be read or lacks an array; the message names the file.
    """
    with _archive(path, names) as archive:
        present = [name for name in optional if f"{name}.npy" in archive.namelist()]
        return {name: _header(archive, name) for name in [*names, *present]}


def read_npz(path: AnyPath, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Read the named arrays of a file.

    Raises:
      ValueError: if the file cannot be read or lacks an array, or if an array needs much more
        memory than its compressed size; the message names the file.
    """
    with _archive(path, names) as archive:
        arrays = {}
        for name in names:
            _header(archive, name)
            with archive.open(f"{name}.npy") as file:
                arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
        return arrays


@contextlib.contextmanager
def _archive(path: AnyPath, names: Sequence[str]) -> Iterator[zipfile.ZipFile]:
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            file.seek(0, os.SEEK_END)
            size = file.tell()
            if any(part.compress_size > size for part in archive.infolist()):
                raise zipfile.BadZipFile("one of its arrays is larger than the file")
            present = [name.removesuffix(".npy") for name in archive.namelist()]
            if missing := [name for name in names if name not in present]:
                raise ValueError(f"it has no {', '.join(missing)}; it has {', '.join(present)}")
            yield archive
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{path} cannot be read: not an .npz, or damaged ({error}); write it with numpy.savez"
        ) from error
    except _DAMAGED as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _header(archive: zipfile.ZipFile, name: str) -> ArrayHeader:
    """Read the header of an array, and check that it agrees with the array's size in the file."""
    part = archive.getinfo(f"{name}.npy")
    if part.compress_type not in _COMPRESSIONS:
        raise ValueError(f"{name} has a compression that NumPy does not write")
    if part.file_size > max(_FREE_BYTES, _MAX_RATIO * part.compress_size):
        raise ValueError(
            f"{name} unpacks {part.compress_size:,} bytes to {part.file_size:,}; write it with "
            "numpy.savez, without compression"
        )
    with archive.open(part) as file:
        header = _parse_header(file, name)
        num_bytes = file.tell() + math.prod(header.shape) * header.dtype.itemsize
    if num_bytes != part.file_size:
        raise ValueError(
            f"{name} has {part.file_size:,} bytes, but its header, {header.dtype}"
            f"{list(header.shape)}, describes {num_bytes:,}"
        )
    return header


def _parse_header(file: Any, name: str) -> ArrayHeader:
    if np.lib.format.read_magic(file) != (1, 0):  # other versions allow headers of gigabytes
        raise ValueError(f"{name} is not in version 1.0 of the .npy format")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects, which could run code; write numbers")
    if min(shape, default=0) < 0:
        raise ValueError(f"{name} has the shape {shape}")
    return ArrayHeader(shape, dtype)
