"""One update: encode both sides, lose, differentiate, step. One jitted program over the mesh."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from jaxcl.grad_cache import chunked
from jaxcl.mesh import batch_sharding, replicated_sharding
from jaxcl.models.towers import SIDES, Encode
from jaxcl.train_state import TrainState
from jaxcl.typing import Array, Batch, Embeddings, Float, Int, Key, PyTree, RowKeys, Scalar

__all__ = ["StepMetrics", "TemperatureBounds", "init_state", "make_loss", "make_train_step"]


class TemperatureBounds(NamedTuple):
    """Where the temperature starts, and the range that each update clamps it to."""

    initial: float
    minimum: float
    maximum: float


def init_state(
    key: Key[Array, ""],
    init_towers: Callable[[Key[Array, ""]], PyTree],
    optimizer: optax.GradientTransformation,
    *,
    temperature: TemperatureBounds,
) -> TrainState:
    """The state before the first update."""
    init_key, run_key = jax.random.split(key)
    params = {
        "towers": init_towers(init_key),
        "log_temperature": jnp.log(jnp.float32(temperature.initial)),
    }
    return TrainState(jnp.int32(0), params, optimizer.init(params), run_key)


def make_loss(
    encode: Encode,
    loss_fn: Callable[..., Float[Array, " q"]],
    mesh: Mesh,
    *,
    masks: Mapping[str, str],
    chunk_sizes: Mapping[str, int] | None = None,
) -> Callable[[PyTree, Batch, Key[Array, ""] | None], Scalar]:
    """The mean loss of a global batch as a function of the parameters.

    The encoders run under the compiler's own partitioning of the batch; the loss is a `shard_map`,
    since it says itself what crosses devices. Differentiate the result as it is: its gradient is
    that of the mean over the global batch, on any mesh.

    Args:
      encode: the towers' function.
      loss_fn: of `jaxcl.losses`, its options bound.
      mesh: where it runs; rows are sharded over all of its axes.
      masks: arguments of the loss that mask false negatives -> columns of the batch they take.
      chunk_sizes: side -> how many of a device's rows are encoded at a time (`jaxcl.grad_cache`);
        `None` for all at once.

    Returns:
      `(params, batch, key) -> nats`. `key=None` is the evaluation mode; otherwise each row draws
      from the key folded with its side and its row number.
    """
    axes = mesh.axis_names
    rows, whole = PartitionSpec(axes), PartitionSpec()

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(rows, rows, rows, whole), out_specs=rows)
    def sharded_loss(
        queries: Embeddings, keys: Embeddings, labels: dict[str, Array], temperature: Scalar
    ) -> Float[Array, " b"]:
        return loss_fn(queries, keys, temperature=temperature, axis_name=axes, **labels)

    def encode_side(towers: PyTree, side: str, inputs: PyTree, rngs: RowKeys | None) -> Embeddings:
        if chunk_sizes is None:
            return encode(towers, side, inputs, rngs)
        in_chunks = chunked(
            lambda towers, inputs, rngs: encode(towers, side, inputs, rngs),
            chunk_size=chunk_sizes[side],
        )
        # Each device goes through its own rows, so that chunks keep their sharding.
        return jax.shard_map(in_chunks, mesh=mesh, in_specs=(whole, rows, rows), out_specs=rows)(
            towers, inputs, rngs
        )

    def loss(params: PyTree, batch: Batch, key: Key[Array, ""] | None) -> Scalar:
        queries, keys = (
            encode_side(params["towers"], side, batch[side], _row_keys(key, side, batch["row"]))
            for side in SIDES
        )
        labels = {argument: batch[column] for argument, column in masks.items()}
        return sharded_loss(queries, keys, labels, jnp.exp(params["log_temperature"])).mean()

    return loss


class StepMetrics(NamedTuple):
    """What one update reports, on the device until somebody asks.

    Attributes:
      loss: mean over the global batch, in nats, before the update.
      gradient_norm: of all parameters together, before clipping.
      temperature: after the update.
      leaf_gradient_norms: the same per parameter, to name the culprit of a loss that diverges.
    """

    loss: Scalar
    gradient_norm: Scalar
    temperature: Scalar
    leaf_gradient_norms: PyTree


def make_train_step(
    loss: Callable[[PyTree, Batch, Key[Array, ""] | None], Scalar],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    temperature: TemperatureBounds,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """Compiles the update for a mesh: parameters on every device, rows over all of them.

    Args:
      loss: as `make_loss` returns it.
      optimizer: what turns gradients into updates.
      mesh: where it runs.
      temperature: the clamp after each update. Clamping the parameter rather than its use leaves
        its gradient alive at the bound.

    Returns:
      `(state, batch) -> (state, metrics)`. The state is donated: its old buffers are gone.
    """
    low, high = math.log(temperature.minimum), math.log(temperature.maximum)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(state.key, state.step)
        value, gradients = jax.value_and_grad(loss)(state.params, batch, key)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        params["log_temperature"] = jnp.clip(params["log_temperature"], low, high)
        leaf_norms = jax.tree.map(jnp.linalg.norm, gradients)
        metrics = StepMetrics(
            loss=value,
            gradient_norm=optax.tree.norm(leaf_norms),
            temperature=jnp.exp(params["log_temperature"]),
            leaf_gradient_norms=leaf_norms,
        )
        return TrainState(state.step + 1, params, optimizer_state, state.key), metrics

    whole, rows = replicated_sharding(mesh), batch_sharding(mesh)
    return jax.jit(
        train_step, in_shardings=(whole, rows), out_shardings=(whole, whole), donate_argnums=0
    )


def _row_keys(key: Key[Array, ""] | None, side: str, row: Int[Array, " b"]) -> RowKeys | None:
    if key is None:
        return None
    side_key = jax.random.fold_in(key, SIDES.index(side))
    return jax.vmap(jax.random.fold_in, (None, 0))(side_key, row)
