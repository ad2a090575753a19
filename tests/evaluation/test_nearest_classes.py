"""k-nearest-neighbour classification against its equation."""

from math import exp

import numpy as np
import pytest

from jaxcl.evaluation.nearest_classes import neighbour_votes
from jaxcl.metrics import rank_of_key


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_votes_are_the_weights_of_the_nearest_rows():
    keys = np.array([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [-1.0, 0.0]], np.float32)
    votes = neighbour_votes(
        np.array([[1.0, 0.0]], np.float32),
        keys,
        np.array([1, 0, 0, 2]),
        num_classes=3,
        neighbours=(1, 3, 4),
        temperature=0.07,
    )
    weight = {cosine: exp((cosine - 1) / 0.07) for cosine in (1, 0.8, 0.6, -1)}
    np.testing.assert_allclose(votes[1], [[0, weight[1], 0]], rtol=1e-5)
    np.testing.assert_allclose(votes[3], [[weight[0.8] + weight[0.6], weight[1], 0]], rtol=1e-5)
    np.testing.assert_allclose(
        votes[4], [[weight[0.8] + weight[0.6], weight[1], weight[-1]]], rtol=1e-5
    )


@pytest.mark.parametrize("tile", [1, 2, 7, 8, 100])
def test_votes_equal_a_plain_loop_for_any_tile(tile):
    rng = np.random.default_rng(0)
    queries, keys = (unit(rng.normal(size=(size, 5))) for size in (7, 31))
    labels = rng.integers(4, size=31)
    found = neighbour_votes(queries, keys, labels, num_classes=5, neighbours=(3, 31), tile=tile)
    for k, votes in found.items():
        expected = np.zeros((7, 5))
        for i, query in enumerate(queries):
            for j in np.argsort(-keys @ query)[:k]:
                expected[i, labels[j]] += exp((keys[j] @ query - 1) / 0.07)
        np.testing.assert_allclose(votes, expected, rtol=1e-4)
    assert not np.allclose(found[3], found[31])


def test_all_rows_vote_if_there_are_fewer_than_k():
    keys = np.eye(3)
    votes = neighbour_votes(keys[:1], keys, np.arange(3), num_classes=3, neighbours=(3, 200))
    np.testing.assert_array_equal(votes[3], votes[200])


def test_a_collapsed_model_is_not_better_than_chance():
    """Equal votes of two classes are an error, whichever of them is right."""
    keys = np.ones((6, 1))
    labels = np.array([0, 1, 2, 0, 1, 2])
    votes = neighbour_votes(keys, keys, labels, num_classes=3, neighbours=(6,))[6]
    assert (rank_of_key(votes, labels) == 2).all()


def test_invalid_arguments_are_named():
    keys = np.eye(2)
    with pytest.raises(ValueError, match="there are no labelled rows"):
        neighbour_votes(keys, keys[:0], np.zeros(0, int), num_classes=2)
    with pytest.raises(ValueError, match="from 0 to 2, but there are 2 classes"):
        neighbour_votes(keys, keys, np.array([0, 2]), num_classes=2)
    for options in ({"neighbours": ()}, {"neighbours": (0,)}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="at least one neighbour and a positive temperature"):
            neighbour_votes(keys, keys, np.array([0, 1]), num_classes=2, **options)
