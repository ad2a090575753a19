"""A causal transformer in the style of Mistral, with last-token pooling."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxcl.models.attention import attend
from jaxcl.models.layers import (
    DEFAULT_MAX_TOKENS,
    Hidden,
    Layer,
    TokenMask,
    activation_dtype,
    check_length,
    linear_layer,
    pool,
    row_dropout,
    run_layers,
    saving_slope,
    stacked,
    token_mask,
    tokens_of,
    unit_vectors,
)
from jaxcl.typing import (
    Array,
    Embeddings,
    Float,
    Positive,
    PyTree,
    Rate,
    RowKeys,
    Size,
    check_arguments,
)

__all__ = ["DecoderEncoder"]

_silu = saving_slope(jax.nn.silu)


@check_arguments
class DecoderEncoder(nnx.Module):
    """A causal transformer; the embedding of a text is the final state of its last token.

    It has rotary position embeddings, grouped-query attention, a gated MLP, and pre-normalisation
    with RMSNorm. The blocks are scanned in one compiled loop, so compile time does not depend on
    their number. Their parameters are stacked along a leading layer axis.

    Args:
      vocabulary_size: number of token ids; id 0 is padding if inputs have no `"length"`.
      dim: dimension of the embeddings. If it equals `hidden_dim`, there is no final projection.
      max_tokens: the maximum length of a text, in tokens.
      hidden_dim: dimension of the hidden states, a multiple of `2 * num_heads`.
      num_layers: number of blocks, each with attention and an MLP.
      num_heads: number of query heads.
      num_key_heads: number of key and value heads, a divisor of `num_heads`.
      mlp_dim: dimension of the MLP.
      rotary_base: base of the rotary frequencies.
      dropout: dropout rate of the two outputs of each block.
      remat: keep one activation per block for the backward pass, and recompute the others.
      compute_dtype: type of activations, such as `"bfloat16"`. `None` uses bfloat16 on accelerators
        and float32 elsewhere. Parameters, and sums in norms and softmax, are always float32.
      rngs: random streams for the initial parameters.

    Raises:
      ValueError: for an option out of range, or a width or number of heads that does not divide.

    Reference:
      Jiang et al., "Mistral 7B", 2023; as an embedder: Wang et al., "Improving Text Embeddings with
      Large Language Models", ACL 2024.
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        dim: int,
        max_tokens: Size = DEFAULT_MAX_TOKENS,
        hidden_dim: Size = 512,
        num_layers: Size = 8,
        num_heads: Size = 8,
        num_key_heads: Size = 2,
        mlp_dim: Size = 1792,
        rotary_base: Positive = 10_000.0,
        dropout: Rate = 0.0,
        remat: bool = False,
        compute_dtype: str | None = None,
        rngs: nnx.Rngs,
    ):
        if hidden_dim % (2 * num_heads):
            raise ValueError(
                f"hidden_dim={hidden_dim} does not divide over {num_heads} heads of an even width"
            )
        if num_heads % num_key_heads:
            raise ValueError(
                f"num_heads={num_heads} do not divide over num_key_heads={num_key_heads}"
            )
        dtype = activation_dtype(compute_dtype)
        scale = jax.nn.initializers.normal(0.02)
        self.token_table = nnx.Param(scale(rngs.params(), (vocabulary_size, hidden_dim)))
        shape = DecoderBlockShape(num_heads, num_key_heads, mlp_dim, rotary_base, dropout, dtype)

        def make_block(rngs: nnx.Rngs) -> "DecoderBlock":
            return DecoderBlock(hidden_dim, shape, rngs=rngs)

        self.blocks = stacked(make_block, rngs, num_layers=num_layers)
        self.norm = nnx.RMSNorm(hidden_dim, dtype=dtype, rngs=rngs)
        project = nnx.Linear(hidden_dim, dim, use_bias=False, dtype=dtype, rngs=rngs)
        self.projection = None if dim == hidden_dim else project
        self.num_layers = num_layers
        self.max_tokens = max_tokens
        self.remat = remat
        self.dtype = dtype

    def __call__(self, inputs: PyTree, rngs: RowKeys | None = None) -> Embeddings:
        """Embed `{"tokens": int32[b, t]}`; `rngs`, one key per row, enables dropout."""
        tokens = tokens_of(inputs, "DecoderEncoder")
        check_length(tokens, self.max_tokens)
        mask = token_mask(inputs)
        hidden = self.token_table[...][tokens].astype(self.dtype)
        hidden = run_layers(
            self.blocks, hidden, mask, rngs, num_layers=self.num_layers, remat=self.remat
        )
        vectors = pool(self.norm(hidden), mask, pooling="last")
        if self.projection is not None:
            vectors = self.projection(vectors)
        return unit_vectors(vectors)


class DecoderBlockShape(NamedTuple):
    """The options that all blocks of a decoder share; `DecoderEncoder` documents them."""

    num_heads: int
    num_key_heads: int
    mlp_dim: int
    rotary_base: float
    dropout: float
    dtype: jnp.dtype


class DecoderBlock(nnx.Module):
    """Causal self-attention and a gated MLP, each with a norm before it and a residual."""

    def __init__(self, hidden_dim: int, shape: DecoderBlockShape, *, rngs: nnx.Rngs):
        num_heads, num_key_heads, mlp_dim, rotary_base, dropout, dtype = shape

        def linear(width: int, out: int) -> nnx.Linear:
            return linear_layer(width, out, use_bias=False, dtype=dtype, rngs=rngs)

        head = hidden_dim // num_heads
        self.attention_norm = nnx.RMSNorm(hidden_dim, dtype=dtype, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(hidden_dim, dtype=dtype, rngs=rngs)
        self.queries = linear(hidden_dim, hidden_dim)
        self.keys = linear(hidden_dim, num_key_heads * head)
        self.values = linear(hidden_dim, num_key_heads * head)
        self.output = linear(hidden_dim, hidden_dim)
        self.gate = linear(hidden_dim, mlp_dim)
        self.widen = linear(hidden_dim, mlp_dim)
        self.narrow = linear(mlp_dim, hidden_dim)
        self.head = head
        self.rotary_base = rotary_base
        self.dropout = dropout

    def __call__(
        self, hidden: Hidden, mask: TokenMask, rngs: RowKeys | None, layer: Layer
    ) -> Hidden:
        def drop(values: Hidden, number: int) -> Hidden:
            return row_dropout(values, rngs, rate=self.dropout, layer=2 * layer + number)

        hidden += drop(self.attend(self.attention_norm(hidden), mask), 0)
        return hidden + drop(self.transform(self.mlp_norm(hidden)), 1)

    def attend(self, hidden: Hidden, mask: TokenMask) -> Hidden:
        b, t, h = hidden.shape
        queries, keys, values = (
            side(hidden).reshape(b, t, -1, self.head)
            for side in (self.queries, self.keys, self.values)
        )
        # The first position is always attended to, since a softmax needs at least one key.
        attended = mask | (jnp.arange(t) == 0)[None]
        mixed = attend(
            rotated(queries, base=self.rotary_base),
            rotated(keys, base=self.rotary_base),
            values,
            None,
            attended[:, None, None, :] & jnp.tri(t, dtype=bool),
        )
        return self.output(mixed.reshape(b, t, h))

    def transform(self, hidden: Hidden) -> Hidden:
        return self.narrow(_silu(self.gate(hidden)) * self.widen(hidden))


def rotated(heads: Float[Array, "b t n c"], *, base: float) -> Float[Array, "b t n c"]:
    r"""Rotate the $i$-th of $c/2$ feature pairs by $\text{base}^{-2i/c}$ times the position.

    Reference:
      Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
    """
    t, half = heads.shape[1], heads.shape[3] // 2
    return turned(heads, jnp.arange(t)[:, None] * base ** (-jnp.arange(half) / half)[None])


def turned(
    heads: Float[Array, "b t n c"], angles: Float[Array, "t half_c"]
) -> Float[Array, "b t n c"]:
    """Rotate the features $i$ and $i + c/2$ of each token by the token's $i$-th angle."""
    cosine, sine = (f(angles)[None, :, None].astype(heads.dtype) for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(heads, 2, axis=-1)
    return lax.concatenate(
        [first * cosine - second * sine, second * cosine + first * sine], dimension=3
    )
