"""Arrays on disk whose chunks are verified when they are first read.

record = array_record(path)               # after the file is written
tokens = CheckedArray(path, record)       # checks the size and the header
tokens[np.array([5, 2_000_000])]          # checks the digests of two chunks
"""

import functools
import io
import os
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxcl.host.files import digest_of, open_regular
from jaxcl.typing import Bool, Float, Int, Integer

__all__ = ["CheckedArray", "DamagedArray", "array_record"]

_CHUNK_BYTES = 2**20
"""A multiple of every item size. The digests add about 0.003% to the array's bytes."""


class DamagedArray(ValueError):
    """The content of a file has changed since it was written."""


def array_record(path: Path) -> dict[str, Any]:
    """The size of a file and the digest of each of its chunks, in JSON types."""
    with path.open("rb") as file:
        chunks = iter(functools.partial(file.read, _CHUNK_BYTES), b"")
        return {"digests": [digest_of(chunk) for chunk in chunks], "bytes": file.tell()}


class CheckedArray:
    """A one-dimensional array in a `.npy` file, memory-mapped and read-only.

    Digests are computed by reading the file, not the mapped memory: if a file was truncated or its
    disk fails, accessing the mapped memory kills the process.

    Args:
      path: the file.
      record: the result of `array_record`.
      below: the exclusive upper bound of the numbers; with `None`, they are not checked.

    Raises:
      DamagedArray: if the file is missing, or its size or header has changed.
    """

    def __init__(self, path: Path, record: Mapping[str, Any], *, below: int | None = None) -> None:
        self._path, self._below, self._digests = path, below, record["digests"]
        try:
            # Unbuffered, because a buffer could hold an earlier state of the file.
            file: Any = open_regular(path)
            self._file = file.detach()
        except (OSError, ValueError) as error:
            raise DamagedArray(f"{path} cannot be read ({error})") from error
        weakref.finalize(self, self._file.close)
        size = os.fstat(self._file.fileno()).st_size
        if size != record["bytes"]:
            raise DamagedArray(f"{path} has {size:,} bytes, but {record['bytes']:,} were written")
        self._lock = threading.Lock()
        header = io.BytesIO(self._read(0))
        np.lib.format.read_magic(header)
        shape, _, dtype = np.lib.format.read_array_header_1_0(header)
        self._begin = header.tell()
        self._array = np.memmap(self._file, dtype, "r", self._begin, shape)
        self._unverified = np.ones(len(self._digests), bool)

    def __len__(self) -> int:
        return len(self._array)

    @property
    def dtype(self) -> np.dtype:
        """The type of the numbers."""
        return self._array.dtype

    def __getitem__(self, positions: Int[np.ndarray, "*n"]) -> Integer[np.ndarray, "*n"]:
        """The numbers at these positions.

        Raises:
          DamagedArray: if a chunk that holds one of them has changed since it was written.
        """
        if self._unverified.any():
            touched = np.zeros_like(self._unverified)
            touched[(self._begin + positions * self.dtype.itemsize) // _CHUNK_BYTES] = True
            self._verify(touched)
        return self._array[positions]

    def between(self, start: int, stop: int) -> Integer[np.ndarray, " _"] | Float[np.ndarray, " _"]:
        """The numbers from `start` up to, but not including, `stop`, still memory-mapped.

        Raises:
          DamagedArray: if a chunk that holds one of them has changed since it was written.
        """
        if start < stop and self._unverified.any():
            edges = self._begin + np.array([start, stop]) * self.dtype.itemsize
            touched = np.zeros_like(self._unverified)
            touched[edges[0] // _CHUNK_BYTES : (edges[1] - 1) // _CHUNK_BYTES + 1] = True
            self._verify(touched)
        return self._array[start:stop]

    def whole(self) -> Integer[np.ndarray, " _"] | Float[np.ndarray, " _"]:
        """All numbers, still memory-mapped.

        Raises:
          DamagedArray: if the file has changed since it was written.
        """
        self._verify(np.ones_like(self._unverified))
        return self._array

    def copy(self) -> Integer[np.ndarray, " _"]:
        """Copy all numbers to memory, so that later damage to the file does not affect them.

        Raises:
          DamagedArray: if the file has changed since it was written.
        """
        numbers = np.empty(len(self), self.dtype)
        target, done = numbers.view(np.uint8), 0
        for chunk in range(len(self._digests)):
            begin = 0 if chunk else self._begin
            content = self._read(chunk)
            self._check_numbers(content, begin=begin)
            part = np.frombuffer(content, np.uint8, offset=begin)
            target[done : done + len(part)] = part
            done += len(part)
        return numbers

    def _verify(self, chunks: Bool[np.ndarray, " _"]) -> None:
        with self._lock:
            for chunk in np.flatnonzero(chunks & self._unverified).tolist():
                self._check_numbers(self._read(chunk), begin=0 if chunk else self._begin)
                self._unverified[chunk] = False

    def _read(self, chunk: int) -> bytes:
        try:
            self._file.seek(chunk * _CHUNK_BYTES)
            content = self._file.read(_CHUNK_BYTES)
        except OSError as error:
            raise DamagedArray(f"{self._path} cannot be read ({error})") from error
        if digest_of(content) != self._digests[chunk]:
            raise DamagedArray(f"{self._path} has changed since it was written")
        return content

    def _check_numbers(self, content: bytes, *, begin: int) -> None:
        numbers = np.frombuffer(content, self.dtype, offset=begin)
        if self._below is not None and numbers.size and numbers.max() >= self._below:
            raise DamagedArray(f"{self._path} has numbers that are not below {self._below}")
