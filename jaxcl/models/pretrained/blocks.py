"""A configurable transformer that covers the families of pretrained encoders."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxcl.models.attention import attend
from jaxcl.models.decoder import rotated
from jaxcl.models.layers import (
    Hidden,
    TokenMask,
    activation_dtype,
    check_length,
    linear_layer,
    row_dropout,
)
from jaxcl.models.pretrained.activations import ACTIVATIONS
from jaxcl.models.pretrained.description import PLAIN, Computation
from jaxcl.typing import Array, Bool, Float, Int, RowKeys, Tokens

__all__ = ["NUM_BUCKETS", "Architecture", "Transformer", "relative_buckets"]

NUM_BUCKETS = 32
"""The number of buckets for relative positions."""

FURTHEST = 128
"""All distances of at least this number of tokens share a bucket."""


class Architecture(NamedTuple):
    """The sizes and variants of a transformer.

    Attributes:
      vocabulary_size: rows of the token table.
      hidden_dim: width of the hidden states, a multiple of `num_heads`.
      num_layers: number of blocks, each with attention and an MLP.
      num_heads: number of attention heads.
      mlp_dim: width of the MLP.
      activation: name of the MLP's activation in `ACTIVATIONS`.
      epsilon: added to the variance in layer norms.
      dropout: the dropout rate in pretraining, which is also the default for fine-tuning.
      num_positions: rows of the position table; for rotary positions, which have no table, the
        maximum length of a text, in tokens.
      first_position: the position of a text's first token in the position table.
      pre_norm: normalise before attention and MLP, and after the last block, as in ModernBERT;
        otherwise after each residual, as in BERT. Both normalise the embeddings, so a pre-norm
        model has no norm before its first attention.
      norm_bias, attention_bias, mlp_bias: whether these layers have biases.
      token_types: rows of the table of token types; 0 for no table. All tokens have the first type.
      relative_positions: add a learned bias to each head's scores, from a table of `NUM_BUCKETS`
        relative positions.
      rotary_bases: the base of each layer's rotary positions; empty for no rotary positions.
      windows: for each layer, the number of tokens that attention reaches to either side, or `None`
        for full attention; empty if all layers have full attention.
      joint_projections: compute queries, keys and values with one matrix.
      gated: multiply the first half of the MLP's hidden values, after the activation, by the second
        half.
    """

    vocabulary_size: int
    hidden_dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    activation: str
    epsilon: float
    dropout: float
    num_positions: int
    first_position: int = 0
    pre_norm: bool = False
    norm_bias: bool = True
    attention_bias: bool = True
    mlp_bias: bool = True
    token_types: int = 0
    relative_positions: bool = False
    rotary_bases: tuple[float, ...] = ()
    windows: tuple[int | None, ...] = ()
    joint_projections: bool = False
    gated: bool = False

    @property
    def max_tokens(self) -> int:
        """The maximum number of tokens of a text, as limited by the positions."""
        return self.num_positions - self.first_position


class Transformer(nnx.Module):
    """Compute hidden states of texts with a transformer.

    Args:
      architecture: sizes and variants.
      computation: the dropout rate, the recomputation and the type of activations.
      rngs: random streams for the initial parameters.

    Raises:
      ValueError: if the width does not divide over the heads, or heads with rotary positions
        have an odd width.

    Reference:
      Devlin et al., "BERT", 2019; Liu et al., "RoBERTa", 2019; Song et al., "MPNet", 2020; Warner
      et al., "Smarter, Better, Faster, Longer" (ModernBERT), 2024.
    """

    def __init__(
        self, architecture: Architecture, computation: Computation = PLAIN, *, rngs: nnx.Rngs
    ):
        a = computation.of(architecture)
        even = " of an even width" if a.rotary_bases else ""
        if a.hidden_dim % (2 * a.num_heads if even else a.num_heads):
            raise ValueError(
                f"config.json: a width of {a.hidden_dim} does not divide over {a.num_heads} "
                f"heads{even}"
            )
        dtype = activation_dtype(computation.compute_dtype)

        def table(rows: int, width: int) -> nnx.Param:
            return nnx.Param(0.02 * jax.random.normal(rngs.params(), (rows, width)))

        self.token_table = table(a.vocabulary_size, a.hidden_dim)
        self.position_table = None if a.rotary_bases else table(a.num_positions, a.hidden_dim)
        self.type_table = table(a.token_types, a.hidden_dim) if a.token_types else None
        self.bucket_table = table(NUM_BUCKETS, a.num_heads) if a.relative_positions else None
        self.norm = _norm(a, dtype, rngs)
        self.blocks = nnx.List([Block(a, n, dtype=dtype, rngs=rngs) for n in range(a.num_layers)])
        self.final_norm = _norm(a, dtype, rngs) if a.pre_norm else _identity
        self.architecture = a
        self.remat = computation.remat
        self.dtype = dtype

    def __call__(self, tokens: Tokens, mask: TokenMask, rngs: RowKeys | None = None) -> Hidden:
        """Compute the hidden states of all tokens; the states of padding tokens are meaningless.

        Args:
          tokens: ids; padding follows the tokens of a text.
          mask: `True` for tokens.
          rngs: a random key per row for dropout, or `None` for evaluation.

        Raises:
          ValueError: for texts longer than the positions allow.
        """
        a, t = self.architecture, tokens.shape[1]
        check_length(tokens, a.max_tokens)
        hidden = self.token_table[...][tokens]
        if self.position_table is not None:
            hidden += self.position_table[a.first_position : a.first_position + t]
        if self.type_table is not None:
            hidden += self.type_table[0]
        hidden = row_dropout(self.norm(hidden), rngs, rate=a.dropout, layer=0)
        bias = None if self.bucket_table is None else _relative_bias(self.bucket_table[...], t)
        run = nnx.remat(_run_block) if self.remat else _run_block
        for block in self.blocks:
            hidden = run(block, hidden, mask, bias, rngs)
        return self.final_norm(hidden)


def _run_block(
    block: "Block",
    hidden: Hidden,
    mask: TokenMask,
    bias: Float[Array, "1 n t t"] | None,
    rngs: RowKeys | None,
) -> Hidden:
    return block(hidden, mask, bias, rngs)


def _identity(hidden: Hidden) -> Hidden:
    return hidden


def _norm(a: Architecture, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The fast variance subtracts two large numbers when the mean is far from 0.
    return nnx.LayerNorm(
        a.hidden_dim,
        epsilon=a.epsilon,
        use_bias=a.norm_bias,
        use_fast_variance=False,
        dtype=dtype,
        rngs=rngs,
    )


class Block(nnx.Module):
    """Self-attention and an MLP, each with a residual, a norm and dropout."""

    def __init__(self, a: Architecture, layer: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.attention = Attention(a, layer, dtype=dtype, rngs=rngs)
        self.mlp = MLP(a, dtype=dtype, rngs=rngs)
        normalised_before = a.pre_norm and layer == 0
        self.attention_norm = _identity if normalised_before else _norm(a, dtype, rngs)
        self.mlp_norm = _norm(a, dtype, rngs)
        self.pre_norm = a.pre_norm
        self.dropout = a.dropout
        self.layer = layer

    def __call__(
        self,
        hidden: Hidden,
        mask: TokenMask,
        bias: Float[Array, "1 n t t"] | None,
        rngs: RowKeys | None,
    ) -> Hidden:
        drop = functools.partial(row_dropout, rngs=rngs, rate=self.dropout)
        first, second = 1 + 2 * self.layer, 2 + 2 * self.layer  # the embeddings are layer 0
        if self.pre_norm:
            hidden += drop(self.attention(self.attention_norm(hidden), mask, bias), layer=first)
            return hidden + drop(self.mlp(self.mlp_norm(hidden)), layer=second)
        hidden = self.attention_norm(hidden + drop(self.attention(hidden, mask, bias), layer=first))
        return self.mlp_norm(hidden + drop(self.mlp(hidden), layer=second))


class Attention(nnx.Module):
    """Self-attention, full or within a window, with or without rotary positions."""

    def __init__(self, a: Architecture, layer: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        linear = functools.partial(
            linear_layer, a.hidden_dim, use_bias=a.attention_bias, dtype=dtype, rngs=rngs
        )
        if a.joint_projections:
            self.projections = linear(3 * a.hidden_dim)
        else:
            self.query, self.key, self.value = (linear(a.hidden_dim) for _ in range(3))
        self.output = linear(a.hidden_dim)
        self.joint_projections = a.joint_projections
        self.num_heads = a.num_heads
        self.rotary_base = a.rotary_bases[layer] if a.rotary_bases else None
        self.window = a.windows[layer] if a.windows else None

    def __call__(
        self, hidden: Hidden, mask: TokenMask, bias: Float[Array, "1 n t t"] | None
    ) -> Hidden:
        b, t, h = hidden.shape
        if self.joint_projections:
            projected = jnp.split(self.projections(hidden), 3, axis=-1)
        else:
            projected = [project(hidden) for project in (self.query, self.key, self.value)]
        queries, keys, values = (side.reshape(b, t, self.num_heads, -1) for side in projected)
        if self.rotary_base is not None:
            queries, keys = (rotated(side, base=self.rotary_base) for side in (queries, keys))
        seen = mask[:, None, None, :]
        if self.window is not None:
            seen = seen & _within(self.window, t)
        return self.output(attend(queries, keys, values, bias, seen).reshape(b, t, h))


class MLP(nnx.Module):
    """Two linear layers with an activation between them, optionally gated."""

    def __init__(self, a: Architecture, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        linear = functools.partial(linear_layer, use_bias=a.mlp_bias, dtype=dtype, rngs=rngs)
        self.widen = linear(a.hidden_dim, 2 * a.mlp_dim if a.gated else a.mlp_dim)
        self.narrow = linear(a.mlp_dim, a.hidden_dim)
        self.activation = ACTIVATIONS[a.activation]
        self.gated = a.gated

    def __call__(self, hidden: Hidden) -> Hidden:
        wide = self.widen(hidden)
        if not self.gated:
            return self.narrow(self.activation(wide))
        values, gates = jnp.split(wide, 2, axis=-1)
        return self.narrow(self.activation(values) * gates)


def _within(window: int, t: int) -> Bool[Array, "t t"]:
    places = jnp.arange(t)
    return jnp.abs(places[:, None] - places) <= window


def _relative_bias(table: Float[Array, "r n"], t: int) -> Float[Array, "1 n t t"]:
    return table[relative_buckets(t)].transpose(2, 0, 1)[None]


def relative_buckets(t: int) -> Int[np.ndarray, "t t"]:
    """The bucket of each query's distance to each key.

    One half of the buckets is for keys after the query, the other half for all other keys. Within
    each half, the first buckets hold a single distance each, 0, 1, 2, …; the others cover
    logarithmically growing ranges up to `FURTHEST`.

    Reference:
      Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
      Transformer", 2020, section 2.1.
    """
    relative = np.arange(t)[None, :] - np.arange(t)[:, None]  # key minus query
    half = NUM_BUCKETS // 2
    exact = half // 2
    distance = np.abs(relative)
    # In float32, as in training: float64 could move a distance across a bucket's border.
    log_distance = np.log(np.maximum(distance, 1).astype(np.float32) / exact)
    share = log_distance / math.log(FURTHEST / exact)
    coarse = np.minimum(exact + (share * (half - exact)).astype(int), half - 1)
    return (relative > 0) * half + np.where(distance < exact, distance, coarse)
