"""Explicit negatives by row number: batches, and errors for wrong files."""

import numpy as np
import pytest

from jaxcl.data.row_negatives import read_negatives
from jaxcl.data.text_rule import TextRule
from jaxcl.data.token_table import TokenTable

ROWS = np.array([[1, 2], [2, -1], [-1, -1]])


def table():
    """Three rows whose keys are [1], [2, 2] and [3, 3, 3]."""
    return TokenTable(
        tokens={"query": np.array([9, 9, 9]), "key": np.array([1, 2, 2, 3, 3, 3])},
        offsets={"query": np.array([0, 1, 2, 3]), "key": np.array([0, 1, 3, 6])},
        group=np.array([5, 6, 7], np.int32),
        text=np.array([0, 1, 1], np.int32),
        rules={"query": TextRule(1), "key": TextRule(3)},
    )


def spoilt(value):
    """Scores with this value in row 1."""
    scores = np.ones((3, 3))
    scores[1, 2] = value
    return scores


def written(path, **arrays):
    np.savez(path / "negatives.npz", **arrays)
    return path / "negatives.npz"


def test_a_batch_holds_the_keys_that_its_rows_name(tmp_path):
    negatives = read_negatives(written(tmp_path, rows=ROWS), num_rows=3, scored=False)
    found = negatives.columns(table(), np.array([1, 0]))["negatives"]
    assert found["inputs"]["tokens"].tolist() == [
        [[3, 3, 3], [1, 0, 0]],  # row 1 has one negative; the padding is not valid
        [[2, 2, 0], [3, 3, 3]],
    ]
    assert found["valid"].tolist() == [[True, False], [True, True]]
    assert found["row"][found["valid"]].tolist() == [2, 1, 2]
    assert found["group"][found["valid"]].tolist() == [7, 6, 7]
    assert found["text"][found["valid"]].tolist() == [1, 1, 1]


def test_scores_go_with_their_rows_if_they_are_wanted(tmp_path):
    scores = np.arange(9.0).reshape(3, 3)
    path = written(tmp_path, rows=ROWS, teacher_scores=scores)
    columns = read_negatives(path, num_rows=3, scored=True).columns(table(), np.array([2, 0]))
    assert columns["teacher_scores"].tolist() == [[6, 7, 8], [0, 1, 2]]
    assert columns["teacher_scores"].dtype == np.float32
    unscored = read_negatives(path, num_rows=3, scored=False).columns(table(), np.array([0]))
    assert set(unscored) == {"negatives"}


def test_other_negatives_have_another_fingerprint(tmp_path):
    found = {
        read_negatives(written(tmp_path, rows=rows), num_rows=3, scored=False).fingerprint
        for rows in (ROWS, ROWS, ROWS[:, ::-1])
    }
    assert len(found) == 2


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"row": ROWS}, "has no rows, teacher_scores; it has row"),
        ({"rows": ROWS}, "has no teacher_scores; it has rows"),
        ({"rows": ROWS * 1.0, "teacher_scores": np.ones((3, 3))}, "use integers"),
        ({"rows": ROWS[:, 0], "teacher_scores": np.ones((3, 3))}, "use integers"),
        ({"rows": ROWS[:2], "teacher_scores": np.ones((2, 3))}, r"use integers of shape \[3, at l"),
        ({"rows": ROWS + 1, "teacher_scores": np.ones((3, 3))}, r"rows has \[2 3\] in row 0; use "),
        ({"rows": ROWS - 1, "teacher_scores": np.ones((3, 3))}, r"rows has \[ 1 -2\] in row 1; "),
        ({"rows": ROWS + 2**32, "teacher_scores": np.ones((3, 3))}, "rows has .* in row 0"),
        ({"rows": ROWS[:, :0], "teacher_scores": np.ones((3, 1))}, "at least 1"),
        (
            {"rows": ROWS, "teacher_scores": spoilt(np.nan)},
            "scores has .* in row 1; use finite",
        ),
        (
            {"rows": ROWS, "teacher_scores": spoilt(np.inf)},
            "scores has .* in row 1; use finite",
        ),
        (
            {"rows": ROWS, "teacher_scores": spoilt(1e39)},
            "scores has .* in row 1; use finite",
        ),
        ({"rows": ROWS, "teacher_scores": np.full((3, 3), 1j)}, "use numbers"),
        ({"rows": ROWS, "teacher_scores": np.ones(3)}, r"use numbers of shape \[3, at least 1\]"),
        ({"rows": ROWS, "teacher_scores": np.array([["1"] * 3] * 3)}, "use numbers"),
        (
            {"rows": ROWS, "teacher_scores": np.ones((3, 2))},
            "the key's score, then each negative's",
        ),
    ],
)
def test_a_wrong_file_is_an_error_that_names_the_problem(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_negatives(written(tmp_path, **arrays), num_rows=3, scored=True)
    assert str(caught.value).startswith(f"data.negatives={tmp_path / 'negatives.npz'}")


@pytest.mark.parametrize("content", [None, b"", b"no archive"])
def test_a_missing_or_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "negatives.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"data\.negatives=.*negatives\.npz cannot be read"):
        read_negatives(path, num_rows=3, scored=False)
