"""What the encoders share: dropout by row, pooling."""

import jax
import jax.numpy as jnp

from jaxcl.typing import Array, Bool, Float, Key, RowKeys, Tokens

__all__ = ["PADDING_ID", "POOLINGS", "pool", "row_dropout", "token_dropout_mask"]

PADDING_ID = 0
"""The token id that stands for "no token here" in every tokenizer of jaxcl."""

POOLINGS = ("mean", "cls")


def pool(
    hidden: Float[Array, "b t h"], mask: Bool[Array, "b t"], *, pooling: str
) -> Float[Array, "b h"]:
    """One vector per row: the mean over its tokens, or its first token.

    Raises:
      ValueError: for an unknown pooling.
    """
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "mean":
        weights = mask.astype(hidden.dtype)
        count = jnp.maximum(weights.sum(1, keepdims=True), 1)  # a row may have no token
        return jnp.einsum("bt,bth->bh", weights, hidden) / count
    raise ValueError(f"pooling={pooling!r} is unknown; use one of {', '.join(POOLINGS)}")


def row_dropout(
    values: Float[Array, "b ..."], rngs: RowKeys | None, *, rate: float, layer: int
) -> Float[Array, "b ..."]:
    """Dropout whose mask belongs to the row, not to its place in a batch.

    Args:
      values: activations.
      rngs: a random key per row, or `None` for evaluation.
      rate: the share of values set to 0; the rest is scaled by `1 / (1 - rate)`.
      layer: a number of its own for every place that drops.
    """
    if rngs is None or rate == 0.0:
        return values

    def drop(key: Key[Array, ""], row: Float[Array, "..."]) -> Float[Array, "..."]:
        kept = jax.random.bernoulli(jax.random.fold_in(key, layer), 1.0 - rate, row.shape)
        return jnp.where(kept, row / (1.0 - rate), 0).astype(row.dtype)

    return jax.vmap(drop)(rngs, values)


def token_dropout_mask(tokens: Tokens, rngs: RowKeys | None, *, rate: float) -> Bool[Array, "b t"]:
    """`True` for the tokens that count: no padding and, in training, a random share of the rest."""
    mask = tokens != PADDING_ID
    if rngs is None or rate == 0.0:
        return mask
    width = tokens.shape[1]
    return mask & jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, (width,)))(rngs)
