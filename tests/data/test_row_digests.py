"""Digests are equal for equal content, and numbers follow the order of first appearance."""

import numpy as np
import pytest

from jaxcl.data import row_digests
from jaxcl.data.row_digests import (
    as_digests,
    input_digests,
    number_digests,
    text_digest,
)
from jaxcl.data.text_rule import TextRule
from jaxcl.data.token_table import TokenTable


def table():
    """Four rows; the keys of rows 0 and 3 are equal, and row 1's begins like row 2's."""
    return TokenTable(
        tokens={"query": np.arange(4), "key": np.array([7, 8, 9, 9, 9, 7, 8])},
        offsets={"query": np.arange(5), "key": np.array([0, 2, 3, 5, 7])},
        group=np.zeros(4, np.int32),
        text=np.arange(4, dtype=np.int32),
        rules={"query": TextRule(1), "key": TextRule(3, special_tokens=True)},
    )


def test_inputs_have_equal_digests_if_all_their_arrays_are_equal():
    rows_done = []
    digests = input_digests(table(), "key", advance=rows_done.append)
    assert sum(rows_done) == 4
    numbers, firsts = number_digests(digests)
    assert numbers.tolist() == [0, 1, 2, 0]
    assert firsts.tolist() == [0, 1, 2]


@pytest.mark.parametrize("size", [1, 2, 1_000])
@pytest.mark.parametrize("at_once", [1_000_000, 100])
def test_numbers_equal_those_of_a_dictionary(size, at_once, monkeypatch):
    monkeypatch.setattr(row_digests, "_COMPARED_AT_ONCE", at_once)
    texts = [f"text {number}" for number in np.random.default_rng(size).integers(0, 300, size)]
    places = {}
    wanted = [places.setdefault(text, len(places)) for text in texts]
    numbers, firsts = number_digests(as_digests(b"".join(map(text_digest, texts))))
    assert numbers.tolist() == wanted
    assert firsts.tolist() == [texts.index(text) for text in places]


def test_digests_that_agree_in_one_half_are_different():
    numbers, _ = number_digests(np.array([[1, 2], [1, 3], [4, 2], [1, 2]], np.uint64))
    assert numbers.tolist() == [0, 1, 2, 0]


def test_no_digests_have_no_numbers():
    numbers, firsts = number_digests(as_digests(b""))
    assert numbers.shape == firsts.shape == (0,)
