"""A configurable decoder that covers the pretrained families Mistral, Llama, Qwen and Gemma 3."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxcl.models.attention import attend
from jaxcl.models.decoder import turned
from jaxcl.models.layers import (
    Hidden,
    TokenMask,
    activation_dtype,
    check_length,
    joined,
    linear_layer,
    row_dropout,
    run_layers,
)
from jaxcl.models.pretrained.activations import ACTIVATIONS
from jaxcl.models.pretrained.description import PLAIN, Computation
from jaxcl.models.pretrained.rotary import Rotary, frequencies
from jaxcl.typing import Array, Bool, Float, Int, RowKeys, Tokens

__all__ = ["Decoder", "DecoderArchitecture"]


class DecoderArchitecture(NamedTuple):
    """The sizes and variants of a decoder.

    Attributes:
      vocabulary_size: rows of the token table.
      hidden_dim: width of the hidden states.
      num_layers: number of blocks, each with attention and a gated MLP.
      num_heads: number of query heads.
      num_key_heads: number of heads of keys and values, a divisor of `num_heads`.
      head_dim: width of a head, an even number; heads need not divide `hidden_dim`.
      mlp_dim: width of the MLP.
      activation: name of the MLP's activation in `ACTIVATIONS`.
      epsilon: added to the mean square in norms.
      max_tokens: the maximum length of a text, in tokens.
      rotary: each layer's rotary positions.
      windows: for each layer, the largest distance at which a token attends to another, or `None`
        for any distance.
      causal: whether tokens attend to themselves and previous tokens only.
      projection_bias, output_bias, mlp_bias: whether the projections to queries, keys and values,
        the output of attention, and the MLP have biases.
      head_norms: normalise each head's queries and keys before their rotation.
      output_norms: normalise not only the inputs of attention and MLP, but also the outputs, before
        the residual is added.
      norm_offset: added to the weights of all norms.
      score_scale: the factor of attention scores.
      embedding_scale: the factor of token embeddings.
      dropout: dropout rate of the embeddings and of the two outputs of each block; 0 in
        pretraining.
    """

    vocabulary_size: int
    hidden_dim: int
    num_layers: int
    num_heads: int
    num_key_heads: int
    head_dim: int
    mlp_dim: int
    activation: str
    epsilon: float
    max_tokens: int
    rotary: tuple[Rotary, ...]
    windows: tuple[int | None, ...]
    causal: bool
    projection_bias: bool
    output_bias: bool
    mlp_bias: bool
    head_norms: bool
    score_scale: float
    output_norms: bool = False
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    dropout: float = 0.0


class Decoder(nnx.Module):
    """Compute hidden states of texts with a decoder.

    Each layer has its own parameters, but the compiled program runs all layers as one loop, so that
    a model of 32 layers compiles as fast as one of two. Sharded parameters are gathered one layer
    at a time.

    Args:
      architecture: sizes and variants.
      computation: the dropout rate, the recomputation and the type of activations.
      rngs: random streams for the initial parameters.

    Raises:
      ValueError: if the heads do not divide over the key heads, or have an odd width.

    Reference:
      Jiang et al., "Mistral 7B", 2023; Grattafiori et al., "The Llama 3 Herd of Models", 2024; Yang
      et al., "Qwen3 Technical Report", 2025; Kamath et al., "Gemma 3 Technical Report", 2025.
    """

    def __init__(
        self, architecture: DecoderArchitecture, computation: Computation = PLAIN, *, rngs: nnx.Rngs
    ):
        a = computation.of(architecture)
        if a.num_heads % a.num_key_heads:
            raise ValueError(
                f"config.json: {a.num_heads} heads do not divide over {a.num_key_heads} key heads"
            )
        if a.head_dim % 2:
            raise ValueError(
                f"config.json: heads have the odd width {a.head_dim}; rotary positions need pairs"
            )
        dtype = activation_dtype(computation.compute_dtype)
        table = jax.random.normal(rngs.params(), (a.vocabulary_size, a.hidden_dim))
        self.token_table = nnx.Param(0.02 * table)
        self.blocks = nnx.List([DecoderBlock(a, dtype=dtype, rngs=rngs) for _ in a.windows])
        self.final_norm = RMSNorm(a.hidden_dim, a, dtype=dtype)
        self.architecture = a
        self.remat = computation.remat
        self.dtype = dtype

    def __call__(self, tokens: Tokens, mask: TokenMask, rngs: RowKeys | None = None) -> Hidden:
        """Compute the hidden states of all tokens, as `Transformer` does."""
        a = self.architecture
        check_length(tokens, a.max_tokens)
        hidden = (a.embedding_scale * self.token_table[...][tokens]).astype(self.dtype)
        hidden = run_layers(
            joined(self.blocks, dtype=self.dtype),
            row_dropout(hidden, rngs, rate=a.dropout, layer=0),
            mask,
            rngs,
            num_layers=a.num_layers,
            remat=self.remat,
        )
        return self.final_norm(hidden)


class RMSNorm(nnx.Module):
    """Divide by the root mean square of the features, and multiply by `norm_offset` + weights."""

    def __init__(self, width: int, a: DecoderArchitecture, *, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.full((width,), 1 - a.norm_offset))
        self.offset = a.norm_offset
        self.epsilon = a.epsilon
        self.dtype = dtype

    def __call__(self, values: Float[Array, "... h"]) -> Float[Array, "... h"]:
        wide = values.astype(jnp.promote_types(values.dtype, jnp.float32))
        inverse = lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.epsilon)
        return (wide * inverse * (self.offset + self.scale[...])).astype(self.dtype)


class DecoderBlock(nnx.Module):
    """Self-attention and a gated MLP, each with norms, a residual and dropout.

    All blocks of a decoder have the same structure. Settings that differ between layers are looked
    up by layer number.
    """

    def __init__(self, a: DecoderArchitecture, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        norm = functools.partial(RMSNorm, a.hidden_dim, a, dtype=dtype)
        self.attention_norm = norm()
        self.attention = DecoderAttention(a, dtype=dtype, rngs=rngs)
        self.attention_output_norm = norm() if a.output_norms else _identity
        self.mlp_norm = norm()
        self.mlp = GatedMLP(a, dtype=dtype, rngs=rngs)
        self.mlp_output_norm = norm() if a.output_norms else _identity
        self.dropout = a.dropout

    def __call__(
        self, hidden: Hidden, mask: TokenMask, rngs: RowKeys | None, layer: Int[Array, ""]
    ) -> Hidden:
        drop = functools.partial(row_dropout, rngs=rngs, rate=self.dropout)
        mixed = self.attention(self.attention_norm(hidden), mask, layer)
        hidden += drop(self.attention_output_norm(mixed), layer=1 + 2 * layer)
        changed = self.mlp_output_norm(self.mlp(self.mlp_norm(hidden)))
        return hidden + drop(changed, layer=2 + 2 * layer)


def _identity(values: Float[Array, "... h"]) -> Float[Array, "... h"]:
    return values


class DecoderAttention(nnx.Module):
    """Self-attention with rotary positions, where groups of query heads share a key head."""

    def __init__(self, a: DecoderArchitecture, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        linear = functools.partial(linear_layer, dtype=dtype, rngs=rngs)
        width, key_width = a.num_heads * a.head_dim, a.num_key_heads * a.head_dim
        self.query = linear(a.hidden_dim, width, use_bias=a.projection_bias)
        self.key = linear(a.hidden_dim, key_width, use_bias=a.projection_bias)
        self.value = linear(a.hidden_dim, key_width, use_bias=a.projection_bias)
        self.output = linear(width, a.hidden_dim, use_bias=a.output_bias)
        self.query_norm, self.key_norm = (
            RMSNorm(a.head_dim, a, dtype=dtype) if a.head_norms else _identity for _ in range(2)
        )
        self.architecture = a

    def __call__(self, hidden: Hidden, mask: TokenMask, layer: Int[Array, ""]) -> Hidden:
        a = self.architecture
        b, t, _ = hidden.shape
        queries, keys, values = (
            project(hidden).reshape(b, t, -1, a.head_dim)
            for project in (self.query, self.key, self.value)
        )
        steps = jnp.array([frequencies(rotary, a.head_dim) for rotary in a.rotary])[layer]
        angles = jnp.arange(t)[:, None] * steps
        mixed = attend(
            turned(self.query_norm(queries), angles),
            turned(self.key_norm(keys), angles),
            values,
            None,
            _seen(a, mask, layer),
            scale=a.score_scale,
        )
        return self.output(mixed.reshape(b, t, -1))


class GatedMLP(nnx.Module):
    """Two linear layers, with the hidden values multiplied by the activation of a third layer."""

    def __init__(self, a: DecoderArchitecture, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        linear = functools.partial(linear_layer, use_bias=a.mlp_bias, dtype=dtype, rngs=rngs)
        self.gate, self.widen = (linear(a.hidden_dim, a.mlp_dim) for _ in range(2))
        self.narrow = linear(a.mlp_dim, a.hidden_dim)
        self.activation = ACTIVATIONS[a.activation]

    def __call__(self, hidden: Hidden) -> Hidden:
        return self.narrow(self.activation(self.gate(hidden)) * self.widen(hidden))


def _seen(
    a: DecoderArchitecture, mask: TokenMask, layer: Int[Array, ""]
) -> Bool[Array, "b 1 #t t"]:
    """`True` where a layer's queries may attend to a key."""
    t = mask.shape[1]
    places = jnp.arange(t)
    distance = places[:, None] - places  # query minus key
    seen = mask[:, None, None, :]
    if a.causal:
        seen = seen & (distance >= 0)
    if any(window is not None for window in a.windows):
        windows = np.array([t if window is None else min(window, t) for window in a.windows])
        seen = seen & (jnp.abs(distance) <= jnp.asarray(windows)[layer])
    return seen
