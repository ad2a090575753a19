"""Fine-tuning in float64: any mesh, any widths and any chunks end with the state of one device.

Adapters, a frozen bfloat16 base, an average of the weights, rates by layer, frozen adapters,
accumulated gradients and dropout are on together.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.models.trainable import split
from jaxcl.run.training import build_training
from jaxcl.step import parameter_sharding
from jaxcl.step.length_buckets import Buckets
from jaxcl.step.train_state import TrainState
from jaxcl.typing import SIDES, PyTree
from tests.helpers import bits, relative_errors, some_slow
from tests.run.test_resumed_states import (
    ACCUMULATED,
    AVERAGE,
    LONGEST,
    TRANSFORMER,
    settings_of,
    steps_of,
)

STEPS = 5  # two updates, and the gradient of one more batch
WIDTHS = Buckets((5, LONGEST), (1, 1))
BUCKETS = dict.fromkeys(SIDES, WIDTHS)
FREEZE = ("*/norm/bias", "*/narrow/lora_*")
TUNED = (
    TRANSFORMER | {"model.options.num_layers": 1, "model.options.compute_dtype": "float64"},
    {"model.lora.rank": 2, "model.lora.base_dtype": "bfloat16"},
    {"model.lora.also_train": ("*/norm/*", "*/token_table")},
    {"optimizer.layer_decay": 0.8, "optimizer.freeze": FREEZE},
    {"optimizer.options.eps": 1e-3},  # or rounding would move weights without a gradient
    {"optimizer.schedule": "constant"},  # the first update moves adapters
    AVERAGE,
    ACCUMULATED,
)
MESH = {"data": 2, "fsdp": 4}
ONE_DEVICE = {"data": 1, "fsdp": 1}
CACHED = {"grad_cache.chunk_size": 1}

ARRANGEMENTS = {
    "several widths over a mesh": (MESH, {}, {"key": WIDTHS}),
    "eight devices": ({"data": 8, "fsdp": 1}, {}, None),
    "chunks": (ONE_DEVICE, {"grad_cache.chunk_size": 3}, None),
    "chunks over a mesh": (MESH, CACHED, None),
    "several widths": (ONE_DEVICE, {}, BUCKETS),
    "several widths and chunks on eight devices": ({"data": 8, "fsdp": 1}, CACHED, BUCKETS),
}
"""Another mesh, changed settings, and the widths of each side."""


class Trained(NamedTuple):
    """A program with its first parameters, its last state and its losses."""

    frozen: frozenset[str]
    first: PyTree
    state: TrainState
    losses: list[float]


def trained(mesh=ONE_DEVICE, changes=None, buckets=None, *, key=None):
    devices = jax.devices()[: math.prod(mesh.values())]
    settings = settings_of(*TUNED, {"run.mesh": mesh}, changes or {})
    program = build_training(settings, devices=devices, buckets=buckets)
    state = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf, program.init()
    )
    state = state if key is None else state._replace(key=jax.random.key(key))
    first = jax.device_get(state.params)
    state, losses = steps_of(program, state, range(STEPS))
    return Trained(program.frozen, first, state, [np.frombuffer(loss)[0] for loss in losses])


def error(found, wanted):
    """The largest relative error of all numbers that training changes."""

    def changed(one):
        params, _ = split(one.state.params, wanted.frozen)
        leaves = jax.tree.leaves((params, one.state.memory["average"], one.state.optimizer))
        return [np.array(one.losses), *(leaf for leaf in leaves if leaf.dtype == jnp.float64)]

    return max(relative_errors(changed(found), changed(wanted)).values())


def held_bits(params, frozen):
    return jax.tree.map(bits, split(params, frozen)[1])


@pytest.fixture(scope="module")
def one():
    """Training on one device, with the whole batch padded to one width."""
    with jax.enable_x64(True):
        return trained()


@pytest.mark.parametrize("name", some_slow(ARRANGEMENTS, ("several widths over a mesh",)))
def test_fine_tuning_is_that_of_one_device(name, one, x64, monkeypatch):
    monkeypatch.setattr(parameter_sharding, "_WORTH_CUTTING", 1)
    found = trained(*ARRANGEMENTS[name])
    assert error(found, one) < 1e-10
    assert found.frozen == one.frozen
    assert held_bits(found.state.params, one.frozen) == held_bits(one.first, one.frozen)


def test_another_key_of_dropout_fails_these_tests(one, x64):
    assert error(trained(key=7), one) > 1e-3


@pytest.mark.slow
def test_a_width_that_cuts_texts_fails_these_tests(one, x64):
    buckets = {"query": WIDTHS._replace(widths=(5, LONGEST - 1))}
    assert error(trained(buckets=buckets), one) > 1e-6


@pytest.mark.slow
def test_another_decay_of_the_average_fails_these_tests(one, x64):
    assert error(trained(changes={"optimizer.average_decay": 0.71}), one) > 1e-6


@pytest.mark.slow
def test_an_adapter_that_is_not_frozen_fails_these_tests(one, x64):
    found = trained(changes={"optimizer.freeze": FREEZE[:1]})
    assert held_bits(found.state.params, one.frozen) != held_bits(one.first, one.frozen)
