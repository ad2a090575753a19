"""Text negatives of rows: numbered by text, and checked row by row."""

import numpy as np
import pytest

from jaxcl.data.negative_lists import NegativeTexts, have_negatives, read_negative_lists
from jaxcl.data.sources import InMemoryPairs
from jaxcl.data.splits import ConcatenatedPairs

NEGATIVES = [["wolf", "fox"], [], ["fox", "cat", "fox"], None, ("bear",)]
SCORES = [[3, 1, 2], [5], [4, 1, 0.5, 1], [1.5], np.array([2, -7], np.float32)]


def pairs(negatives=NEGATIVES, scores=None, queries=None):
    size = len(negatives)
    metadata = {"negatives": negatives} | ({} if scores is None else {"teacher_scores": scores})
    queries = [f"query {row}" for row in range(size)] if queries is None else queries
    return InMemoryPairs(queries, [f"key {row}" for row in range(size)], metadata=metadata)


def test_equal_texts_share_a_number():
    lists = read_negative_lists(pairs())
    assert lists.offsets.tolist() == [0, 2, 2, 5, 5, 6]
    assert lists.numbers.tolist() == [0, 1, 1, 2, 1, 3]
    assert lists.first_row.tolist() == [0, 0, 2, 4]
    assert lists.first_place.tolist() == [0, 1, 1, 0]
    assert lists.scores is None


def test_the_distinct_texts_are_a_source_of_keys():
    source = pairs()
    texts = NegativeTexts(source, read_negative_lists(source))
    assert len(texts) == 4
    assert [row["key"] for row in texts.read([3, 0, 2, 0, 1])] == [
        *("bear", "wolf", "cat", "wolf", "fox")
    ]
    assert texts.read([]) == []
    with pytest.raises(IndexError, match="there are 4"):
        texts.read([4])
    others = pairs([["wolf"], [], [], [], []])
    assert texts.fingerprint != NegativeTexts(others, read_negative_lists(others)).fingerprint


def test_a_negative_that_is_a_key_or_a_query_names_the_first_such_row():
    queries = ["cat", "fox", "dog", "fox", "cow"]
    assert read_negative_lists(pairs(queries=queries)).same_row.tolist() == [
        *(-1, 1, 0, -1)  # wolf, fox, cat, bear
    ]
    keys = ["x", "y", "bear", "cat", "bear"]  # keys take precedence over queries
    source = InMemoryPairs(queries, keys, metadata={"negatives": NEGATIVES})
    assert read_negative_lists(source).same_row.tolist() == [-1, 1, 3, 2]


def test_data_sets_share_no_number():
    lists = read_negative_lists(ConcatenatedPairs([pairs([["x", "y"]]), pairs([["y"], ["x"]])]))
    assert lists.numbers.tolist() == [0, 1, 2, 3]
    assert lists.first_row.tolist() == [0, 0, 1, 2]


def test_scores_are_those_of_the_key_and_of_each_negative():
    lists = read_negative_lists(pairs(scores=SCORES))
    assert lists.scores.dtype == np.float32
    assert lists.scores.tolist() == [3, 1, 2, 5, 4, 1, 0.5, 1, 1.5, 2, -7]


def test_a_row_without_scores_has_no_numbers():
    scores = [None, *SCORES[1:]]
    found = read_negative_lists(pairs(scores=scores)).scores
    assert np.isnan(found).tolist() == [True] * 3 + [False] * 8
    found = read_negative_lists(pairs(scores=[*SCORES[:2], None, *SCORES[3:]])).scores
    assert np.isnan(found).tolist() == [False] * 4 + [True] * 4 + [False] * 3


def test_many_rows_are_read_in_parts():
    size = 9_000  # more than two parts
    negatives = [[f"text {row * step % 1_000}" for step in range(row % 4)] for row in range(size)]
    source, done = pairs(negatives), []
    lists = read_negative_lists(source, advance=done.append)
    assert sum(done) == size
    texts = [row["key"] for row in NegativeTexts(source, lists).read(range(len(lists.first_row)))]
    assert len(set(texts)) == len(texts)
    found = [
        [texts[number] for number in lists.numbers[begin:end]]
        for begin, end in zip(lists.offsets, lists.offsets[1:], strict=False)
    ]
    assert found == negatives


def test_rows_without_negatives_give_empty_lists():
    lists = read_negative_lists(pairs([[], None]))
    assert lists.offsets.tolist() == [0, 0, 0]
    assert lists.numbers.size == lists.first_row.size == lists.same_row.size == 0


def test_texts_of_tfds_are_decoded():
    source = pairs([["wölf", "fox"], ["wölf".encode(), b"fox"]])
    lists = read_negative_lists(source)
    assert lists.numbers.tolist() == [0, 1, 0, 1]
    swapped = pairs([[b"fox"], ["fox"]])
    assert NegativeTexts(swapped, read_negative_lists(swapped)).read([0]) == [{"key": "fox"}]


def test_records_without_negatives_may_leave_the_field_out():
    class Sparse(InMemoryPairs):
        def read(self, rows):
            fields = super().read(rows)
            return [{k: v for k, v in row.items() if v is not None} for row in fields]

    source = Sparse(
        ["q"] * 9_000,
        ["k"] * 9_000,
        metadata={"negatives": [None if row % 9 else ["x"] for row in range(1, 9_001)]},
    )
    assert "negatives" not in source.read([0])[0]
    assert have_negatives(source)
    assert read_negative_lists(source).numbers.shape == (1_000,)


def test_the_first_record_of_each_data_set_says_whether_it_has_negatives():
    without = InMemoryPairs(["a"], ["b"])
    assert have_negatives(pairs([[], ["x"]]))
    assert not have_negatives(without)
    assert have_negatives(ConcatenatedPairs([without, pairs([[], ["x"]])]))
    assert not have_negatives(ConcatenatedPairs([without, without]))
    both = read_negative_lists(ConcatenatedPairs([without, pairs([["x"]])]))
    assert both.offsets.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("a text", r"the negatives of row 5 are str, 'a text'; give a list of texts, empty if"),
        (b"bytes", "the negatives of row 5 are bytes"),
        (3, "the negatives of row 5 are int, 3; give a list"),
        ({"text": 1}, "the negatives of row 5 are dict"),
        (["good", 3], "negative 1 of row 5 is int, 3; give a text"),
        (["good", None], "negative 1 of row 5 is NoneType, None; give a text"),
        (["good", ["nested"]], "negative 1 of row 5 is list"),
        ([""], "negative 0 of row 5 is an empty text; leave it out of the list"),
        (["good", " \n"], "negative 1 of row 5 is an empty text"),
        (["\ud800"], "negative 0 of row 5 is not Unicode"),
        ([b"good", b"\xff"], "negative 1 of row 5 is not UTF-8"),
        ([b" "], "negative 0 of row 5 is an empty text"),
    ],
)
def test_wrong_negatives_are_named_by_row(wrong, message):
    with pytest.raises(ValueError, match=message):
        read_negative_lists(pairs([*NEGATIVES, wrong]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([1, 2, 3], "row 5 has 3 teacher_scores and 1 negatives; give 2 scores: the key's, then"),
        ([1], "row 5 has 1 teacher_scores and 1 negatives"),
        ([], "row 5 has 0 teacher_scores"),
        ([1, np.nan], r"the teacher_scores of row 5 are \[1, nan\]; give finite"),
        ([1, -np.inf], "the teacher_scores of row 5 are"),
        ([1, 1e39], "give finite float32 numbers"),
        ([1, "2"], "the teacher_scores of row 5 are"),
        ([1, None], "the teacher_scores of row 5 are"),
        ([True, False], "the teacher_scores of row 5 are"),
        ([[1], [2]], "the teacher_scores of row 5 are"),
        ([1, [2, 3]], "the teacher_scores of row 5 are"),
        (1.0, "the teacher_scores of row 5 are 1.0"),
        ("12", "the teacher_scores of row 5 are '12'"),
    ],
)
def test_wrong_scores_are_named_by_row(wrong, message):
    with pytest.raises(ValueError, match=message):
        read_negative_lists(pairs([*NEGATIVES, ["x"]], [*SCORES, wrong]))


def test_a_long_wrong_value_is_shortened():
    with pytest.raises(ValueError, match=r"'aaa.*\.\.\.; give a list") as caught:
        read_negative_lists(pairs(["a" * 5_000]))
    assert len(str(caught.value)) < 200
