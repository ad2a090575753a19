"""Compute the gradient of a whole batch with the activation memory of one chunk."""

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
    r"""Make an encoder run chunk by chunk and discard each chunk's activations.

    The embeddings of all chunks are kept, so that the loss sees the whole batch. The backward pass
    encodes each chunk again, with the same random keys, to compute its gradient. Values and
    gradients are the same as for `encode` on all rows at once; the cost is one extra forward pass.

    Args:
      encode: `(params, *rows) -> embeddings`, pure. Every leaf of `rows` and of the embeddings has
        one entry per row, and each embedding depends only on its row. Dropout therefore needs one
        key per row, passed as one of the `rows`.
      chunk_size: rows per chunk, at least 1, per device inside a `jax.shard_map`. The last chunk is
        padded with rows whose results are dropped.
      has_aux: whether `encode` returns `(embeddings, aux)`, such as auxiliary losses or counters.
        The `aux` of all chunks are stacked; a loss may use them, and their gradient is exact.
      shards: number of equal parts into which the compiler shards the rows. Each chunk takes the
        same number of rows from each part, so that no rows move between devices.

    Returns:
      A function with the same arguments. With `has_aux`, its second result has a leading axis of
      chunks.

    Raises:
      ValueError: if `chunk_size` is below 1, or the leaves differ in their number of rows.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> encode = chunked(lambda params, rows: jnp.tanh(rows @ params), chunk_size=2)
      >>> total = lambda params: encode(params, jnp.ones((3, 2))).sum()
      >>> jax.grad(total)(jnp.zeros((2, 2))).tolist()
      [[3.0, 3.0], [3.0, 3.0]]

    Relations:
      Even with one chunk for the whole batch, `encode` runs twice. Rematerialised layers keep one
      activation per layer and row; this function keeps only one embedding per row.

    Reference:
      Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")

    def encode_chunked(params: PyTree, *rows: PyTree) -> PyTree:
        num_rows = _num_rows(rows)
        if num_rows % shards:
            raise ValueError(f"{num_rows} rows do not divide over {shards} shards")
        size = max(1, min(chunk_size, num_rows // shards))
        # Outside the loop, so that the gradient is summed over devices once, not once per chunk.
        params = as_varying(params, rows)
        chunks = jax.tree.map(lambda leaf: _split(leaf, size, shards), rows)
        encode_chunk = jax.checkpoint(lambda chunk: encode(params, *chunk))
        encoded = lax.map(encode_chunk, chunks)
        if not has_aux:
            return _joined(encoded, num_rows, shards)
        embeddings, aux = encoded
        return _joined(embeddings, num_rows, shards), aux

    return encode_chunked


def rows_per_chunk(width: int, *, max_tokens: int) -> int:
    """Compute the number of rows of a given width that fit in a token budget, at least one.

    Example:
      >>> rows_per_chunk(128, max_tokens=4_096)
      32
    """
    if width < 1:
        raise ValueError(f"width={width} must be at least 1")
    return max(1, max_tokens // width)


def _num_rows(rows: PyTree) -> int:
    numbers = {leaf.shape[0] for leaf in jax.tree.leaves(rows)}
    if len(numbers) != 1:
        raise ValueError(
            f"the leaves of rows differ in length, {sorted(numbers)}; give one entry per row"
        )
    return numbers.pop()


def _split(leaf: Array, size: int, shards: int) -> Array:
    """Reshape [rows, …] to [chunks, shards * size, …], padded with the first rows of each shard."""
    inside = leaf.shape[1:]
    parts = leaf.reshape(shards, leaf.shape[0] // shards, *inside)
    num_chunks = -(-parts.shape[1] // size)
    missing = num_chunks * size - parts.shape[1]
    padded = jnp.concatenate([parts, parts[:, :missing]], axis=1) if missing else parts
    chunks = padded.reshape(shards, num_chunks, size, *inside).swapaxes(0, 1)
    return chunks.reshape(num_chunks, shards * size, *inside)


def _joined(encoded: PyTree, num_rows: int, shards: int) -> PyTree:
    """Undo `_split` for every leaf, and drop the padding."""

    def join(leaf: Array) -> Array:
        num_chunks, size, inside = leaf.shape[0], leaf.shape[1] // shards, leaf.shape[2:]
        parts = leaf.reshape(num_chunks, shards, size, *inside).swapaxes(0, 1)
        parts = parts.reshape(shards, num_chunks * size, *inside)[:, : num_rows // shards]
        return parts.reshape(num_rows, *inside)

    return jax.tree.map(join, encoded)
