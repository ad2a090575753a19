"""The static encoder: a weighted sum of token embeddings, without attention, and very fast."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcl.models.embedding_bag import embedding_bag
from jaxcl.models.layers import DEFAULT_MAX_TOKENS, check_length, token_mask, tokens_of
from jaxcl.ops.vectors import normalise
from jaxcl.typing import Embeddings, PyTree, RowKeys, Size, check_arguments

__all__ = ["StaticEncoder"]


@check_arguments
class StaticEncoder(nnx.Module):
    r"""A weighted sum of token embeddings.

    $$e(x) = \operatorname{norm}\Big(W \sum_j e^{a_{x_j} + p_j}\, T_{x_j}\Big)$$

    with a learned log-weight $a_v$ per token, which acts like an inverse document frequency, and a
    learned log-weight $p_j$ per position, which can give more weight to the start of a text (a
    function's name and arguments) than to its end. Train it with token dropout
    (`jaxcl.models.augmentations`); otherwise it memorises the training pairs.

    Args:
      vocabulary_size: number of token ids; id 0 is padding if inputs have no `"length"`.
      dim: dimension of the embeddings.
      max_tokens: maximum length of a text, in tokens.
      hidden_dim: dimension of the token embeddings; `None` for `dim`, without a projection $W$.
      position_weights: whether to learn the $p_j$. Otherwise they are 0, and `jaxcl.export` can
        write the encoder for sentence-transformers.
      rngs: random streams for the initial parameters.

    Raises:
      ValueError: for an option out of range.
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        dim: int,
        max_tokens: Size = DEFAULT_MAX_TOKENS,
        hidden_dim: Size | None = None,
        position_weights: bool = True,
        rngs: nnx.Rngs,
    ):
        self.max_tokens = max_tokens
        width = hidden_dim or dim
        table = jax.random.normal(rngs.params(), (vocabulary_size, width)) / math.sqrt(width)
        self.table = nnx.Param(table)
        self.token_weight = nnx.Param(jnp.zeros((vocabulary_size,)))
        self.position_weight = nnx.Param(jnp.zeros((max_tokens,))) if position_weights else None
        self.projection = nnx.Linear(width, dim, use_bias=False, rngs=rngs) if hidden_dim else None

    def __call__(self, inputs: PyTree, rngs: RowKeys | None = None) -> Embeddings:
        """Embed `{"tokens": int32[b, t]}`, in the same way in training and evaluation."""
        tokens = tokens_of(inputs, "StaticEncoder")
        check_length(tokens, self.max_tokens)
        log_weights = self.token_weight[...][tokens]
        if self.position_weight is not None:
            log_weights += self.position_weight[...][None, : tokens.shape[1]]
        weights = jnp.where(token_mask(inputs), jnp.exp(log_weights), 0)
        vectors = embedding_bag(self.table[...], tokens, weights)
        if self.projection is not None:
            # The sum grows with the text, so scale it before the product; its norm is lost anyway.
            vectors = self.projection(normalise(vectors))
        return normalise(vectors)
