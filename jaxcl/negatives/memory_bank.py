"""Embeddings of earlier batches, kept in the train state, as negatives of the current one.

There are two kinds. A *queue* holds the most recent keys, first in, first out. An *instance bank*
has a slot for each training row, with a moving average of the row's embedding. Banks are sharded by
slot; slots are numbered over all devices and do not depend on their number.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcl.negatives.sets import SharedNegatives
from jaxcl.ops.arguments import as_labels, as_vectors
from jaxcl.ops.row_tables import as_bits, first_places, from_bits, padded_entries
from jaxcl.ops.vectors import normalise
from jaxcl.typing import Array, Bool, Float, Int, Integer

__all__ = [
    "MemoryBank",
    "init_bank",
    "mean_age",
    "read_bank",
    "update_instances",
    "update_queue",
]


class MemoryBank(NamedTuple):
    """Embeddings and labels by slot.

    Attributes:
      vectors: one per slot; 0 if never written.
      ids: the ids that a loss compares, by training row or by text.
      groups: the group of each slot.
      written: the update that wrote each slot; −1 for none.
      head: the slot that a queue writes next.
      updates: the number of updates so far.
      guides: the guide model's embeddings of the same slots; `None` without a guide model.
    """

    vectors: Float[Array, "m d"]
    ids: Int[Array, " m"]
    groups: Int[Array, " m"]
    written: Int[Array, " m"]
    head: Int[Array, ""]
    updates: Int[Array, ""]
    guides: Float[Array, "m g"] | None = None


def init_bank(
    num_slots: int, dim: int, *, dtype: Any = None, guide_dim: int | None = None
) -> MemoryBank:
    """Create an empty bank.

    Args:
      num_slots: keys that a queue keeps, or training rows; rounded up to a multiple of 1,024 with
        slots that stay empty, so that a checkpoint can move between meshes.
      dim: width of the embeddings.
      dtype: type of the embeddings; float32 by default.
      guide_dim: width of the guide model's embeddings; `None` without one.

    Raises:
      ValueError: if there is no slot or feature, or for a type that is not floating-point.
    """
    for name, size in (("num_slots", num_slots), ("dim", dim), ("guide_dim", guide_dim)):
        if size is not None and size < 1:
            raise ValueError(f"{name}={size}; a bank has at least one")
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype={dtype}; embeddings are kept as float32, bfloat16 or float16")
    slots = padded_entries(num_slots)
    ids, groups, written = (jnp.full(slots, -1, jnp.int32) for _ in range(3))
    dtype = dtype or jnp.float32
    return MemoryBank(
        vectors=jnp.zeros((slots, dim), dtype),
        ids=ids,
        groups=groups,
        written=written,
        head=jnp.int32(0),
        updates=jnp.int32(0),
        guides=None if guide_dim is None else jnp.zeros((slots, guide_dim), jnp.float32),
    )


def pad_slots(bank: MemoryBank, *, multiple: int) -> MemoryBank:
    """Add slots that were never written, up to a multiple, so that they divide over devices."""
    missing = -bank.ids.shape[0] % multiple
    if not missing:
        return bank

    def padded(array: Array, value: int) -> Array:
        return jnp.pad(array, [(0, missing), *[(0, 0)] * (array.ndim - 1)], constant_values=value)

    return bank._replace(
        vectors=padded(bank.vectors, 0),
        ids=padded(bank.ids, -1),
        groups=padded(bank.groups, -1),
        written=padded(bank.written, -1),
        guides=None if bank.guides is None else padded(bank.guides, 0),
    )


def update_queue(
    bank: MemoryBank,
    vectors: Float[Array, "b d"],
    ids: Integer[Array, " b"],
    groups: Integer[Array, " b"],
    *,
    num_slots: int,
    valid: Bool[Array, " b"] | None = None,
    guides: Float[Array, "b g"] | None = None,
) -> MemoryBank:
    """Append the embeddings of a global batch, in order, and overwrite the oldest ones.

    Call it outside of `jax.shard_map`, since slots are numbered over the whole bank. The batch may
    have more keys than the queue has slots; the last of them then stay.

    Args:
      bank: from `init_bank`.
      vectors: embeddings of the whole batch.
      ids: their ids, by training row or by text.
      groups: their groups.
      num_slots: as given to `init_bank`.
      valid: `False` for padding, which is skipped.
      guides: their guide embeddings, if the bank keeps them.

    Raises:
      ValueError: for another number of slots, or embeddings of another width, than the bank has,
        and for labels that int32 cannot hold.
      TypeError: for labels that are not integers, or traced ones that may not fit into int32.
    """
    if padded_entries(num_slots) != bank.ids.shape[0]:
        raise ValueError(
            f"num_slots={num_slots}, but the bank has {bank.ids.shape[0]} with its padding; give "
            "the number that init_bank was given"
        )
    ids, groups = _as_int32("ids", ids), _as_int32("groups", groups)
    vectors = as_vectors("vectors", vectors)
    valid = jnp.ones(ids.shape, bool) if valid is None else valid
    number = jnp.cumsum(valid, dtype=jnp.int32)
    count = valid.sum(dtype=jnp.int32)
    # The last `num_slots` only: of two keys for one slot, a scatter may write either.
    taken = valid & (number > count - num_slots)
    slots = (bank.head + number - 1) % num_slots
    written = _written(bank, slots, taken, vectors, ids, groups, guides)
    return written._replace(head=(bank.head + count) % num_slots)


def update_instances(
    bank: MemoryBank,
    vectors: Float[Array, "b d"],
    rows: Integer[Array, " b"],
    groups: Integer[Array, " b"],
    *,
    momentum: float = 0.0,
    ids: Integer[Array, " b"] | None = None,
    valid: Bool[Array, " b"] | None = None,
    guides: Float[Array, "b g"] | None = None,
) -> MemoryBank:
    r"""Move the slots of a batch's rows towards their embeddings.

    $v \leftarrow \operatorname{normalise}(\mu v + (1 - \mu)\, x)$, and $v \leftarrow x$ in a slot
    that was never written. If the batch holds a row twice, its first embedding is used. Call it
    outside of `jax.shard_map`, since slots are numbered over the whole bank.

    Args:
      bank: a bank with a slot for each training row.
      vectors: embeddings of the whole batch.
      rows: their training rows, which are their slots; negative ones are padding.
      groups: their groups.
      momentum: $\mu$ in [0, 1); 0 stores the newest embedding as it is.
      ids: ids to store instead of the training rows, such as those by text.
      valid: `False` for padding.
      guides: their guide embeddings, if the bank keeps them.

    Raises:
      ValueError: for a momentum out of range, and as `update_queue`.
      TypeError: as `update_queue`.

    Reference:
      Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", 2018.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum}; set it to at least 0 and below 1")
    vectors = as_vectors("vectors", vectors)
    rows, groups = _as_int32("rows", rows), _as_int32("groups", groups)
    ids = rows if ids is None else _as_int32("ids", ids)
    taken = first_places(rows, valid)  # of two embeddings for one slot, a scatter may write either
    if momentum:
        vectors = vectors.astype(jnp.promote_types(vectors.dtype, jnp.float32))
        before = bank.vectors[rows].astype(vectors.dtype)
        moved = normalise(momentum * before + (1 - momentum) * vectors)
        vectors = jnp.where((bank.written[rows] >= 0)[:, None], moved, vectors)
    return _written(bank, rows, taken, vectors, ids, groups, guides)


def read_bank(bank: MemoryBank) -> SharedNegatives:
    """The whole bank as negatives, without gradient; slots never written are not valid."""
    guides = None if bank.guides is None else lax.stop_gradient(bank.guides)
    return SharedNegatives(
        lax.stop_gradient(bank.vectors), bank.ids, bank.groups, bank.written >= 0, guides
    )


def mean_age(bank: MemoryBank) -> Float[Array, ""]:
    """The mean number of updates since a written slot was written; 0 for an empty bank."""
    written = bank.written >= 0
    ages = jnp.where(written, bank.updates - 1 - bank.written, 0).astype(jnp.float32)
    return ages.sum() / jnp.maximum(written.sum(), 1)  # a sum of int32 would overflow


def _as_int32(name: str, labels: Integer[Array, " b"]) -> Int[Array, " b"]:
    """Labels that a bank can store: of traced ones, those whose type fits."""
    labels = as_labels(name, labels)
    if not np.can_cast(labels.dtype, np.int32):
        raise TypeError(
            f"{name} are traced as {labels.dtype}, whose values cannot be checked, and a bank "
            "stores int32; convert them before the call"
        )
    return labels


def _written(
    bank: MemoryBank,
    slots: Integer[Array, " b"],
    taken: Bool[Array, " b"],
    vectors: Float[Array, "b d"],
    ids: Integer[Array, " b"],
    groups: Integer[Array, " b"],
    guides: Float[Array, "b g"] | None,
) -> MemoryBank:
    if (guides is None) != (bank.guides is None):
        raise ValueError("a bank keeps guides for all embeddings or for none; see guide_dim")
    if vectors.shape[1] != bank.vectors.shape[1]:
        raise ValueError(
            f"vectors have {vectors.shape[1]} features, but the bank was made for "
            f"{bank.vectors.shape[1]}"
        )
    places = jnp.where(taken, slots, bank.ids.shape[0])  # past the end, where the scatter drops it

    def put(table: Array, values: Array) -> Array:
        # As bits: for a scatter into bfloat16, XLA on a CPU converts the whole table to float32.
        values = as_bits(values.astype(table.dtype))
        return from_bits(as_bits(table).at[places].set(values, mode="drop"), table.dtype)

    return bank._replace(
        vectors=put(bank.vectors, vectors),
        ids=put(bank.ids, ids),
        groups=put(bank.groups, groups),
        written=put(bank.written, jnp.full(ids.shape, bank.updates)),
        updates=bank.updates + 1,
        guides=None if bank.guides is None or guides is None else put(bank.guides, guides),
    )
