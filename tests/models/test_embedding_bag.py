import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.models.embedding_bag import IMPLEMENTATIONS, embedding_bag
from tests.helpers import relative_errors, unit_vectors


@pytest.mark.smoke
def test_a_bag_by_hand():
    table = jnp.array([[0.0, 0.0], [1.0, 2.0], [10.0, 20.0]])
    tokens = jnp.array([[1, 2, 2], [2, 1, 0]])
    weights = jnp.array([[1.0, 0.5, 0.0], [2.0, 3.0, 1.0]])
    wanted = [[1 + 0.5 * 10, 2 + 0.5 * 20], [2 * 10 + 3 * 1, 2 * 20 + 3 * 2]]
    for implementation in IMPLEMENTATIONS:
        bag = embedding_bag(table, tokens, weights, implementation=implementation)
        np.testing.assert_allclose(bag, wanted, err_msg=implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 130)], ids=str)
def test_value_and_gradients_match_the_sum_written_out(implementation, shape, x64):
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(11, 4)))
    tokens = jnp.asarray(rng.integers(0, 11, shape))
    weights = jnp.asarray(rng.uniform(0.5, 2, shape))
    direction = jnp.asarray(rng.normal(size=(shape[0], 4)))

    def written_out(table, weights):
        one_hot = jax.nn.one_hot(tokens, 11, dtype=table.dtype)
        return ((one_hot * weights[..., None]).sum(1) @ table * direction).sum()

    def bagged(table, weights):
        bag = embedding_bag(table, tokens, weights, implementation=implementation)
        return (bag * direction).sum()

    wanted = jax.value_and_grad(written_out, (0, 1))(table, weights)
    found = jax.jit(jax.value_and_grad(bagged, (0, 1)))(table, weights)
    assert max(relative_errors(found, wanted).values()) < 1e-12


def test_several_devices_never_get_the_loop():
    """Its backward would reduce over devices once per token position."""
    assert jax.device_count() == 8
    args = (jnp.ones((5, 2)), jnp.zeros((8, 3), int), jnp.ones((8, 3)))
    program = jax.jit(lambda *a: embedding_bag(*a)).lower(*args).as_text()
    looped = jax.jit(lambda *a: embedding_bag(*a, implementation="loop")).lower(*args).as_text()
    assert "while" not in program
    assert "while" in looped


def test_an_unknown_implementation_lists_the_known():
    with pytest.raises(ValueError, match="'fast' is unknown; use one of gather, loop"):
        embedding_bag(
            jnp.ones((2, 2)), jnp.zeros((1, 1), int), jnp.ones((1, 1)), implementation="fast"
        )


def test_both_have_the_same_second_derivative_in_forward_mode(x64):
    table, weights = unit_vectors(0, 9, 4), jnp.abs(unit_vectors(1, 3, 5))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 9, (3, 5)))

    def second(implementation):
        def value(table, weights):
            bag = embedding_bag(table, tokens, weights, implementation=implementation)
            return (jnp.tanh(bag) ** 2).sum()

        gradient = jax.grad(value, argnums=(0, 1))
        return jax.jvp(gradient, (table, weights), (table[::-1], weights[::-1]))[1]

    assert max(relative_errors(second("loop"), second("gather")).values()) < 1e-10
