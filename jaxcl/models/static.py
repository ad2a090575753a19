"""The static encoder: a weighted sum of token embeddings. No attention, no order, very fast."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcl.models.embedding_bag import embedding_bag
from jaxcl.models.layers import normalise, token_dropout_mask
from jaxcl.typing import Array, Embeddings, Float, PyTree, RowKeys

__all__ = ["StaticEncoder"]


class StaticEncoder(nnx.Module):
    r"""Embeds a text by its tokens alone.

    $$e(x) = \operatorname{norm}\Big(W \sum_j e^{a_{x_j}}\, T_{x_j}\Big)$$

    with a learned log-weight $a_v$ per token, which plays the part of an inverse document
    frequency. Trained with token dropout: without it the embedder memorises its pairs.

    Args:
      vocabulary_size: number of token ids; id 0 is padding.
      dim: width of the embeddings.
      hidden_dim: width of the token embeddings; `None` for `dim` and no projection $W$.
      token_dropout: the share of tokens left out in training, in [0, 1).
      rngs: for the initial parameters.
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        dim: int,
        hidden_dim: int | None = None,
        token_dropout: float = 0.4,
        rngs: nnx.Rngs,
    ):
        width = hidden_dim or dim
        scale = 1.0 / math.sqrt(width)
        table = scale * jax.random.normal(rngs.params(), (vocabulary_size, width))
        self.table = nnx.Param(table)
        self.log_weight = nnx.Param(jnp.zeros((vocabulary_size,)))
        self.projection = nnx.Linear(width, dim, use_bias=False, rngs=rngs) if hidden_dim else None
        self.token_dropout = token_dropout

    def __call__(self, inputs: PyTree, rngs: RowKeys | None = None) -> Embeddings:
        """Embeds `{"tokens": int32[b, t]}`; with `rngs` (one key per row) it drops tokens."""
        tokens = inputs["tokens"]
        mask = token_dropout_mask(tokens, rngs, rate=self.token_dropout)
        table = self.weighted_table()
        vectors = embedding_bag(table, tokens, mask.astype(table.dtype))
        if self.projection is not None:
            # The sum grows with the text; its norm is lost below, so keep the product in range.
            vectors = self.projection(normalise(vectors))
        return normalise(vectors)

    def weighted_table(self) -> Float[Array, "v h"]:
        """Token embeddings times their weights."""
        return self.table[...] * jnp.exp(self.log_weight[...])[:, None]
