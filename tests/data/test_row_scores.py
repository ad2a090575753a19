"""Scores by row number, read once, and errors for rows without them."""

import numpy as np
import pytest

from jaxcl.data import row_scores
from jaxcl.data.row_scores import open_scores
from jaxcl.data.sources import InMemoryPairs


def source(scores):
    texts = [f"text {row}" for row in range(len(scores))]
    return InMemoryPairs(texts, texts, metadata={"score": scores})


def test_scores_are_read_block_by_block(tmp_path, monkeypatch):
    monkeypatch.setattr(row_scores, "_ROWS_AT_ONCE", 4)
    given = [row / 2 for row in range(9)]
    scores = open_scores(source(given), data_dir=tmp_path)
    assert scores.scores.dtype == np.float32
    assert scores.scores.tolist() == given
    assert scores.columns(np.array([8, 0, 8]))["score"].tolist() == [4.0, 0.0, 4.0]


def test_integers_and_booleans_are_scores(tmp_path):
    given = [True, 3, np.int64(4), np.float32(0.5)]
    assert open_scores(source(given), data_dir=tmp_path).scores.tolist() == [1.0, 3.0, 4.0, 0.5]


def test_scores_are_read_once_for_equal_rows(tmp_path, monkeypatch):
    pairs = source([1.0, 2.0])
    open_scores(pairs, data_dir=tmp_path)
    monkeypatch.setattr(InMemoryPairs, "read", lambda self, rows: pytest.fail("read again"))
    assert open_scores(pairs, data_dir=tmp_path).scores.tolist() == [1.0, 2.0]
    with pytest.raises(pytest.fail.Exception, match="read again"):
        open_scores(source([1.0, 3.0]), data_dir=tmp_path)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0, None], "row 1 of the training rows has no score; give each row a number"),
        (["2", 1.0], "row 0 of the training rows has the score '2'; give each row a number"),
        ([1.0, 2.0, float("nan")], r"the training rows: score has nan in row 2; use finite float3"),
        ([1e39, 2.0], r"the training rows: score has inf in row 0; use finite float32"),
    ],
)
def test_a_row_without_a_finite_score_is_named(tmp_path, scores, message):
    with pytest.raises(ValueError, match=message):
        open_scores(source(scores), data_dir=tmp_path)
