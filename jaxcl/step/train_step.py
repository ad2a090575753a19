"""One update: encode, compute the loss, differentiate, step; one jitted program over the mesh."""

import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxcl.models.trainable import merge, split, with_frozen_momentum
from jaxcl.ops.mesh import batch_sharding, replicated_sharding, table_sharding
from jaxcl.step.average import WeightAverage, init_average, update_average
from jaxcl.step.batch_loss import LossOfBatch
from jaxcl.step.parameter_sharding import Rule, parameter_shardings
from jaxcl.step.train_state import TrainState
from jaxcl.typing import Array, Batch, Int, Key, PyTree, Scalar

__all__ = ["StepMetrics", "TemperatureBounds", "init_state", "make_train_step", "state_sharding"]


class TemperatureBounds(NamedTuple):
    """The initial temperature, and the range to which each update clamps it."""

    initial: float
    minimum: float
    maximum: float


def init_state(
    key: Key[Array, ""],
    init_towers: Callable[[Key[Array, ""]], PyTree],
    optimizer: optax.GradientTransformation,
    *,
    temperature: TemperatureBounds,
    bias: float | None = None,
    memory: PyTree = None,
    frozen: Collection[str] = (),
) -> TrainState:
    """The state before the first update.

    Args:
      key: the random key of the run.
      init_towers: key -> parameters.
      optimizer: the optimizer, whose state is part of the train state.
      temperature: the initial temperature.
      bias: the initial bias of the scores, if the loss learns one.
      memory: as `jaxcl.step.batch_loss.make_loss` describes it; an empty `"momentum"` or
        `"average"` in it becomes a copy of the towers.
      frozen: the paths of the parameters that are not trained (`jaxcl.models.trainable`). They have
        no optimizer state, and no copy in the momentum encoder.
    """
    init_key, run_key = jax.random.split(key)
    params = {
        "towers": init_towers(init_key),
        "log_temperature": jnp.log(jnp.float32(temperature.initial)),
    }
    if bias is not None:
        params["bias"] = jnp.float32(bias)
    trained, _ = split(params, frozen)
    memory = {} if memory is None else memory
    if "momentum" in memory:
        memory = memory | {"momentum": jax.tree.map(jnp.copy, trained.get("towers", {}))}
    if "average" in memory:
        memory = memory | {"average": init_average(trained.get("towers", {}))}
    return TrainState(jnp.int32(0), params, optimizer.init(trained), memory, run_key)


class StepMetrics(NamedTuple):
    """The metrics of one update, which stay on the device until they are read.

    Attributes:
      loss: mean over the global batch, in nats, before the update.
      gradient_norm: global norm of the gradients of all trained parameters, before clipping.
      temperature: after the update.
      leaf_gradient_norms: the gradient norm of each parameter, to find out why a loss diverges.
      length: the total length of the inputs of the batch, in tokens for texts, without padding.
      padded_length: the total length, including the padding that the step computes.
    """

    loss: Scalar
    gradient_norm: Scalar
    temperature: Scalar
    leaf_gradient_norms: PyTree
    length: Int[Array, ""]
    padded_length: Int[Array, ""]


def make_train_step(
    loss: LossOfBatch,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    temperature: TemperatureBounds,
    momentum: Callable[[Scalar], Scalar] | None = None,
    average_decay: float | None = None,
    accumulate_steps: int = 1,
    rules: Sequence[Rule] = (),
    frozen: Collection[str] = (),
    count: Callable[[Batch], tuple[Int[Array, ""] | int, ...]] = lambda batch: (0, 0),
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """Compile the update for a mesh: rows sharded over all devices, parameters over axis `"fsdp"`.

    Args:
      loss: as `make_loss` returns it.
      optimizer: the optimizer of the trained parameters.
      mesh: the devices.
      temperature: bounds to which the temperature is clamped after each update. Clamping the
        parameter itself, and not its value in the loss, keeps a nonzero gradient at the bound.
      momentum: step -> the decay of the momentum encoder; `None` without a momentum encoder.
      average_decay: the decay of the average of the weights (`jaxcl.step.average`); `None` without
        an average.
      accumulate_steps: the steps per update of the optimizer; the average of the weights is updated
        only when the weights are.
      rules: how to shard parameters, as in `jaxcl.step.parameter_sharding`.
      frozen: the paths of the parameters that are not trained, as for `init_state`. No gradient is
        computed for them, and they never change.
      count: batch -> the lengths of its inputs without and with padding, for the metrics.

    Returns:
      `(state, batch) -> (state, metrics)`. The state is donated: its old buffers become invalid.
    """
    low, high = math.log(temperature.minimum), math.log(temperature.maximum)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(state.key, state.step)
        trained, held = split(state.params, frozen)

        def loss_of_trained(trained: PyTree) -> tuple[Scalar, PyTree]:
            memory = with_frozen_momentum(state.memory, state.params, frozen)
            return loss(merge(trained, held), memory, batch, key)

        (value, memory), gradients = jax.value_and_grad(loss_of_trained, has_aux=True)(trained)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, trained)
        trained = optax.apply_updates(trained, updates)
        if "log_temperature" in trained:
            trained["log_temperature"] = jnp.clip(trained["log_temperature"], low, high)
        if momentum is not None:
            before, after = state.memory["momentum"], trained.get("towers", {})
            memory = memory | {"momentum": _moved(before, after, momentum(state.step))}
        if average_decay is not None:
            average: WeightAverage = memory["average"]
            moved = update_average(average, trained.get("towers", {}), decay=average_decay)
            if accumulate_steps > 1:
                updated = (state.step + 1) % accumulate_steps == 0
                moved = jax.tree.map(lambda new, old: jnp.where(updated, new, old), moved, average)
            memory = memory | {"average": moved}
        params = merge(trained, held)
        leaf_norms = jax.tree.map(jnp.linalg.norm, gradients)
        length, padded_length = count(batch)
        metrics = StepMetrics(
            loss=value,
            gradient_norm=optax.tree.norm(leaf_norms),
            temperature=jnp.exp(params["log_temperature"]),
            leaf_gradient_norms=leaf_norms,
            length=jnp.int32(0) + length,
            padded_length=jnp.int32(0) + padded_length,
        )
        return TrainState(state.step + 1, params, optimizer_state, memory, state.key), metrics

    def placed_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        state, metrics = train_step(state, batch)
        return jax.lax.with_sharding_constraint(
            (state, metrics),
            (state_sharding(mesh, state, rules=rules), replicated_sharding(mesh)),
        )

    return jax.jit(placed_step, in_shardings=(None, batch_sharding(mesh)), donate_argnums=0)


def state_sharding(mesh: Mesh, state: TrainState, *, rules: Sequence[Rule] = ()) -> TrainState:
    """The sharding of each array of a state.

    Parameters, the optimizer's state, the momentum encoder and the average of the weights are
    replicated, or sharded over the axis `"fsdp"`. Row tables, banks, mined rows and the order of
    rows are sharded by row over all axes. Scalars are replicated.
    """
    replicated, tables = replicated_sharding(mesh), table_sharding(mesh)
    cut = functools.partial(parameter_shardings, mesh, rules=rules)
    placed: TrainState = jax.tree.map(lambda _: replicated, state)
    placed = placed._replace(params=cut(state.params), optimizer=cut(state.optimizer, strict=False))
    copies = {
        name: cut(state.memory[name]) for name in ("momentum", "average") if name in state.memory
    }
    placed = placed._replace(memory=placed.memory | copies)
    sharded = {
        name: jax.tree.map(lambda leaf: tables if leaf.ndim else replicated, part)
        for name, part in state.memory.items()
        if name in ("rows", "bank", "mined", "assignment")
    }
    return placed._replace(memory=placed.memory | sharded)


def _moved(average: PyTree, params: PyTree, momentum: Scalar) -> PyTree:
    return jax.tree.map(
        lambda old, new: (momentum * old + (1 - momentum) * new).astype(old.dtype), average, params
    )
