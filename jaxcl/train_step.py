"""One update: encode both sides, lose, differentiate, step. One jitted program over the mesh."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from jaxcl.grad_cache import chunked
from jaxcl.mesh import batch_sharding, replicated_sharding, table_sharding
from jaxcl.models.towers import SIDES, Encode
from jaxcl.negatives.memory_bank import MemoryBank
from jaxcl.ops.row_tables import read_rows, write_rows
from jaxcl.train_state import TrainState
from jaxcl.typing import Array, Batch, Embeddings, Float, Int, Key, PyTree, RowKeys, Scalar

__all__ = [
    "LossOfBatch",
    "StepMetrics",
    "TemperatureBounds",
    "init_state",
    "make_loss",
    "make_train_step",
    "state_sharding",
]

LossOfBatch: TypeAlias = Callable[
    [PyTree, PyTree, Batch, Key[Array, ""] | None], tuple[Scalar, PyTree]
]
"""`(params, memory, batch, key) -> (nats, memory)`."""


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
    bias: float | None = None,
    memory: PyTree = None,
) -> TrainState:
    """The state before the first update; `bias` is that of the scores, where a loss learns one."""
    init_key, run_key = jax.random.split(key)
    params = {
        "towers": init_towers(init_key),
        "log_temperature": jnp.log(jnp.float32(temperature.initial)),
    }
    if bias is not None:
        params["bias"] = jnp.float32(bias)
    memory = {} if memory is None else memory
    return TrainState(jnp.int32(0), params, optimizer.init(params), memory, run_key)


def make_loss(
    encode: Encode,
    loss_fn: Callable[..., Any],
    mesh: Mesh,
    *,
    masks: Mapping[str, str],
    chunk_sizes: Mapping[str, int] | None = None,
    remembers: bool = False,
    update_bank: Callable[..., MemoryBank] | None = None,
    needs: Sequence[str] = (),
) -> LossOfBatch:
    """The mean loss of a global batch as a function of the parameters.

    The encoders run under the compiler's own partitioning of the batch; the loss is a `shard_map`,
    since it says itself what crosses devices. Differentiate the result as it is: its gradient is
    that of the mean over the global batch, on any mesh.

    A batch may hold explicit negatives of each row, `batch["negatives"]`: `"inputs"`, a tree like
    that of the keys with `[b, n, …]`, `"valid"`, and a column for each of the masks. They are
    encoded as keys and handed to the loss, and so are `batch["teacher_scores"]`.

    Args:
      encode: the towers' function.
      loss_fn: of `jaxcl.losses`, its options bound.
      mesh: where it runs; rows are sharded over all of its axes.
      masks: arguments of the loss that mask false negatives -> columns of the batch they take.
      chunk_sizes: side -> how many of a device's rows are encoded at a time (`jaxcl.grad_cache`);
        `None` for all at once.
      remembers: the loss takes `memory`, these rows' entries of the tables in `memory["rows"]`, and
        returns `(loss, memory)`.
      update_bank: (bank, key embeddings, rows, groups) -> the bank with them, of
        `jaxcl.negatives.memory_bank`. The loss takes `bank`, `memory["bank"]` before the update.
      needs: what a batch must hold besides, such as `"teacher_scores"`; without it a `ValueError`.

    Returns:
      `(params, memory, batch, key) -> (nats, memory)`. `key=None` is the evaluation mode; otherwise
      each row draws from the key folded with its side and its row number.
    """
    axes = mesh.axis_names
    rows: Any = PartitionSpec(axes)
    whole: Any = PartitionSpec()
    slots = {"bank": MemoryBank(rows, rows, rows, rows, whole, whole)} if update_bank else {}

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(rows, rows, whole, rows, slots), out_specs=rows
    )
    def sharded_loss(
        sides: tuple[Embeddings, Embeddings],
        columns: dict[str, Array],
        scalars: dict[str, Scalar],
        entries: PyTree,
        bank: dict[str, MemoryBank],
    ) -> tuple[Float[Array, " b"], PyTree]:
        arguments = {"axis_name": axes, **columns, **scalars, **bank}
        if remembers:
            return loss_fn(*sides, memory=entries, **arguments)
        return loss_fn(*sides, **arguments), entries

    encode_rows = _encoder(encode, mesh, chunk_sizes)

    def loss(
        params: PyTree, memory: PyTree, batch: Batch, key: Key[Array, ""] | None
    ) -> tuple[Scalar, PyTree]:
        for name in needs:
            if name not in batch:
                raise ValueError(f"this loss needs batch[{name!r}], which these data do not have")
        towers, row = params["towers"], batch["row"]
        queries, keys = (
            encode_rows(towers, side, batch[side], _row_keys(key, number, row))
            for number, side in enumerate(SIDES)
        )
        columns = {argument: batch[column] for argument, column in masks.items()}
        if "teacher_scores" in batch:
            columns["teacher_scores"] = batch["teacher_scores"]
        if "negatives" in batch:
            columns |= _explicit_columns(batch, encode_rows, towers, masks, key)
        scalars = {"temperature": jnp.exp(params["log_temperature"])}
        if "bias" in params:
            scalars["bias"] = params["bias"]
        tables = memory.get("rows", {})
        bank = {"bank": memory["bank"]} if update_bank else {}
        found, entries = sharded_loss(
            (queries, keys), columns, scalars, read_rows(tables, row), bank
        )
        after = dict(memory)
        if remembers:
            after["rows"] = write_rows(tables, row, entries)
        if update_bank:
            vectors = jax.lax.stop_gradient(keys)
            after["bank"] = update_bank(memory["bank"], vectors, row, batch["group"])
        return found.mean(), after

    return loss


def _encoder(encode: Encode, mesh: Mesh, chunk_sizes: Mapping[str, int] | None) -> Encode:
    """The same, in chunks if it has chunk sizes."""
    if chunk_sizes is None:
        return encode
    rows, whole = PartitionSpec(mesh.axis_names), PartitionSpec()

    def encode_rows(
        params: PyTree, side: str, inputs: PyTree, rngs: RowKeys | None = None
    ) -> Embeddings:
        in_chunks = chunked(
            lambda params, inputs, rngs: encode(params, side, inputs, rngs),
            chunk_size=chunk_sizes[side],
        )
        # Each device goes through its own rows, so that chunks keep their sharding.
        return jax.shard_map(in_chunks, mesh=mesh, in_specs=(whole, rows, rows), out_specs=rows)(
            params, inputs, rngs
        )

    return encode_rows


def _explicit_columns(
    batch: Batch,
    encode: Encode,
    towers: PyTree,
    masks: Mapping[str, str],
    key: Key[Array, ""] | None,
) -> dict[str, Array]:
    """What a loss takes of the explicit negatives of a batch, encoded as keys."""
    explicit = batch["negatives"]
    rows, slots = explicit["valid"].shape
    inputs = jax.tree.map(
        lambda leaf: leaf.reshape(rows * slots, *leaf.shape[2:]), explicit["inputs"]
    )
    keys = _slot_keys(_row_keys(key, len(SIDES), batch["row"]), slots)
    return {
        "negatives": encode(towers, "key", inputs, keys).reshape(rows, slots, -1),
        "negatives_valid": explicit["valid"],
        **{f"negative_{name}": explicit[column] for name, column in masks.items()},
    }


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
    loss: LossOfBatch,
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
        (value, memory), gradients = jax.value_and_grad(loss, has_aux=True)(
            state.params, state.memory, batch, key
        )
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
        return TrainState(state.step + 1, params, optimizer_state, memory, state.key), metrics

    def placed_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        state, metrics = train_step(state, batch)
        return jax.lax.with_sharding_constraint(
            (state, metrics), (state_sharding(mesh, state), replicated_sharding(mesh))
        )

    return jax.jit(placed_step, in_shardings=(None, batch_sharding(mesh)), donate_argnums=0)


def state_sharding(mesh: Mesh, state: TrainState) -> TrainState:
    """Where a state's arrays are: whole on every device, but for the memory's, which are sharded.

    A row table and a bank go by their first axis; a number of theirs is whole.
    """
    whole, tables = replicated_sharding(mesh), table_sharding(mesh)
    placed: TrainState = jax.tree.map(lambda _: whole, state)
    return placed._replace(
        memory=jax.tree.map(lambda leaf: tables if leaf.ndim else whole, state.memory)
    )


def _row_keys(key: Key[Array, ""] | None, number: int, row: Int[Array, " b"]) -> RowKeys | None:
    """A key for each row of what the batch holds under a number: queries, keys, negatives."""
    if key is None:
        return None
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, number), row)


def _slot_keys(keys: RowKeys | None, slots: int) -> Key[Array, " _"] | None:
    """A key for each of the slots of each row, row by row."""
    if keys is None:
        return None
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    return fold(keys, jnp.arange(slots)).reshape(-1)
