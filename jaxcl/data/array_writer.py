"""Write a one-dimensional `.npy` file in parts, without holding the whole array in memory."""

from pathlib import Path

import numpy as np

__all__ = ["ArrayWriter"]


class ArrayWriter:
    """A `.npy` file that grows as numbers are appended. An empty file is deleted at the end.

    Args:
      path: the file, which must not exist yet.
      dtype: the type of the numbers.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "numbers.npy"
      >>> with ArrayWriter(path, np.int64) as numbers:
      ...     numbers.append(np.array([3, 1]))
      ...     numbers.append(np.array([4]))
      >>> np.load(path).tolist()
      [3, 1, 4]
    """

    def __init__(self, path: Path, dtype: type | str) -> None:
        self._path, self._dtype = path, np.dtype(dtype)
        self._file = path.open("xb")
        self._length = 0
        self._header_bytes = self._write_header()

    def __len__(self) -> int:
        return self._length

    def append(self, values: np.ndarray) -> None:
        """Append numbers, converted to the array's type."""
        self.append_bytes(np.ascontiguousarray(values, self._dtype).tobytes())

    def append_bytes(self, content: bytes) -> None:
        """Append the raw bytes of numbers that have the array's type."""
        self._file.write(content)
        self._length += len(content) // self._dtype.itemsize

    def __enter__(self) -> "ArrayWriter":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if error is not None:
                return
            self._file.seek(0)
            if self._write_header() != self._header_bytes:  # NumPy pads it for any length
                raise ValueError(f"the header of {self._path} has no room for its length")
        if not self._length:  # an empty file cannot be memory-mapped
            self._path.unlink()

    def _write_header(self) -> int:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, header)
        return self._file.tell()
