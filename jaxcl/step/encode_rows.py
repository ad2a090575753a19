"""Encodes the rows of a batch on a mesh: augmented, in chunks, with a random key for each row."""

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxcl.grad_cache import chunked
from jaxcl.models.towers import Encode, Towers
from jaxcl.step.length_buckets import Buckets, bucketed
from jaxcl.step.parameter_sharding import FSDP
from jaxcl.typing import Array, Embeddings, Int, Key, PyTree, RowKeys

__all__ = [
    "EncodeRows",
    "fold_rows",
    "keys_of_side",
    "keys_of_slots",
    "keys_of_view",
    "make_encode_rows",
]

_VIEW = 1_000_000  # greater than any layer number, which dropout folds into the same keys


@runtime_checkable
class EncodeRows(Protocol):
    """`(params, side, inputs, a random key per row or None) -> [b, d]`.

    With keys, inputs are augmented, and the encoder is in training mode unless `dropout` is false.
    """

    def __call__(
        self,
        params: PyTree,
        side: str,
        inputs: PyTree,
        rngs: RowKeys | None = None,
        *,
        dropout: bool = True,
    ) -> Embeddings: ...


def make_encode_rows(
    towers: Towers,
    mesh: Mesh,
    chunk_sizes: Mapping[str, int] | None,
    buckets: Mapping[str, Buckets] | None = None,
) -> EncodeRows:
    """Make a function that encodes rows on a mesh.

    Args:
      towers: the model and its augmentations.
      mesh: the devices. If the mesh has an axis for parameters, encoders can look it up.
      chunk_sizes: side -> the number of rows that a device encodes at a time; `None` for all.
      buckets: side -> the widths of chunks of similar length, instead of `chunk_sizes`.
    """
    encode = _with_mesh(towers.encode, mesh) if FSDP in mesh.axis_names else towers.encode
    # Each device goes through its own rows, so that chunks keep their sharding, and gradients are
    # summed over devices once. The axis of sharded parameters is left to the compiler, which
    # gathers each parameter where a chunk needs it; all of them at once might not fit.
    manual = tuple(axis for axis in mesh.axis_names if axis != FSDP)
    shards = dict(mesh.shape).get(FSDP, 1)
    rows, replicated = PartitionSpec(manual), PartitionSpec()

    def encode_rows(
        params: PyTree,
        side: str,
        inputs: PyTree,
        rngs: RowKeys | None = None,
        *,
        dropout: bool = True,
    ) -> Embeddings:
        def encode_some(params: PyTree, inputs: PyTree, rngs: RowKeys | None) -> Embeddings:
            if rngs is not None and side in towers.augment:
                inputs = jax.vmap(towers.augment[side])(inputs, keys_of_view(rngs))
            return encode(params, side, inputs, rngs if dropout else None)

        in_chunks: Callable[[PyTree, PyTree, RowKeys | None], Embeddings]
        if buckets and side in buckets:
            in_chunks = bucketed(encode_some, buckets[side], shards=shards, axis_names=manual)
        elif chunk_sizes is not None:
            in_chunks = chunked(encode_some, chunk_size=chunk_sizes[side], shards=shards)
        else:
            return encode_some(params, inputs, rngs)
        if manual:
            in_chunks = jax.shard_map(
                in_chunks,
                mesh=mesh,
                in_specs=(replicated, rows, rows),
                out_specs=rows,
                axis_names=set(manual),
            )
        return in_chunks(params, inputs, rngs)

    return encode_rows


def _with_mesh(encode: Encode, mesh: Mesh) -> Encode:
    """Wrap `encode` so that the models can look up the mesh."""

    def encode_rows(
        params: PyTree, side: str, inputs: PyTree, rngs: RowKeys | None = None
    ) -> Embeddings:
        if not jax.sharding.get_abstract_mesh().empty:  # within a `shard_map`
            return encode(params, side, inputs, rngs)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return encode(params, side, inputs, rngs)

    return encode_rows


def keys_of_side(key: Key[Array, ""] | None, number: int, row: Int[Array, " b"]) -> RowKeys | None:
    """A random key for each row of a part of a batch: 0 is the queries, 1 keys, 2 negatives."""
    if key is None:
        return None
    return fold_rows(jax.random.fold_in(key, number), row)


def fold_rows(key: Key[Array, ""], row: Int[Array, " b"]) -> RowKeys:
    """Derive a random key for each row number."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, row)


def keys_of_slots(keys: RowKeys | None, slots: int) -> Key[Array, " _"] | None:
    """A random key for each slot of each row, in row-major order."""
    if keys is None:
        return None
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    return fold(keys, jnp.arange(slots)).reshape(-1)


def keys_of_view(keys: RowKeys) -> RowKeys:
    """The keys with which the inputs of rows are augmented, from the keys of the rows."""
    # Folded with the view, so that augmentation and dropout draw different numbers.
    return jax.vmap(jax.random.fold_in, (0, None))(keys, _VIEW)
