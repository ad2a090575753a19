"""Layers that encoders share: linear layers, activations, and dropout by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxcl.models.layers import linear_layer, row_dropout, saving_slope
from jaxcl.models.lora import LoraLinear
from jaxcl.models.pretrained.activations import ACTIVATIONS
from tests.helpers import relative_error, relative_errors

SHAPE = (3, 4, 5)


def inputs_of(*shape, seed=0, dtype=np.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def gradients_of(layer, inputs):
    """The output of a layer, and the gradients of its parameters and inputs."""
    graph, params = nnx.split(layer)

    def total(params, inputs):
        outputs = nnx.merge(graph, params)(inputs)
        return (outputs * jnp.cos(jnp.arange(outputs.size)).reshape(outputs.shape)).sum(), outputs

    function = jax.grad(total, (0, 1), has_aux=True)
    return function(params, inputs), str(jax.make_jaxpr(function)(params, inputs))


def pairs_of_layers():
    options = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    ours = linear_layer(5, 7, rngs=nnx.Rngs(1), **options)
    theirs = nnx.Linear(5, 7, rngs=nnx.Rngs(1), **options)
    yield ours, theirs
    adapted = [LoraLinear(layer, rank=2, alpha=3.0, rngs=nnx.Rngs(2)) for layer in (ours, theirs)]
    for layer in adapted:
        layer.lora_b = nnx.Param(inputs_of(2, 7, seed=3))
    yield tuple(adapted)


def test_a_linear_layer_computes_what_flax_s_computes(x64):
    for shape in [(5,), (4, 5), SHAPE, (2, *SHAPE)]:
        inputs = inputs_of(*shape)
        for ours, theirs in pairs_of_layers():
            found, wanted = (gradients_of(layer, inputs)[0] for layer in (ours, theirs))
            assert max(relative_errors(found, wanted).values()) < 1e-12


def test_all_products_of_a_linear_layer_are_of_matrices(x64):
    """Products that contract two axes made copies on a CPU."""

    def contracts_two_axes(layer):
        return "(([0, 1], [0, 1])" in gradients_of(layer, inputs_of(*SHAPE))[1]

    for ours, _ in pairs_of_layers():
        assert not contracts_two_axes(ours)
    assert contracts_two_axes(nnx.Linear(5, 7, rngs=nnx.Rngs(1)))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_saving_the_slope_changes_no_derivative(name, x64):
    def plain(values):
        return ACTIVATIONS[name](values)

    def derivatives(function):
        first = jax.grad(lambda values: (function(values) ** 2).sum())
        second = jax.grad(lambda values: (first(values) ** 2).sum())
        return first(values), second(values)

    values = 3 * inputs_of(50)
    found, wanted = derivatives(saving_slope(plain)), derivatives(plain)
    assert max(relative_errors(found, wanted).values()) < 1e-12


def test_gelu_keeps_its_slope_only():
    def kept(function):
        return len(jax.tree.leaves(jax.vjp(function, inputs_of(*SHAPE, dtype=np.float32))[1]))

    def plain(values):
        return 0.5 * values * (1 + jax.lax.erf(values * 0.5**0.5))

    assert kept(ACTIVATIONS["gelu"]) == 1
    assert kept(plain) > 3
    values = inputs_of(*SHAPE, dtype=np.float32)
    assert relative_error(ACTIVATIONS["gelu"](values), plain(values)) < 1e-6


def kept_units(shape, *, rate, rows=64, layer=0, seed=0):
    keys = jax.random.split(jax.random.key(seed), rows)
    return np.asarray(row_dropout(jnp.ones((rows, *shape)), keys, rate=rate, layer=layer))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_has_its_rate_and_keeps_the_mean(rate):
    values = kept_units((32, 33), rate=rate)  # an odd width uses half of the last word
    dropped, deviation = values == 0, np.sqrt(rate * (1 - rate) / values.size)
    assert abs(dropped.mean() - rate) < 5 * deviation
    assert abs(values.mean() - 1) < 5 * deviation / (1 - rate)
    np.testing.assert_allclose(values[~dropped], 1 / (1 - rate), rtol=1e-4)
    for axis in range(3):  # no row, token or feature is special
        means = dropped.mean(axis)
        assert abs(means.std() - np.sqrt(rate * (1 - rate) / values.shape[axis])) < 0.05 * rate


def test_features_of_one_random_word_are_dropped_independently():
    first, second = np.split(kept_units((32, 64), rate=0.5) > 0, 2, axis=2)
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.01
    third, fourth = np.split(kept_units((32, 64), rate=0.5, layer=1) > 0, 2, axis=2)
    assert abs(np.corrcoef(first.ravel(), third.ravel())[0, 1]) < 0.01
    assert (fourth != third).any()


def test_the_mask_of_a_token_depends_on_its_row_only():
    keys = jax.random.split(jax.random.key(0), 4)
    values = inputs_of(4, 7, 6, dtype=np.float32)
    whole = row_dropout(values, keys, rate=0.5, layer=3)
    some = row_dropout(values[1:3, :5], keys[1:3], rate=0.5, layer=3)
    np.testing.assert_array_equal(some, whole[1:3, :5])
    assert (row_dropout(values, keys[::-1], rate=0.5, layer=3) != whole).any()


def test_a_rate_close_to_one_stays_finite():
    values = kept_units((4, 6), rate=1 - 2.0**-30)
    assert np.isfinite(values).all()
