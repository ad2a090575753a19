"""Vectors of whole numbers, whose products float32 sums exactly in any order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.ops.grid import LENGTH, length_on_grid, on_grid
from tests.helpers import unit_vectors


@pytest.mark.parametrize("dim", [1, 3, 64, 512, 2_048])
def test_no_vector_is_longer_than_the_grid_allows(dim):
    rng = np.random.default_rng(0)
    few = np.zeros((8, dim), np.float32)
    few[:, 0] = 1
    vectors = np.concatenate(
        [
            rng.normal(size=(64, dim)),
            few,  # everything in one feature
            np.ones((1, dim)),  # equal features, the worst case of rounding
            np.full((1, dim), 1e-30),
            1e30 * rng.normal(size=(1, dim)),
            rng.normal(size=(64, dim)) ** 9,  # few features matter
        ]
    )
    found = np.asarray(on_grid(jnp.asarray(vectors, jnp.float32)), np.float64)
    lengths = np.linalg.norm(found, axis=1)
    assert (found == np.round(found)).all()
    assert lengths.max() <= LENGTH
    assert lengths.min() > 0.9 * length_on_grid(dim)


def test_products_are_exact_whichever_way_they_are_summed():
    vectors = on_grid(unit_vectors(0, 300, 200, dtype=jnp.float32))
    whole = np.asarray(vectors, np.int64)
    wanted = whole @ whole.T
    assert np.abs(wanted).max() <= LENGTH**2
    products = jnp.dot(vectors, vectors.T, precision="highest")
    np.testing.assert_array_equal(products, wanted)
    shuffled = vectors[:, np.random.default_rng(0).permutation(200)]
    np.testing.assert_array_equal(
        jax.lax.map(lambda row: (shuffled * row).sum(1), shuffled), wanted
    )
    floats = np.asarray(unit_vectors(0, 300, 200, dtype=jnp.float32))
    assert ((floats @ floats.T) != (floats[:, ::-1].copy() @ floats[:, ::-1].copy().T)).any()


def test_cosines_move_by_little_and_zero_stays():
    vectors = unit_vectors(0, 200, 64, dtype=jnp.float32)
    found = on_grid(vectors) / length_on_grid(64)
    assert np.abs(found @ found.T - vectors @ vectors.T).max() < 0.02
    np.testing.assert_allclose(found @ found.T, vectors @ vectors.T, atol=5e-3)
    np.testing.assert_array_equal(on_grid(jnp.zeros((2, 5))), np.zeros((2, 5)))
