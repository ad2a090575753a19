"""Write files of vectors block by block, as `.npy` or Parquet; a file is complete or absent."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import numpy as np

from jaxcl.host.files import replacing
from jaxcl.host.paths import AnyPath

__all__ = ["VECTOR_FILES", "write_vectors"]

COLUMN = "embedding"
"""The column of the vectors in Parquet."""

WriteBlock = Callable[[np.ndarray], None]


@contextlib.contextmanager
def write_vectors(path: AnyPath, *, width: int, dtype: np.dtype) -> Iterator[WriteBlock]:
    """Write a file of vectors.

    Args:
      path: the file, with a suffix of `VECTOR_FILES`. Parquet files hold the vectors as fixed-size
        lists in the column `embedding`.
      width: the number of dimensions.
      dtype: the type of the values.

    Yields:
      A function that appends vectors `[n, width]`. The file appears when the context ends.

    Raises:
      ValueError: if the suffix is unknown.
      OSError: if the file cannot be written.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp(), "vectors.npy")
      >>> with write_vectors(path, width=2, dtype=np.dtype("f4")) as write:
      ...     write(np.ones((3, 2), np.float32))
      >>> np.load(path).shape
      (3, 2)
    """
    if path.suffix not in VECTOR_FILES:
        raise ValueError(f"{path} has an unknown suffix; give {' or '.join(VECTOR_FILES)}")
    with replacing(path) as file, VECTOR_FILES[path.suffix](file, width, dtype) as write:
        yield write


@contextlib.contextmanager
def _npy(file: IO[bytes], width: int, dtype: np.dtype) -> Iterator[WriteBlock]:
    num_rows = 0

    def write_header() -> None:
        shape = (num_rows, width)
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(file, {**header, "shape": shape})

    def write(vectors: np.ndarray) -> None:
        nonlocal num_rows
        file.write(np.ascontiguousarray(vectors, dtype).data)
        num_rows += len(vectors)

    write_header()
    yield write
    file.seek(0)
    write_header()  # NumPy pads the header, so its size does not change


@contextlib.contextmanager
def _parquet(file: IO[bytes], width: int, dtype: np.dtype) -> Iterator[WriteBlock]:
    import pyarrow
    from pyarrow import parquet

    kind = pyarrow.list_(pyarrow.from_numpy_dtype(dtype), width)

    def write(vectors: np.ndarray) -> None:
        values = pyarrow.array(np.ascontiguousarray(vectors, dtype).reshape(-1))
        column = pyarrow.FixedSizeListArray.from_arrays(values, type=kind)
        writer.write_table(pyarrow.table({COLUMN: column}))

    with parquet.ParquetWriter(file, pyarrow.schema({COLUMN: kind})) as writer:
        yield write


VECTOR_FILES: Mapping[str, Any] = {".npy": _npy, ".parquet": _parquet}
"""Suffix -> a context manager `(file, width, dtype)` that yields a function to append vectors."""
