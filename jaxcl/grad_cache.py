"""The gradient of a whole batch in the activation memory of one chunk."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.ops.varying import as_varying
from jaxcl.typing import Array, PyTree

__all__ = ["chunked", "rows_per_chunk"]


def chunked(
    encode: Callable[..., PyTree], *, chunk_size: int, has_aux: bool = False, shards: int = 1
) -> Callable[..., PyTree]:
    r"""Makes an encoder run chunk by chunk, and forget each chunk's activations.

    The embeddings of all chunks are kept, so that a loss over them sees the whole batch; in the
    backward pass each chunk is encoded once more, with the same random keys, while its gradient is
    taken. Value and gradient are those of `encode` on all rows at once, at the price of one forward
    pass more.

    Args:
      encode: `(params, *rows) -> embeddings`, pure; every leaf of `rows` and of the embeddings has
        one entry per row, and what it does to a row depends on nothing but that row. Dropout
        therefore needs one key per row, which is one of the `rows`.
      chunk_size: rows per chunk, at least 1; the last may have fewer, and is filled up with rows
        whose results are dropped. Inside a `jax.shard_map` these are rows of a device.
      has_aux: `encode` returns `(embeddings, aux)`: auxiliary losses, counters. What `aux` holds of
        one chunk is stacked; a loss may use it, and its gradient is exact.
      shards: over how many equal parts the compiler has spread the rows. A chunk has as many rows
        of each, so that none of them moves.

    Returns:
      A function of the same arguments. With `has_aux` its second result has a leading axis of
      chunks.

    Raises:
      ValueError: if `chunk_size` is below 1, or rows have no common number.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> encode = chunked(lambda params, rows: jnp.tanh(rows @ params), chunk_size=2)
      >>> total = lambda params: encode(params, jnp.ones((3, 2))).sum()
      >>> jax.grad(total)(jnp.zeros((2, 2))).tolist()
      [[3.0, 3.0], [3.0, 3.0]]

    Relations:
      A chunk of the whole batch is `encode`, encoded twice. Rematerialising layers instead keeps
      one activation per layer for the whole batch, where this keeps one embedding.

    Reference:
      Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}; a chunk has at least one row")

    def encode_chunked(params: PyTree, *rows: PyTree) -> PyTree:
        num_rows = _num_rows(rows)
        if num_rows % shards:
            raise ValueError(f"{num_rows} rows do not divide over {shards} shards")
        size = max(1, min(chunk_size, num_rows // shards))
        # Once, before the loop: else the gradient would be summed over devices in every turn.
        params = as_varying(params, rows)
        chunks = jax.tree.map(lambda leaf: _split(leaf, size, shards), rows)
        encode_one = jax.checkpoint(lambda chunk: encode(params, *chunk))
        encoded = lax.map(encode_one, chunks)
        if not has_aux:
            return _joined(encoded, num_rows, shards)
        embeddings, aux = encoded
        return _joined(embeddings, num_rows, shards), aux

    return encode_chunked


def rows_per_chunk(width: int, *, max_tokens: int) -> int:
    """How many rows of a width fit into a budget of tokens; one at least.

    Example:
      >>> rows_per_chunk(128, max_tokens=4_096)
      32
    """
    if width < 1:
        raise ValueError(f"width={width}; a row has at least one token")
    return max(1, max_tokens // width)


def _num_rows(rows: PyTree) -> int:
    numbers = {leaf.shape[0] for leaf in jax.tree.leaves(rows)}
    if len(numbers) != 1:
        raise ValueError(f"all rows must be as many; there are {sorted(numbers)}")
    return numbers.pop()


def _split(leaf: Array, size: int, shards: int) -> Array:
    """[rows, …] -> [chunks, shards * size, …], the last filled up with the first rows."""
    inside = leaf.shape[1:]
    parts = leaf.reshape(shards, leaf.shape[0] // shards, *inside)
    num_chunks = -(-parts.shape[1] // size)
    missing = num_chunks * size - parts.shape[1]
    filled = jnp.concatenate([parts, parts[:, :missing]], axis=1) if missing else parts
    chunks = filled.reshape(shards, num_chunks, size, *inside).swapaxes(0, 1)
    return chunks.reshape(num_chunks, shards * size, *inside)


def _joined(encoded: PyTree, num_rows: int, shards: int) -> PyTree:
    def join(leaf: Array) -> Array:
        num_chunks, size, inside = leaf.shape[0], leaf.shape[1] // shards, leaf.shape[2:]
        parts = leaf.reshape(num_chunks, shards, size, *inside).swapaxes(0, 1)
        parts = parts.reshape(shards, num_chunks * size, *inside)[:, : num_rows // shards]
        return parts.reshape(num_rows, *inside)

    return jax.tree.map(join, encoded)
