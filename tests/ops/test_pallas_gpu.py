"""GPU kernels without a GPU: interpreted, they are correct, and they lower for a Hopper."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

from jaxcl.losses import infonce_loss
from jaxcl.ops.pairs import (
    PairLabels,
    pair_count,
    pair_logsumexp,
    pair_softplus,
    pair_sum,
    pallas_gpu,
)
from tests.helpers import relative_errors, unit_vectors

ROWS, COLUMNS, FEATURES = 150, 130, 70  # two padded blocks each, and two chunks of features


def sides(dtype=jnp.bfloat16):
    return (
        unit_vectors(0, ROWS, FEATURES, dtype=dtype),
        unit_vectors(1, COLUMNS, FEATURES, dtype=dtype),
    )


def labels(size):
    numbers = jnp.arange(size)
    return PairLabels(
        different=(numbers % 37, jnp.stack([numbers % 5, numbers % 3 - 1], 1)),
        valid=numbers != 3,
        ceiling=jnp.linspace(0.0, 0.5, size),
    )


def reductions(implementation):
    """A weighted sum of all reductions, as a function of both sides, a temperature and a bias."""
    how = {"implementation": implementation}
    masked = {"query_labels": labels(ROWS), "key_labels": labels(COLUMNS), **how}

    def total(queries, keys, temperature, bias):
        parts = (
            *pair_logsumexp(
                queries, keys, temperature=temperature, key_bias=bias, hardness=2.0, **masked
            ),
            *pair_softplus(queries, keys, scale=10.0, bias=-3.0, **how),
            *pair_sum(queries, keys, temperature=temperature, **masked),
            *pair_count(queries, keys, **masked),
        )
        return sum(
            (jnp.where(jnp.isfinite(part), part, 0) * jnp.cos(jnp.arange(part.size))).sum()
            for part in parts
        )

    return jax.jit(jax.value_and_grad(total, (0, 1, 2, 3)))


def inputs():
    return *sides(), jnp.float32(0.1), jnp.sin(jnp.arange(COLUMNS, dtype=jnp.float32))


@pytest.fixture
def interpreted(monkeypatch):
    # JAX has no public name for it yet.
    params = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.params")
    monkeypatch.setattr(pallas_gpu, "INTERPRET", params.InterpretGPUParams())


def test_interpreted_kernels_give_the_values_and_gradients_of_the_reference(interpreted):
    found, wanted = (reductions(name)(*inputs()) for name in ("pallas_gpu", "reference"))
    assert [leaf.dtype for leaf in found[1][:2]] == [jnp.bfloat16] * 2
    value, gradients = (relative_errors(*pair) for pair in zip(found, wanted, strict=True))
    assert max(value.values()) < 1e-6
    # Weights and gradients keep 8 bits: 2⁻⁹ = 2e-3 for each.
    assert max(gradients.values()) < 6e-3


def test_small_terms_of_a_softplus_keep_their_digits(interpreted):
    far = {"scale": 1.0, "bias": -12.0}  # e⁻¹² = 6e-6 next to 1, where float32 resolves 1e-7
    found, wanted = (
        pair_softplus(*sides(), **far, implementation=name) for name in ("pallas_gpu", "reference")
    )
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_the_kernels_lower_for_a_hopper():
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        text = (
            reductions("pallas_gpu").trace(*inputs()).lower(lowering_platforms=("cuda",)).as_text()
        )
    assert text.count("@mosaic_gpu") >= 4 + 3  # count has no gradient


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_the_kernels_lower_for_several_gpus_in_a_mesh(exchange):
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    rows, whole = PartitionSpec("data"), PartitionSpec()
    how = {"axis_name": "data", "exchange": exchange, "implementation": "pallas_gpu"}
    loss = jax.shard_map(
        lambda queries, keys, temperature: infonce_loss(
            queries, keys, temperature=temperature, **how
        ),
        mesh=mesh,
        in_specs=(rows, rows, whole),
        out_specs=rows,
    )
    side = jax.ShapeDtypeStruct((512, 128), jnp.bfloat16)
    gradient = jax.value_and_grad(lambda *inputs: loss(*inputs).mean(), (0, 1, 2))
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(gradient).trace(side, side, jax.ShapeDtypeStruct((), jnp.float32))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") >= 2


def test_unsupported_arguments_are_named():
    with pytest.raises(ValueError, match="needs bfloat16 or float16 on both sides, not float32"):
        pair_logsumexp(*sides(jnp.float32), temperature=1.0, implementation="pallas_gpu")
    guided = {
        "query_labels": PairLabels(guide=jnp.ones((ROWS, 2))),
        "key_labels": PairLabels(guide=jnp.ones((COLUMNS, 2))),
    }
    with pytest.raises(ValueError, match="does not support guides; use 'tiled'"):
        pair_logsumexp(*sides(), temperature=1.0, implementation="pallas_gpu", **guided)
