"""Rows and sums across devices, and the collectives that are compiled for Gloo."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from jaxcl.configs.code_search import get_config

from jaxcl.ops import collectives
from jaxcl.ops.collectives import gather, sum_scatter
from jaxcl.ops.mesh import make_mesh
from jaxcl.step import parameter_sharding
from jaxcl.typing import SIDES
from tests.helpers import training_of

AXES = ("data", "fsdp")


@pytest.fixture(params=[False, True], ids=["native", "gloo"])
def by_gloo(request, monkeypatch):
    monkeypatch.setattr(collectives, "_by_gloo", lambda: request.param)
    return request.param


@pytest.mark.usefixtures("by_gloo")
def test_each_device_has_its_part_of_the_sum_and_its_gradient():
    values = np.random.default_rng(0).standard_normal((8, 16, 3))
    weights = np.random.default_rng(1).standard_normal((16, 3))
    value, gradient = of_all(sum_scatter, values, weights)
    np.testing.assert_allclose(value, (values.sum(0) * weights).sum())
    np.testing.assert_allclose(gradient, np.broadcast_to(weights, values.shape))


@pytest.mark.usefixtures("by_gloo")
def test_each_device_gets_all_rows_and_the_sum_of_all_gradients():
    rows = np.random.default_rng(0).standard_normal((8, 2, 3))
    weights = np.random.default_rng(1).standard_normal((8 * 16, 3))  # device by device
    value, gradient = of_all(gather, rows, weights)
    everywhere = np.tile(rows.reshape(16, 3), (8, 1))
    np.testing.assert_allclose(value, (everywhere * weights).sum())
    np.testing.assert_allclose(gradient, weights.reshape(8, 8, 2, 3).sum(0))


@pytest.mark.parametrize("by_gloo", [True], indirect=True)
@pytest.mark.usefixtures("by_gloo")
@pytest.mark.parametrize(
    "changes",
    [
        {"loss.name": "sigmoid", "loss.bias": -10.0},
        {"run.mesh.fsdp": 4, "grad_cache.chunk_size": 1, "negatives.tiers.uniform": 4}
        | {"negatives.bank.kind": "instance"},
    ],
    ids=["sigmoid", "fsdp"],
)
def test_no_step_has_a_reduce_scatter_by_gloo(changes, monkeypatch):
    monkeypatch.setattr(parameter_sharding, "_WORTH_CUTTING", 1)
    config = get_config("smoke")
    small = {"model.dim": 8, "data.vocabulary_size": 100, "global_batch_size": 16}
    config.update_from_flattened_dict(small | changes)
    program = training_of(config)
    shapes = {side: {"tokens": jax.ShapeDtypeStruct((16, 4), np.int32)} for side in SIDES}
    labels = dict.fromkeys(("row", "text", "group"), jax.ShapeDtypeStruct((16,), np.int32))
    state = program.abstract_state(100)
    cut = [not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params)]
    assert any(cut) == ("run.mesh.fsdp" in changes)
    step = program.train_step.lower(state, shapes | labels)
    text = step.compile().as_text()
    assert "all-reduce" in text
    assert "reduce-scatter" not in text


def of_all(operation, values, weights):
    """The weighted sum of all devices' results, and its gradient."""
    mesh = make_mesh({"data": 2, "fsdp": 4})
    rows = PartitionSpec(AXES)

    def local(ours, weights):
        return (operation(ours[0], AXES) * weights).sum()[None]

    whole = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows), out_specs=rows)
    with jax.enable_x64(True):
        return jax.jit(jax.value_and_grad(lambda values: whole(values, weights).sum()))(
            jnp.asarray(values)
        )
