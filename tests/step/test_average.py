"""The average of the weights: its arithmetic, its place in the step, and its shards."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcl.losses import LOSSES
from jaxcl.models.trainable import parameter_paths, split
from jaxcl.ops.mesh import make_mesh
from jaxcl.step import parameter_sharding
from jaxcl.step.average import init_average, update_average
from jaxcl.step.batch_loss import make_loss
from jaxcl.step.train_step import init_state, make_train_step, state_sharding
from tests.helpers import bits, relative_error, relative_errors
from tests.step.test_train_step import MASKS, TEMPERATURE, TOWERS, on_mesh, some_batch


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.9999])
def test_the_average_weights_every_update_by_its_age(decay, x64):
    values = np.random.default_rng(0).normal(size=(6, 3))
    average = init_average({"w": jnp.full(3, 100.0)})  # which has no share in the average
    for updates, value in enumerate(values, start=1):
        average = update_average(average, {"w": jnp.asarray(value)}, decay=decay)
        weights = decay ** np.arange(updates - 1, -1, -1.0)
        wanted = weights @ values[:updates] / weights.sum()
        # The share of the newest weights is computed in float32.
        assert relative_error(average.towers["w"], wanted) < 1e-6
        assert int(average.updates) == updates


def test_before_the_first_update_the_average_is_a_copy_and_after_it_the_weights():
    average = init_average({"w": jnp.float32([1, 2])})
    np.testing.assert_array_equal(average.towers["w"], [1, 2])
    new = jnp.float32([0.1, 0.7])
    average = update_average(average, {"w": new}, decay=0.999)
    assert bits(average.towers["w"]) == bits(new)


@pytest.mark.parametrize("shape", [{"data": 8}, {"data": 2, "fsdp": 4}], ids=str)
def test_a_step_updates_the_average_of_the_trained_towers(shape, monkeypatch):
    monkeypatch.setattr(parameter_sharding, "_WORTH_CUTTING", 1)
    mesh, optimizer = make_mesh(shape), optax.sgd(0.5)
    frozen = {"towers/query/table"}
    towers = TOWERS["static, projected, two towers"]
    state = init_state(
        jax.random.key(0),
        towers.init,
        optimizer,
        temperature=TEMPERATURE,
        frozen=frozen,
        memory={"average": None},
    )
    state = jax.device_put(state, state_sharding(mesh, state))
    step = make_train_step(
        make_loss(towers, LOSSES["infonce"], mesh, masks=MASKS),
        optimizer,
        mesh,
        temperature=TEMPERATURE,
        frozen=frozen,
        average_decay=0.75,
    )
    weights = []
    for _ in range(3):
        state, _ = step(state, on_mesh(some_batch(), mesh))
        weights.append(jax.device_get(split(state.params, frozen)[0]["towers"]))
    average = state.memory["average"]
    assert parameter_paths(average.towers) == parameter_paths(weights[0])
    wanted = jax.tree.map(
        lambda *one: (0.75**2 * one[0] + 0.75 * one[1] + one[2]) / (0.75**2 + 0.75 + 1), *weights
    )
    assert max(relative_errors(average.towers, wanted).values()) < 1e-5
    where, there = (
        jax.tree.map(lambda leaf: leaf.sharding, tree)
        for tree in (average.towers, split(state.params, frozen)[0]["towers"])
    )
    assert where == there
