"""Long results that are computed block by block and survive a stop: `.npy` files with a counter."""

import json
from pathlib import Path

import numpy as np

from jaxcl.host.files import write_whole

__all__ = ["BlockFile"]


class BlockFile:
    """An array on disk that is filled from its first row on; what was done before is kept.

    Args:
      path: of the `.npy`; beside it, `.done.json` counts the rows that are whole.
      shape: of the whole array; a file of another shape or type is begun anew.
      dtype: of its numbers.
      writes: of several processes that fill the same array only one does, and opens it first; the
        others have it in memory.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: type, *, writes: bool = True):
        self._writes = writes
        self._counter = path.with_suffix(".done.json")
        self.done = self._done_before(path, shape, dtype)
        if not writes:
            self.array: np.ndarray = np.zeros(shape, dtype)
            if self.done:
                self.array[: self.done] = np.load(path, mmap_mode="r")[: self.done]
            return
        mode = "r+" if self.done else "w+"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not self.done:
            self._counter.unlink(missing_ok=True)
        self.array = np.lib.format.open_memmap(
            path, mode=mode, dtype=dtype, shape=None if self.done else shape
        )

    def append(self, rows: np.ndarray) -> None:
        """Puts rows behind those that are done; they count once they are on the disk."""
        self.array[self.done : self.done + len(rows)] = rows
        self.done += len(rows)
        if not self._writes:
            return
        self.array.flush()  # type: ignore[attr-defined] # it is a memmap if it writes
        write_whole(self._counter, json.dumps({"rows": self.done}))

    def _done_before(self, path: Path, shape: tuple[int, ...], dtype: type) -> int:
        try:
            done = int(json.loads(self._counter.read_text())["rows"])
            there = np.load(path, mmap_mode="r")
        except (OSError, ValueError, KeyError, TypeError, EOFError):
            return 0
        fits = there.shape == shape and there.dtype == np.dtype(dtype) and 0 <= done <= len(there)
        return done if fits else 0
