"""Evaluation reads only the fields that it needs, and holds few images in memory."""

import hashlib

import numpy as np
import pytest

from jaxcl.data import source_fields
from jaxcl.data.images.decoding import ImageRule
from jaxcl.data.prepare import RunData
from jaxcl.data.sources import InMemoryPairs
from jaxcl.evaluation.check_held_out import check_evaluation
from jaxcl.evaluation.held_out import HeldOutVectors, evaluate_splits
from jaxcl.evaluation.known_positives import content_digest, read_groups, read_numbers
from jaxcl.evaluation.labelled import PARTS, RowValues, read_labelled_rows
from jaxcl.evaluation.pixel_baseline import pixel_scorer, pixel_vectors
from jaxcl.settings.read import read_settings
from tests.data.fields_only import FieldsOnly

ROWS = 600
BLOCK = bytes(2**10)  # 64 of them are read at a time


def large_images() -> list[bytes]:
    """Files of 1 KiB; every second one equals that before it."""
    return [BLOCK + bytes([row // 2 % 256, row // 512]) for row in range(ROWS)]


def rows_with(queries, keys, **columns) -> FieldsOnly:
    names = [f"name_{row}" for row in range(len(queries))]
    return FieldsOnly(InMemoryPairs(queries, keys, metadata={"name": names}, **columns))


@pytest.fixture
def images(monkeypatch):
    monkeypatch.setattr(source_fields, "_BYTES_AT_ONCE", 2**16)
    return large_images()


def test_contents_are_compared_with_few_images_in_memory(images):
    source = rows_with(images, [f"text {row % 300}" for row in range(ROWS)])
    numbers = read_numbers(source)
    np.testing.assert_array_equal(numbers["query"], np.arange(ROWS) // 2 * 2)
    np.testing.assert_array_equal(numbers["key"], np.arange(ROWS) % 300)
    assert source.fields == {"query", "key"}
    assert source.largest <= 64


def test_groups_are_read_without_images(images):
    source = rows_with(images, images, groups=list(range(ROWS)))
    np.testing.assert_array_equal(read_groups(source), np.arange(ROWS))
    assert source.fields == {"group"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", "text a"),
        (b"\x00\xff", "bytes 00ff"),
        (np.arange(3, dtype=np.uint16)[::-1], "array uint16 (3,) 020001000000"),
        (np.uint8(7), "row 5"),
        (bytes(3 * 2**20), f"bytes {'00' * 3 * 2**20}"),
    ],
)
def test_the_digests_of_contents_do_not_change(value, text):
    """The parts of a set of labelled rows depend on them."""
    expected = hashlib.blake2b(text.encode(), digest_size=16).digest()
    assert content_digest(value, 5) == expected


def test_labelled_rows_are_read_without_the_other_side(images):
    groups = [row // 2 % 3 for row in range(ROWS)]
    source = rows_with(images, ["caption"] * ROWS, groups=groups)
    parts = read_labelled_rows(source, None, side="query")
    for part in PARTS:
        for value, label in zip(parts.values[part], parts.labels[part].tolist(), strict=True):
            assert parts.classes[label] == str((value[-2] + 256 * value[-1]) % 3)
    assert source.fields == {"query", "group"}
    assert source.largest <= 64
    assert parts.values["train"][0] == next(iter(parts.values["train"]))


def test_the_baseline_of_pixels_reads_few_images_at_a_time_and_texts_alone(images):
    pictures = list(np.random.default_rng(0).integers(0, 256, (300, 16, 16), np.uint8))
    texts = [f"text {row}" for row in range(300)]
    test, train = rows_with(pictures, texts), rows_with(pictures[:40], texts[:40])
    base = {"data": {"modality": {"query": "image"}}, "model": {"shared": False}}
    data = read_settings(base).data
    for sides in (("query", "key"), ("key", "query")):
        scorer = pixel_scorer(data, {"train": train, "test": test}, "test", sides)
        assert scorer(slice(0, 3)).argmax(1).tolist() == [0, 1, 2]
    assert {names for _, names in [*test.reads, *train.reads]} == {("query",), ("key",)}
    reads = [rows for rows, names in test.reads if names == ("query",)]
    assert max(map(len, reads)) <= 256
    np.testing.assert_array_equal(
        pixel_vectors(RowValues(test, "query", np.arange(20)), ImageRule(8)),
        pixel_vectors(pictures[:20], ImageRule(8)),
    )


def test_texts_of_keys_are_ranked_without_reading_the_queries():
    """The variant with masked names, and the check that keys have words."""
    source = rows_with([b"image"] * 4, ["def a", "def b", "def c", "def d"])
    settings = read_settings(
        {
            "data": {"modality": {"query": "image"}, "metadata_fields": ("name",)},
            "model": {"shared": False},
        }
    )
    eye = np.eye(4, dtype=np.float32)
    vectors = HeldOutVectors(
        lambda split, side: eye, lambda *_: eye, read_groups, lambda _: np.arange(4)
    )
    results, failures = evaluate_splits(settings, vectors, {"test": source})
    assert not failures
    assert results["test", "name masked"]["dense"].ranks.tolist() == [1, 1, 1, 1]
    assert source.fields == {"key", "name"}
    checked = rows_with([b"image"] * 4, ["def a"] * 4)
    check_evaluation(read_settings({}), RunData({"test": checked}, {}, {}))
    assert checked.fields == {"key"}
