"""Files of vectors, written block by block."""

import numpy as np
import pytest
from pyarrow import parquet

from jaxcl.data.vector_files import VECTOR_FILES, write_vectors

TYPES = ("float32", "int8", "uint8")


def read_vectors(path):
    if path.suffix == ".npy":
        return np.load(path)
    column = parquet.read_table(path)["embedding"].combine_chunks()
    return column.values.to_numpy().reshape(len(column), column.type.list_size)


@pytest.mark.parametrize("kind", VECTOR_FILES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("sizes", [[], [0], [3], [3, 1, 4]])
def test_blocks_are_written_in_order(tmp_path, kind, dtype, sizes):
    path, rng = tmp_path / f"vectors{kind}", np.random.default_rng(0)
    blocks = [rng.integers(0, 100, (size, 5)).astype(dtype) for size in sizes]
    with write_vectors(path, width=5, dtype=np.dtype(dtype)) as write:
        for block in blocks:
            write(block)
    found = read_vectors(path)
    np.testing.assert_array_equal(found, np.concatenate([np.zeros((0, 5)), *blocks]))
    assert (found.dtype, found.shape) == (dtype, (sum(sizes), 5))


@pytest.mark.parametrize("kind", VECTOR_FILES)
def test_an_unfinished_file_does_not_appear(tmp_path, kind):
    def fail():
        with write_vectors(tmp_path / f"a{kind}", width=2, dtype=np.dtype("f4")) as write:
            write(np.ones((3, 2), np.float32))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_suffix_is_an_error(tmp_path):
    with (
        pytest.raises(ValueError, match=r"a\.csv has an unknown suffix; give \.npy or \.parquet"),
        write_vectors(tmp_path / "a.csv", width=2, dtype=np.dtype("f4")),
    ):
        pass
