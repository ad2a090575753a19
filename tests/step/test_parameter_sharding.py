"""Sharded parameters: each device has a part, and training is the same."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from jaxcl.losses import LOSSES
from jaxcl.models import TransformerEncoder, make_towers
from jaxcl.ops.mesh import make_mesh
from jaxcl.step import parameter_sharding
from jaxcl.step.batch_loss import make_loss
from jaxcl.step.parameter_sharding import parameter_shardings
from jaxcl.step.train_step import init_state, make_train_step, state_sharding
from tests.helpers import relative_errors
from tests.step.test_train_step import MASKS, TEMPERATURE, on_mesh, some_batch
from tests.step.test_train_step import TOWERS as ALL_TOWERS

TOWERS = ALL_TOWERS | {
    "one loop": make_towers(
        lambda rngs: TransformerEncoder(
            50,
            dim=8,
            max_tokens=9,
            hidden_dim=16,
            num_layers=2,
            num_heads=2,
            mlp_dim=16,
            scan_layers=True,
            compute_dtype="float64",
            rngs=rngs,
        ),
        shared=True,
    )
}
CHUNKS = {"query": 1, "key": 3}
MESHES = ({"data": 2, "fsdp": 4}, pytest.param({"fsdp": 8}, marks=pytest.mark.slow))


def shapes(**leaves):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in leaves.items()}


def specs(tree, rules=(), mesh=None):
    mesh = make_mesh({"data": 2, "fsdp": 4}) if mesh is None else mesh
    found = parameter_shardings(mesh, tree, rules=rules)
    return jax.tree.map(lambda sharding: sharding.spec, found)


def test_the_longest_dimension_that_divides_is_cut():
    tree = shapes(table=(1_001, 512), kernel=(512, 2_048), square=(256, 256), odd=(333, 333))
    assert specs(tree) == {
        "table": PartitionSpec(None, "fsdp"),
        "kernel": PartitionSpec(None, "fsdp"),
        "square": PartitionSpec("fsdp"),
        "odd": PartitionSpec(),
    }
    small = shapes(bias=(2_048,), scale=())
    assert set(specs(small).values()) == {PartitionSpec()}
    assert set(specs(tree, mesh=make_mesh({"data": 8})).values()) == {PartitionSpec()}


def test_a_rule_decides_by_the_path():
    tree = {"towers": shapes(table=(1_024, 512), kernel=(512, 512))}
    rules = (("towers/table$", 1), ("table", 0), ("kernel", None))
    assert specs(tree, rules)["towers"] == {
        "table": PartitionSpec(None, "fsdp"),
        "kernel": PartitionSpec(),
    }
    for dimension, shape in ((2, (512, 512)), (0, (511, 512))):
        with pytest.raises(ValueError, match=r"the rule \('table', \d\) cannot cut table"):
            specs(shapes(table=shape), (("table", dimension),))


def trained(name, shape, *, steps=3, chunk_sizes=None):
    """The state after some steps in float64, and its sharding."""
    mesh = make_mesh(shape, devices=jax.devices()[: int(np.prod(list(shape.values())))])
    towers, optimizer = (
        TOWERS[name],
        optax.adam(1e-2, eps=1e-3),
    )  # otherwise, rounding would move weights without a gradient
    state = init_state(
        jax.random.key(0),
        towers.init,
        optimizer,
        temperature=TEMPERATURE,
        memory={"momentum": {}},
    )
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (state.params, state.memory))
    state = state._replace(params=wide[0], memory=wide[1], optimizer=optimizer.init(wide[0]))
    state = jax.device_put(state, state_sharding(mesh, state))
    step = make_train_step(
        make_loss(towers, LOSSES["infonce"], mesh, masks=MASKS, chunk_sizes=chunk_sizes),
        optimizer,
        mesh,
        temperature=TEMPERATURE,
        momentum=lambda step: jnp.float64(0.9),
        count=lambda batch: (
            jnp.count_nonzero(batch["query"]["tokens"]),
            batch["query"]["tokens"].size,
        ),
    )
    for _ in range(steps):
        state, metrics = step(state, on_mesh(some_batch(), mesh))
    return state, metrics


@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize(
    ("name", "chunk_sizes"),
    [
        pytest.param("static", None, id="static"),
        pytest.param("static", CHUNKS, id="static, chunks"),
        pytest.param("one loop", CHUNKS, id="one loop, chunks", marks=pytest.mark.slow),
        pytest.param("one loop", None, id="one loop", marks=pytest.mark.slow),
        pytest.param("transformer", None, id="transformer", marks=pytest.mark.slow),
        pytest.param("transformer", CHUNKS, id="transformer, chunks", marks=pytest.mark.slow),
    ],
)
def test_training_is_that_of_one_device(name, shape, chunk_sizes, x64, monkeypatch):
    monkeypatch.setattr(parameter_sharding, "_WORTH_CUTTING", 1)
    wanted, wanted_metrics = trained(name, {"data": 1})
    state, metrics = trained(name, shape, chunk_sizes=chunk_sizes)
    parts = (state.params, state.optimizer, state.memory), metrics
    expected = (wanted.params, wanted.optimizer, wanted.memory), wanted_metrics
    errors = relative_errors(*jax.tree.map(np.asarray, (parts, expected)))
    assert max(errors.values()) < 1e-9, errors

    cut = [
        leaf
        for part in parts[0]
        for leaf in jax.tree.leaves(part)
        if leaf.addressable_shards[0].data.size < leaf.size
    ]
    # Parameters, both moments and the momentum encoder: all matrices and vectors that divide.
    assert all(leaf.addressable_shards[0].data.size * shape["fsdp"] == leaf.size for leaf in cut)
    matrices = [leaf for leaf in jax.tree.leaves(state.params["towers"]) if leaf.ndim > 1]
    assert len(cut) >= 4 * sum(any(n % shape["fsdp"] == 0 for n in leaf.shape) for leaf in matrices)
