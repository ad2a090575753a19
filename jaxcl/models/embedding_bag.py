"""Weighted sums of token embeddings, without an intermediate `[b, t, h]` tensor."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.ops.varying import as_varying, full_like_varying
from jaxcl.typing import Array, Float, Int

__all__ = ["IMPLEMENTATIONS", "embedding_bag"]

IMPLEMENTATIONS = ("gather", "loop")

_CHUNK_TOKENS = 1024


def embedding_bag(
    table: Float[Array, "v h"],
    tokens: Int[Array, "b t"],
    weights: Float[Array, "b t"],
    *,
    implementation: str | None = None,
) -> Float[Array, "b h"]:
    r"""Compute weighted sums of token embeddings: $y_i = \sum_j w_{ij}\, T_{x_{ij}}$.

    Args:
      table: one embedding per token id.
      tokens: token ids; padding has the weight 0, whatever its id.
      weights: the weight of each token.
      implementation: `"gather"` reads all embeddings at once; accelerators fuse this with the sum,
        and the compiler partitions it over devices. `"loop"` adds one token position at a time,
        forward and backward, and stays in cache. It is for a single CPU device, where XLA's gather
        and scatter of `[b, t, h]` cost several times as much (`python -m jaxcl.bench
        embedding_bag`). Its backward pass would reduce over devices once per chunk of tokens, so
        `None` never selects it on several devices.

    Returns:
      One vector per row, in the table's dtype.

    Raises:
      ValueError: for an unknown implementation.
    """
    if implementation is None:
        on_one_cpu = jax.default_backend() == "cpu" and jax.device_count() == 1
        implementation = "loop" if on_one_cpu else "gather"
    if implementation == "gather":
        return jnp.einsum("bt,bth->bh", weights, table[tokens])
    if implementation == "loop":
        return _looped_bag(table, tokens, weights)
    raise ValueError(
        f"implementation={implementation!r} is unknown; use one of {', '.join(IMPLEMENTATIONS)}"
    )


def _summed_by_position(
    table: Float[Array, "v h"], tokens: Int[Array, "b t"], weights: Float[Array, "b t"]
) -> Float[Array, "b h"]:
    def add_position(j: Array, total: Array) -> Array:
        return total + weights[:, j, None] * table[tokens[:, j]]

    shape = (tokens.shape[0], table.shape[1])
    start = full_like_varying(shape, 0.0, table.dtype, (table, tokens, weights))
    return lax.fori_loop(0, tokens.shape[1], add_position, start)


_looped_bag = jax.custom_vjp(_summed_by_position)


def _looped_bag_forward(table: Array, tokens: Array, weights: Array) -> tuple[Array, tuple]:
    # Not `_looped_bag`, so that a second derivative in forward mode exists.
    return _summed_by_position(table, tokens, weights), (table, tokens, weights)


def _looped_bag_backward(residuals: tuple, cotangent: Array) -> tuple[Array, None, Array]:
    table, tokens, weights = residuals

    def weigh_position(j: Array, gradient: Array) -> Array:
        return gradient.at[:, j].set((table[tokens[:, j]] * cotangent).sum(1))

    # A separate loop, so that the compiler drops it where its result is not used.
    start = as_varying(jnp.zeros_like(weights), (table, cotangent))
    weight_gradient = lax.fori_loop(0, tokens.shape[1], weigh_position, start)
    return _table_gradient(table, tokens, weights, cotangent), None, weight_gradient


def _table_gradient(table: Array, tokens: Array, weights: Array, cotangent: Array) -> Array:
    """Scatter only tokens with a weight, chunk by chunk, since padding is most of a batch."""
    counted = (weights != 0).ravel()
    num_chunks = -(-counted.size // _CHUNK_TOKENS)
    places = jnp.nonzero(counted, size=num_chunks * _CHUNK_TOKENS, fill_value=counted.size)[0]

    def scatter_chunk(i: Array, gradient: Array) -> Array:
        indices = lax.dynamic_slice(places, (i * _CHUNK_TOKENS,), (_CHUNK_TOKENS,))
        # Past the last token with a weight, indices are out of bounds, and weights are 0.
        weight = weights.ravel().at[indices].get(mode="fill", fill_value=0)
        rows = indices // tokens.shape[1]
        return gradient.at[tokens.ravel()[indices]].add(weight[:, None] * cotangent[rows])

    # The barrier keeps two bags in one program from sharing, and then copying, the same zeros.
    start, _ = lax.optimization_barrier((as_varying(jnp.zeros_like(table), cotangent), cotangent))
    used_chunks = (counted.sum() + _CHUNK_TOKENS - 1) // _CHUNK_TOKENS
    return lax.fori_loop(0, used_chunks, scatter_chunk, start)


_looped_bag.defvjp(_looped_bag_forward, _looped_bag_backward)
