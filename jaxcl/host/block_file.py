"""Long results that are computed block by block and survive a stop: `.npy` files with a log."""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxcl.host.files import digest_of, open_regular, read_json_lines, write_whole
from jaxcl.host.progress import say

__all__ = ["BlockFile", "complete_array"]

_LOG = ".blocks.jsonl"
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.EINVAL)  # of some file systems


class _Block(NamedTuple):
    """Rows that are on the disk: `rows` counts those before its end."""

    rows: int
    digest: str


class BlockFile:
    """An array on disk that is filled from its first row on; earlier work on it is kept.

    The blocks of earlier work are compared with their digests. From the first damaged one on, rows
    count as not done.

    Args:
      path: of the `.npy`; next to it, `.blocks.jsonl` has a line for each finished block.
      shape: of the whole array; a file of another shape or type is started over.
      dtype: of its numbers.
      writes: of several processes that fill the same array only one does, and opens it first; the
        others have it in memory.

    Raises:
      OSError: if the disk has no room for the whole array.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: type, *, writes: bool = True):
        self._writes = writes
        self._log = path.with_suffix(_LOG)
        stored = _stored(path, shape, dtype)
        logged = _logged(self._log)
        self._blocks = [] if stored is None else list(_sound(logged, stored))
        if not writes:
            self.array: np.ndarray = np.zeros(shape, dtype)
            if stored is not None:
                self.array[: self.done] = stored[: self.done]
            return
        if len(self._blocks) < len(logged):
            say(f"{path} is damaged: the rows from {self.done:,} on are computed again")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not self._blocks:
            path.unlink(missing_ok=True)
            np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        self._write_log()
        try:
            _reserve(path)
        except OSError:
            if not self._blocks:
                path.unlink()  # it may hold the rest of the disk
            raise
        self.array = np.lib.format.open_memmap(path, mode="r+")

    @property
    def done(self) -> int:
        """The number of rows that are done, from the first on."""
        return self._blocks[-1].rows if self._blocks else 0

    def append(self, rows: np.ndarray) -> None:
        """Adds a block of rows; it is done once it is on the disk."""
        begin, end = self.done, self.done + len(rows)
        self.array[begin:end] = rows
        self._blocks.append(_Block(end, _digest(self.array[begin:end])))
        if self._writes:
            self.array.flush()  # type: ignore[attr-defined] # it is a memmap if it writes
            with self._log.open("a") as log:
                log.write(_as_line(self._blocks[-1]))
                log.flush()
                os.fsync(log.fileno())

    def keep(self, rows: int) -> None:
        """Keeps the blocks of the first rows alone."""
        self._blocks = [block for block in self._blocks if block.rows <= rows]
        if self._writes:
            self._write_log()

    def _write_log(self) -> None:
        write_whole(self._log, "".join(map(_as_line, self._blocks)))


def complete_array(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray | None:
    """The array of a `BlockFile`, mapped to memory and read only, if all its blocks are undamaged.

    The whole file is read once to compare its digests.

    Args:
      path, shape, dtype: as `BlockFile`.

    Returns:
      The array; `None` if it is absent, unfinished, damaged, or of another shape or type.
    """
    stored = _stored(path, shape, dtype)
    blocks = [] if stored is None else list(_sound(_logged(path.with_suffix(_LOG)), stored))
    return stored if blocks and blocks[-1].rows == shape[0] else None


def _stored(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray | None:
    """The array of earlier work, if it is one of this shape and type."""
    try:
        with open_regular(path) as file:
            np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0(file)
            if header != (shape, False, np.dtype(dtype)):
                return None
            return np.memmap(file, dtype, "r", file.tell(), shape)
    except (OSError, ValueError):
        return None


def _logged(path: Path) -> list[dict]:
    try:
        return read_json_lines(path).records
    except (OSError, ValueError):
        return []


def _sound(logged: list[dict], stored: np.ndarray) -> Iterator[_Block]:
    """The blocks that are as they were written, up to the first that is not."""
    begin = 0
    for record in logged:
        end, digest = record.get("rows"), record.get("digest")
        if not isinstance(end, int) or not begin < end <= len(stored):
            return
        if _digest(stored[begin:end]) != digest:
            return
        yield _Block(end, digest)
        begin = end


def _digest(rows: np.ndarray) -> str:
    return digest_of(rows.tobytes())


def _as_line(block: _Block) -> str:
    return json.dumps(block._asdict()) + "\n"


def _reserve(path: Path) -> None:
    """Takes the room for a file, since writing mapped memory to a full disk kills the process."""
    if not hasattr(os, "posix_fallocate"):  # as on macOS
        return
    size = path.stat().st_size
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno in _CANNOT_RESERVE:
            return
        raise OSError(
            error.errno, f"cannot reserve {size:,} bytes ({error.strerror}); make room", str(path)
        ) from error
