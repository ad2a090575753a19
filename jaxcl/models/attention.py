"""Attention that all transformers share."""

import jax
import jax.numpy as jnp

from jaxcl.typing import Array, Bool, Float

__all__ = ["attend"]


def attend(
    queries: Float[Array, "b q n c"],
    keys: Float[Array, "b t g c"],
    values: Float[Array, "b t g c"],
    bias: Float[Array, "1 n q t"] | None,
    seen: Bool[Array, "b 1 #q t"] | None,
    *,
    scale: float | None = None,
) -> Float[Array, "b q n c"]:
    r"""Dot-product attention: $\operatorname{softmax}(s\, Q K^\top + B)\, V$ for each head.

    The backward pass keeps the attention weights, but neither the scores nor their exponentials.

    Args:
      queries: the projections of each head.
      keys, values: the projections of each head, or of each group of consecutive query heads.
      bias: added to the scaled scores.
      seen: `True` where a query may attend to a key; `None` for everywhere. A query without keys
        gets the mean of all values, which keeps its states and gradients finite.
      scale: the factor $s$ of the scores; `None` for $1 / \sqrt{c}$.
    """
    if queries.dtype.itemsize < 4:
        # The backward products of JAX's attention stay 16 bits wide, which a GPU multiplies faster.
        return jax.nn.dot_product_attention(
            queries, keys, values, bias=bias, mask=seen, scale=scale, implementation="xla"
        )
    b, q, n, c = queries.shape
    t, groups = keys.shape[1:3]
    queries, keys, values = (jnp.swapaxes(side, 1, 2) for side in (queries, keys, values))
    # Products have one batch axis for rows and one for heads; other layouts are slow on a CPU.
    # The queries of a group's heads are rows of one matrix.
    grouped = queries.reshape(b, groups, -1, c)
    scores = jnp.einsum("bgmc,bgkc->bgmk", grouped, keys).reshape(b, n, q, t)
    scores *= c**-0.5 if scale is None else scale
    if bias is not None:
        scores += bias
    if seen is not None:
        scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
    weights = _softmax(scores)
    mixed = jnp.einsum("bgmk,bgkc->bgmc", weights.reshape(b, groups, -1, t), values)
    return jnp.swapaxes(mixed.reshape(b, n, q, c), 1, 2)


@jax.custom_jvp
def _softmax(scores: Float[Array, "*b k"]) -> Float[Array, "*b k"]:
    """A softmax that keeps only its result for the backward pass."""
    exponentials = jnp.exp(scores - scores.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


@_softmax.defjvp
def _softmax_derivative(
    scores: tuple[Float[Array, "*b k"]], tangents: tuple[Float[Array, "*b k"]]
) -> tuple[Float[Array, "*b k"], Float[Array, "*b k"]]:
    weights = _softmax(*scores)
    weighted = weights * tangents[0]
    return weights, weighted - weights * weighted.sum(-1, keepdims=True)
