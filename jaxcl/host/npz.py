"""`.npz` files that someone else may have written: nothing is unpickled, and memory has a bound.

Headers are read before the arrays that they describe, so that a file cannot ask for more memory
than its own size allows. Arrays that are not asked for are not unpacked.
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
    *(NotImplementedError, RuntimeError, MemoryError),  # another compression, "encrypted"
)
"""The errors of zip and NumPy for a file with flipped bits."""

_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # NumPy's own
_FREE_BYTES = 256 * 2**20
_MAX_RATIO = 100
"""An array of more than `_FREE_BYTES` may be this many times larger than its part of the file."""


class ArrayHeader(NamedTuple):
    """The shape and type of an array in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype


def npz_headers(
    path: AnyPath, names: Sequence[str], *, optional: Sequence[str] = ()
) -> dict[str, ArrayHeader]:
    """The headers of these arrays, and of the optional ones that the file has.

    Raises:
      ValueError: if the file cannot be read or lacks an array; it begins with the file's name.
    """
    with _archive(path, names) as archive:
        present = [name for name in optional if f"{name}.npy" in archive.namelist()]
        return {name: _header(archive, name) for name in [*names, *present]}


def read_npz(path: AnyPath, names: Sequence[str]) -> dict[str, np.ndarray]:
    """These arrays.

    Raises:
      ValueError: if the file cannot be read or lacks an array, or if an array needs much more
        memory than its part of the file; it begins with the file's name.
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
                raise zipfile.BadZipFile("a part of it is larger than the whole")
            present = [name.removesuffix(".npy") for name in archive.namelist()]
            if missing := [name for name in names if name not in present]:
                raise ValueError(f"it has no {', '.join(missing)}; it has {', '.join(present)}")
            yield archive
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{path} cannot be read: it is no .npz, or damaged ({error}); write it with numpy.savez"
        ) from error
    except _DAMAGED as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _header(archive: zipfile.ZipFile, name: str) -> ArrayHeader:
    """The header of an array, which agrees with the size of its part of the file."""
    part = archive.getinfo(f"{name}.npy")
    if part.compress_type not in _COMPRESSIONS:
        raise ValueError(f"{name} is compressed in another way than NumPy's")
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
            f"{name} has {part.file_size:,} bytes, but by its header {header.dtype}"
            f"{list(header.shape)} it has {num_bytes:,}"
        )
    return header


def _parse_header(file: Any, name: str) -> ArrayHeader:
    if np.lib.format.read_magic(file) != (1, 0):  # as others may claim a header of gigabytes
        raise ValueError(f"{name} is not of the first format of .npy files")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects, which could run code; write numbers")
    if min(shape, default=0) < 0:
        raise ValueError(f"{name} has the shape {shape}")
    return ArrayHeader(shape, dtype)
