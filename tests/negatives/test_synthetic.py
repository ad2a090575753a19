"""Synthetic negatives: their sources, their norms and their angles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.negatives.synthetic import mixed, mixed_with_query, perturbed
from tests.helpers import unit_vectors

pytestmark = pytest.mark.usefixtures("x64")

KEYS = 3


def hardest():
    """Candidates of three queries: four valid, two valid, none."""
    valid = jnp.arange(4) < jnp.array([4, 2, 0])[:, None]
    return unit_vectors(0, KEYS, 4, 6), valid


def keys_of(seed=0):
    return jax.random.split(jax.random.key(seed), KEYS)


def in_span(vector, basis):
    weights, *_ = np.linalg.lstsq(np.asarray(basis).T, np.asarray(vector), rcond=None)
    assert np.abs(np.asarray(basis).T @ weights - vector).max() < 1e-6
    return weights


@pytest.mark.parametrize("kind", ["mixed", "mixed_with_query", "perturbed"])
def test_synthetic_negatives_have_unit_norm_and_need_a_negative(kind):
    vectors, valid = hardest()
    queries = unit_vectors(1, KEYS, 6)
    made, there = {
        "mixed": lambda: mixed(keys_of(), vectors, valid, count=50),
        "mixed_with_query": lambda: mixed_with_query(keys_of(), queries, vectors, valid, count=50),
        "perturbed": lambda: perturbed(keys_of(), vectors, valid, count=50, degrees=30.0),
    }[kind]()
    assert made.shape == (KEYS, 50, 6)
    assert there.all(1).tolist() == [True, True, False]
    np.testing.assert_allclose(jnp.linalg.norm(made, axis=2), 1, atol=1e-6)
    assert len(np.unique(np.asarray(made[0]).round(6), axis=0)) == 50


def test_mixtures_lie_between_two_of_the_valid():
    vectors, valid = hardest()
    made, _ = mixed(keys_of(), vectors, valid, count=200)
    pairs = set()
    for vector in np.asarray(made[1]):
        weights = in_span(vector, vectors[1, :2])
        assert (weights >= -1e-9).all()
    for vector in np.asarray(made[0]):
        weights = in_span(vector, vectors[0])
        pairs.add(tuple(np.flatnonzero(weights > 1e-9)))
    assert len(pairs) == 6  # each with each other
    assert {len(pair) for pair in pairs} == {2}


def test_the_query_is_the_smaller_part_of_a_mixture():
    vectors, valid = hardest()
    queries = unit_vectors(1, KEYS, 6)
    made, _ = mixed_with_query(keys_of(), queries, vectors, valid, count=200)
    for row in range(2):
        shares = []
        for vector in np.asarray(made[row]):
            weights = in_span(vector, np.vstack([queries[row], vectors[row]]))
            shares.append(weights[0] / weights.sum())
        assert 0 <= min(shares) < 0.02
        assert 0.48 < max(shares) < 0.5


@pytest.mark.parametrize("degrees", [0.0, 15.0, 90.0])
def test_perturbed_negatives_have_the_requested_angle_in_any_direction(degrees):
    vectors, valid = hardest()
    made, _ = perturbed(keys_of(), vectors, valid, count=400, degrees=degrees)
    cosines = jnp.einsum("qnd,qmd->qnm", made, vectors)[0]
    found = np.abs(np.rad2deg(np.arccos(np.clip(cosines, -1, 1))) - degrees).min(1)
    assert found.max() < 1e-4
    if degrees:
        closest = np.asarray(vectors[0])[
            np.abs(np.asarray(cosines) - np.cos(np.deg2rad(degrees))).argmin(1)
        ]
        across = np.asarray(made[0]) - np.cos(np.deg2rad(degrees)) * closest
        across /= np.sin(np.deg2rad(degrees))
        assert np.linalg.norm(across.mean(0)) < 0.15  # 400 unit vectors without a direction


def test_gradients_flow_to_the_sources_of_synthetic_negatives():
    vectors, valid = hardest()
    queries = unit_vectors(1, KEYS, 6)

    def total(queries, vectors):
        made, _ = mixed_with_query(keys_of(), queries, vectors, valid, count=3)
        return (made * jnp.arange(6)).sum()

    to_queries, to_vectors = jax.grad(total, (0, 1))(queries, vectors)
    assert jnp.abs(to_queries[:2]).sum() > 0.1
    assert jnp.abs(to_vectors[:2]).sum() > 0.1
    assert not to_vectors[1, 2:].any()
