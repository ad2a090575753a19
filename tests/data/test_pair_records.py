"""Records of every form become checked pairs, or errors that name the problem."""

import json
import math

import pytest

from jaxcl.data.pair_columns import PairColumns
from jaxcl.data.pair_records import BadRow, read_pair

PLAIN = PairColumns("q", "k", "q")
FULL = PLAIN._replace(negatives=("n",), scores=("s",))


def test_texts_become_bytes_and_a_list_has_several_positives():
    assert read_pair({"q": "ä", "k": "b"}, PLAIN)[:2] == ("ä".encode(), [b"b"])
    assert read_pair({"q": "a", "k": ["b", "c"]}, PLAIN).positives == [b"b", b"c"]


def test_negatives_may_be_ragged_and_missing_columns_are_left_out():
    several = PLAIN._replace(negatives=("n1", "n2", "n3"))
    record = {"q": "a", "k": "b", "n1": "x", "n2": "", "n3": None}
    assert read_pair(record, several).negatives == [b"x"]
    assert read_pair({"q": "a", "k": "b"}, several).negatives == []
    assert (
        read_pair({"q": "a", "k": "b", "n": []}, PLAIN._replace(negatives=("n",))).negatives == []
    )


@pytest.mark.parametrize(
    ("columns", "scores"),
    [
        (("s",), {"s": {"positives": [0.5, 1], "negatives": [0.25]}}),
        (("s",), {"s": [0.5, 1, 0.25]}),
        (("p", "n_s"), {"p": [0.5, 1], "n_s": 0.25}),
    ],
)
def test_scores_of_every_form_belong_to_their_texts(columns, scores):
    record = {"q": "a", "k": ["b", "c"], "n": ["d"], **scores}
    pair = read_pair(record, FULL._replace(scores=columns))
    assert (pair.positive_scores, pair.negative_scores) == ([0.5, 1.0], [0.25])


def test_labels_groups_and_metadata_are_kept():
    columns = PLAIN._replace(label="l", group="g", metadata=("m", "z"), split_by="g")
    pair = read_pair({"q": "a", "k": "b", "l": "4.5", "g": "x", "m": [1]}, columns)
    assert (pair.label, pair.group, pair.split_by) == (4.5, "x", b"x")
    assert json.loads(pair.metadata) == [[1], None]
    assert read_pair({"q": "a", "k": "b"}, PLAIN._replace(split_by="k")).split_by == b"b"


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"k": "b"}, "there is no 'q'"),
        ({"q": None, "k": "b"}, "there is no 'q'"),
        ({"q": 3, "k": "b"}, "'q' is 3, which is not a text"),
        ({"q": " \n", "k": "b"}, "'q' is empty"),
        ({"q": "a", "k": ""}, "'k' is empty"),
        ({"q": "a", "k": []}, "'k' is an empty list"),
        ({"q": "a", "k": ["b", None]}, "there is no 'k'"),
        ({"q": "a", "k": {"b": 1}}, "which is not a text"),
        ({"q": "\udcff", "k": "b"}, "'q' is not UTF-8"),
        ({"q": "a", "k": "b", "n": ["c", ""], "s": [1, 1, 1]}, "'n' is empty"),
        (
            {"q": "a", "k": "b", "n": "c", "s": [1]},
            "1 and 0 scores for 1 positives and 1 negatives",
        ),
        ({"q": "a", "k": "b", "n": "c", "s": [1, 2, 3]}, "1 and 2 scores for 1 positives and 1"),
        ({"q": "a", "k": "b", "n": "c"}, "there is no 's'"),
        ({"q": "a", "k": "b", "n": "c", "s": [1, math.nan]}, "not a finite number"),
        ({"q": "a", "k": "b", "n": "c", "s": [1, "x"]}, "'s' is 'x', which is not a finite number"),
        ({"q": "a", "k": "b", "n": "c", "s": [1, 1e39]}, "not a finite number"),
        ({"q": "a", "k": "b", "n": "c", "s": [1, 10**400]}, "not a finite number"),
    ],
)
def test_an_unusable_record_is_an_error_with_the_reason(record, problem):
    with pytest.raises(BadRow, match=problem):
        read_pair(record, FULL)


@pytest.mark.parametrize(
    ("group", "problem"),
    [(2**31, "does not fit into int32"), (1.5, "neither an integer nor a text"), ("", "no 'g'")],
)
def test_a_group_is_an_integer_or_a_text(group, problem):
    with pytest.raises(BadRow, match=problem):
        read_pair({"q": "a", "k": "b", "g": group}, PLAIN._replace(group="g"))
