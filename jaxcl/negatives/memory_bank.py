"""Embeddings of earlier batches, kept in the train state as negatives for later batches.

There are two kinds. A *queue* holds the most recent keys, first in, first out. An *instance bank*
has one slot per training row, with a moving average of the row's embedding. Banks are sharded by
slot; slots are numbered globally, independently of the number of devices.
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
      vectors: the embedding in each slot; 0 if never written.
      ids: the ids that losses compare: numbers of training rows, or of texts.
      groups: the group of each slot.
      written: the number of the last update that wrote each slot; −1 if never written.
      head: the next slot that a queue writes.
      updates: the number of updates of the bank so far.
      guides: the guide model's embedding in each slot; `None` without a guide model.
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
      num_slots: number of keys in a queue, or of training rows; padded to a multiple of 1,024 with
        slots that stay empty, so that a checkpoint can move between meshes.
      dim: width of the embeddings.
      dtype: type of the embeddings; float32 by default.
      guide_dim: width of the guide model's embeddings; `None` without one.

    Raises:
      ValueError: if there are no slots or features, or the type is not floating-point.
    """
    for name, size in (("num_slots", num_slots), ("dim", dim), ("guide_dim", guide_dim)):
        if size is not None and size < 1:
            raise ValueError(f"{name}={size} must be at least 1")
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype={dtype} is not a float; use float32, bfloat16 or float16")
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
    """Pad a bank with empty slots to a multiple, so that it divides over devices."""
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
    """Append the embeddings of a global batch, in order, and overwrite the oldest embeddings.

    Call it outside `jax.shard_map`, since slots are numbered over the whole bank. If the batch has
    more keys than the queue has slots, only the last keys are kept.

    Args:
      bank: from `init_bank`.
      vectors: embeddings of the whole batch.
      ids: the batch's ids, by training row or by text.
      groups: the batch's groups.
      num_slots: the same as for `init_bank`.
      valid: `False` for padding, which is skipped.
      guides: the guide model's embeddings of the batch, if the bank keeps them.

    Raises:
      ValueError: if the number of slots or the width of the embeddings differs from the bank's,
        or a label does not fit in int32.
      TypeError: if labels are not integers, or are traced with a type that int32 cannot hold.
    """
    if padded_entries(num_slots) != bank.ids.shape[0]:
        raise ValueError(
            f"num_slots={num_slots}, but the bank has {bank.ids.shape[0]} including padding; use "
            "the num_slots of init_bank"
        )
    ids, groups = _as_int32("ids", ids), _as_int32("groups", groups)
    vectors = as_vectors("vectors", vectors)
    valid = jnp.ones(ids.shape, bool) if valid is None else valid
    number = jnp.cumsum(valid, dtype=jnp.int32)
    count = valid.sum(dtype=jnp.int32)
    # Only the last `num_slots`, since a scatter may write either of two keys for one slot.
    is_stored = valid & (number > count - num_slots)
    slots = (bank.head + number - 1) % num_slots
    written = _written(bank, slots, is_stored, vectors, ids, groups, guides)
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
    that was never written. If the batch contains a row twice, its first embedding is used. Call it
    outside `jax.shard_map`, since slots are numbered over the whole bank.

    Args:
      bank: a bank with one slot per training row.
      vectors: embeddings of the whole batch.
      rows: the training row of each embedding, which is also its slot; negative rows are padding.
      groups: the batch's groups.
      momentum: $\mu$ in [0, 1); 0 stores the newest embedding unchanged.
      ids: ids to store instead of the training rows, such as text ids.
      valid: `False` for padding.
      guides: the guide model's embeddings of the batch, if the bank keeps them.

    Raises:
      ValueError: if the momentum is out of range, and as for `update_queue`.
      TypeError: as for `update_queue`.

    Reference:
      Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", 2018.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum}; set it to at least 0 and below 1")
    vectors = as_vectors("vectors", vectors)
    rows, groups = _as_int32("rows", rows), _as_int32("groups", groups)
    ids = rows if ids is None else _as_int32("ids", ids)
    is_stored = first_places(rows, valid)  # a scatter may write either of two embeddings
    if momentum:
        vectors = vectors.astype(jnp.promote_types(vectors.dtype, jnp.float32))
        before = bank.vectors[rows].astype(vectors.dtype)
        moved = normalise(momentum * before + (1 - momentum) * vectors)
        vectors = jnp.where((bank.written[rows] >= 0)[:, None], moved, vectors)
    return _written(bank, rows, is_stored, vectors, ids, groups, guides)


def read_bank(bank: MemoryBank) -> SharedNegatives:
    """Read the whole bank as negatives, without gradient; slots never written are not valid."""
    guides = None if bank.guides is None else lax.stop_gradient(bank.guides)
    return SharedNegatives(
        lax.stop_gradient(bank.vectors), bank.ids, bank.groups, bank.written >= 0, guides
    )


def mean_age(bank: MemoryBank) -> Float[Array, ""]:
    """The mean age of the written slots, in updates of the bank; 0 for an empty bank."""
    written = bank.written >= 0
    ages = jnp.where(written, bank.updates - 1 - bank.written, 0).astype(jnp.float32)
    return ages.sum() / jnp.maximum(written.sum(), 1)  # an int32 sum would overflow


def _as_int32(name: str, labels: Integer[Array, " b"]) -> Int[Array, " b"]:
    """Convert labels to int32; traced labels must have a type that fits in int32."""
    labels = as_labels(name, labels)
    if not np.can_cast(labels.dtype, np.int32):
        raise TypeError(
            f"{name} are traced as {labels.dtype}, which may not fit in the bank's int32; convert "
            "them before the call"
        )
    return labels


def _written(
    bank: MemoryBank,
    slots: Integer[Array, " b"],
    is_stored: Bool[Array, " b"],
    vectors: Float[Array, "b d"],
    ids: Integer[Array, " b"],
    groups: Integer[Array, " b"],
    guides: Float[Array, "b g"] | None,
) -> MemoryBank:
    if (guides is None) != (bank.guides is None):
        raise ValueError("a bank stores guides for all embeddings or for none; see guide_dim")
    if vectors.shape[1] != bank.vectors.shape[1]:
        raise ValueError(
            f"vectors have {vectors.shape[1]} features, but the bank's have {bank.vectors.shape[1]}"
        )
    # Embeddings that are not stored point past the end, where the scatter drops them.
    indices = jnp.where(is_stored, slots, bank.ids.shape[0])

    def put(table: Array, values: Array) -> Array:
        # As bits, since XLA on CPUs converts the whole table to float32 to scatter into bfloat16.
        values = as_bits(values.astype(table.dtype))
        return from_bits(as_bits(table).at[indices].set(values, mode="drop"), table.dtype)

    return bank._replace(
        vectors=put(bank.vectors, vectors),
        ids=put(bank.ids, ids),
        groups=put(bank.groups, groups),
        written=put(bank.written, jnp.full(ids.shape, bank.updates)),
        updates=bank.updates + 1,
        guides=None if bank.guides is None or guides is None else put(bank.guides, guides),
    )
