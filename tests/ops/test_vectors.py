"""Norms and inner products, in every floating-point type."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.ops.pairs import pair_logsumexp
from jaxcl.ops.vectors import normalise
from tests.helpers import unit_vectors

HALVES = (jnp.float16, jnp.bfloat16)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("element", "unit"), [(0.0, 0.0), (300.0, 1 / 2), (1e-4, 1 / 2)])
def test_norms_of_half_precision_vectors_are_computed_in_float32(dtype, element, unit):
    vectors = jnp.full((1, 4), element, dtype)
    assert normalise(vectors).dtype == dtype
    np.testing.assert_allclose(normalise(vectors).astype(np.float32), np.full((1, 4), unit), 1e-3)


def test_float32_vectors_are_normalised_by_the_formula():
    vectors = 3 * unit_vectors(0, 5, 8, dtype=jnp.float32)
    squares = (vectors * vectors).sum(-1, keepdims=True)
    np.testing.assert_array_equal(normalise(vectors), vectors * jax.lax.rsqrt(squares + 1e-12))


def test_a_temperature_in_half_precision_has_a_finite_inverse():
    queries, keys = (unit_vectors(seed, 3, 8, dtype=jnp.float32) for seed in (0, 1))
    low = jnp.float16(1e-5)  # float16 ends at 65,504
    rows, _ = pair_logsumexp(queries, keys, temperature=low)
    expected, _ = pair_logsumexp(queries, keys, temperature=float(low))
    np.testing.assert_allclose(rows, expected, rtol=1e-6)
