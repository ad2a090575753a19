"""Rows are read in batches whose size follows the bytes of their values."""

import numpy as np
import pytest

from jaxcl.data import source_fields
from jaxcl.data.source_fields import iterate_fields
from jaxcl.data.sources import InMemoryPairs
from tests.data.fields_only import FieldsOnly


def batches_of(queries) -> list[int]:
    """The numbers of rows that are read at a time."""
    source = FieldsOnly(InMemoryPairs(queries, range(len(queries))))
    records = list(iterate_fields(source, np.arange(len(queries))[::-1], ("query", "key")))
    assert [record["key"] for record in records] == list(range(len(queries)))[::-1]
    return [len(rows) for rows, _ in source.reads]


def test_batches_of_texts_grow():
    sizes = batches_of(["a text"] * 10_000)
    assert sizes[:3] == [16, 32, 64]
    assert max(sizes) == 4096


@pytest.fixture
def little_memory(monkeypatch):
    monkeypatch.setattr(source_fields, "_BYTES_AT_ONCE", 2**13)


@pytest.mark.usefixtures("little_memory")
def test_batches_of_large_files_stay_small():
    image = bytes(2**10)  # 8 of them are read at a time
    assert batches_of([image] * 100) == [16, *[8] * 10, 4]


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("value", [bytes(2**14), np.zeros(2**13, np.uint16)])
def test_a_file_that_is_larger_than_a_batch_is_read_alone(value):
    assert batches_of([value] * 18) == [16, 1, 1]


def test_only_the_wanted_fields_are_read():
    source = FieldsOnly(InMemoryPairs([b"image"] * 3, ["a", "b", "c"], groups=[1, 2, 3]))
    assert list(iterate_fields(source, range(3), ("key",))) == [{"key": k} for k in "abc"]
    assert [names for _, names in source.reads] == [("key",)]
    assert list(iterate_fields(source, range(0), ("key",))) == []


def test_a_source_that_returns_too_few_rows_is_an_error():
    class Short(InMemoryPairs):
        def read(self, rows):
            return super().read(rows)[1:]

    with pytest.raises(ValueError, match="returned 2 records for 3 rows"):
        list(iterate_fields(Short(["a", "b", "c"], ["k"] * 3), range(3), ("key",)))
