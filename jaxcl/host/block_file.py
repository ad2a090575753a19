"""Long results, computed block by block and kept if interrupted: `.npy` files with a log."""

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
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.EINVAL)  # on file systems without reservations


class _Block(NamedTuple):
    """A block that is on disk. `rows` is the number of rows up to its end."""

    rows: int
    digest: str


class BlockFile:
    """An array on disk that is filled block by block and keeps the blocks of earlier runs.

    The earlier blocks are compared with their digests; the first damaged block and all later blocks
    are discarded.

    Args:
      path: the `.npy` file; next to it, `.blocks.jsonl` has a line for each finished block.
      shape: the shape of the whole array; a file of another shape or type is started over.
      dtype: the type of the array's numbers.
      writes: whether this process writes the file. If several processes fill the same array, one
        of them writes, and opens it first; the others keep the array in memory.

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
            say(f"{path} is damaged: recomputing it from row {self.done:,} on")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not self._blocks:
            path.unlink(missing_ok=True)
            np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        self._write_log()
        try:
            _reserve(path)
        except OSError:
            if not self._blocks:
                path.unlink()  # it may fill the rest of the disk
            raise
        self.array = np.lib.format.open_memmap(path, mode="r+")

    @property
    def done(self) -> int:
        """The number of leading rows that are done."""
        return self._blocks[-1].rows if self._blocks else 0

    def append(self, rows: np.ndarray) -> None:
        """Add a block of rows, and return once it is on disk."""
        begin, end = self.done, self.done + len(rows)
        self.array[begin:end] = rows
        self._blocks.append(_Block(end, _digest(self.array[begin:end])))
        if self._writes:
            self.array.flush()  # type: ignore[attr-defined] # a memmap if `writes`
            with self._log.open("a") as log:
                log.write(_as_line(self._blocks[-1]))
                log.flush()
                os.fsync(log.fileno())

    def keep(self, rows: int) -> None:
        """Keep only the blocks that end within the first `rows` rows."""
        self._blocks = [block for block in self._blocks if block.rows <= rows]
        if self._writes:
            self._write_log()

    def _write_log(self) -> None:
        write_whole(self._log, "".join(map(_as_line, self._blocks)))


def complete_array(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray | None:
    """Map the array of a `BlockFile` into memory, read only, if it is complete and undamaged.

    The whole file is read once to compare the digests.

    Args:
      path, shape, dtype: as for `BlockFile`.

    Returns:
      The array; `None` if it is absent, unfinished, damaged, or of another shape or type.
    """
    stored = _stored(path, shape, dtype)
    blocks = [] if stored is None else list(_sound(_logged(path.with_suffix(_LOG)), stored))
    return stored if blocks and blocks[-1].rows == shape[0] else None


def _stored(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray | None:
    """The array on disk, if it has this shape and type."""
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
    """Yield the undamaged blocks, up to the first damaged one."""
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
    """Reserve disk space, since writing mapped memory to a full disk kills the process."""
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
