"""Write a one-dimensional `.npy` file part by part, so that it never lies in memory whole."""

from pathlib import Path

import numpy as np

__all__ = ["ArrayWriter"]


class ArrayWriter:
    """An `.npy` file that grows; at the end an array without numbers leaves no file.

    Args:
      path: the file, which must not exist.
      dtype: of the numbers.

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
        self._begin = self._write_header()

    def __len__(self) -> int:
        return self._length

    def append(self, values: np.ndarray) -> None:
        """Write further numbers, converted to the array's type."""
        self.append_bytes(np.ascontiguousarray(values, self._dtype).tobytes())

    def append_bytes(self, content: bytes) -> None:
        """Write further numbers as they lie in memory."""
        self._file.write(content)
        self._length += len(content) // self._dtype.itemsize

    def __enter__(self) -> "ArrayWriter":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if error is not None:
                return
            self._file.seek(0)
            if self._write_header() != self._begin:  # NumPy leaves room for any length
                raise ValueError(f"the header of {self._path} does not fit its length")
        if not self._length:  # such a file could not be mapped to memory
            self._path.unlink()

    def _write_header(self) -> int:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, header)
        return self._file.tell()
