"""Layers that encoders share: linear layers and activations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxcl.models.layers import linear_layer, saving_slope
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
