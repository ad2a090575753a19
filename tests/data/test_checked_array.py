"""Arrays on disk, copied to memory and verified, so that later damage does not matter."""

import numpy as np
import pytest

from jaxcl.data import checked_array
from jaxcl.data.checked_array import CheckedArray, DamagedArray, array_record

HEADER = 128
NUMBERS = np.arange(7, 30, dtype=np.int64)


@pytest.fixture(params=[HEADER + 16, 2**20], ids=["several chunks", "one chunk"])
def path(request, tmp_path, monkeypatch):
    monkeypatch.setattr(checked_array, "_CHUNK_BYTES", request.param)
    np.save(tmp_path / "numbers.npy", NUMBERS)
    return tmp_path / "numbers.npy"


def test_a_copy_holds_all_numbers_and_survives_the_file(path):
    copied = CheckedArray(path, array_record(path)).copy()
    path.write_bytes(bytes(path.stat().st_size))
    np.testing.assert_array_equal(copied, NUMBERS)
    assert copied.dtype == NUMBERS.dtype
    assert copied.flags.writeable


@pytest.mark.parametrize("place", [HEADER, HEADER + 17, -1])
def test_a_damaged_file_is_not_copied(path, place):
    array = CheckedArray(path, array_record(path))
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedArray, match=r"numbers\.npy has changed since it was written"):
        array.copy()


def test_numbers_out_of_range_are_not_copied(path):
    record = array_record(path)
    np.testing.assert_array_equal(CheckedArray(path, record, below=30).copy(), NUMBERS)
    with pytest.raises(DamagedArray, match=r"has numbers that are not below 29"):
        CheckedArray(path, record, below=29).copy()
