"""The transformer encoder: BERT's family, pre-LN or post-LN."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcl.models.attention import attend
from jaxcl.models.layers import (
    DEFAULT_MAX_TOKENS,
    POOLINGS,
    Hidden,
    Layer,
    TokenMask,
    activation_dtype,
    check_length,
    check_name,
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
from jaxcl.typing import Embeddings, PyTree, Rate, RowKeys, Size, check_arguments

__all__ = ["ATTENTIONS", "NORM_POSITIONS", "TransformerEncoder"]

ATTENTIONS = ("xla", "cudnn")
NORM_POSITIONS = ("pre", "post")

_gelu = saving_slope(jax.nn.gelu)


@check_arguments
class TransformerEncoder(nnx.Module):
    """A bidirectional transformer over the tokens of a text.

    Args:
      vocabulary_size: number of token ids; id 0 is padding if inputs have no `"length"`.
      dim: dimension of the embeddings.
      max_tokens: maximum length of a text, in tokens; each position has a learned embedding.
      hidden_dim: dimension of the hidden states, a multiple of `num_heads`.
      num_layers: number of blocks, each with attention and an MLP.
      num_heads: number of attention heads.
      mlp_dim: dimension of the MLP.
      attention: `"xla"`, which runs everywhere, or `"cudnn"`, cuDNN's fused attention on NVIDIA
        GPUs. cuDNN needs 16-bit activations, and padding only at the end of a text.
      norm_position: `"pre"` (more stable when training from scratch) or `"post"` (as in BERT).
      pooling: `"mean"` over the tokens, `"cls"` (the first token) or `"last"`.
      dropout: dropout rate of the token embeddings and of the two outputs of each block.
      remat: keep one activation per block for the backward pass, and recompute the others.
      scan_layers: scan the blocks in one compiled loop, with parameters stacked along a leading
        axis of layers, so that compile time does not depend on the number of layers.
      compute_dtype: type of activations, such as `"bfloat16"`. `None` uses bfloat16 on accelerators
        and float32 elsewhere. Parameters, and sums in norms and softmax, are always float32.
      rngs: random streams for the initial parameters.

    Raises:
      ValueError: for an unknown name, an option out of range, a `hidden_dim` that `num_heads` does
        not divide, or cuDNN's attention with activations that are not 16 bits wide.

    Reference:
      Vaswani et al., 2017; pre-LN: Xiong et al., "On Layer Normalization in the Transformer
      Architecture", ICML 2020.
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        dim: int,
        max_tokens: Size = DEFAULT_MAX_TOKENS,
        hidden_dim: Size = 384,
        num_layers: Size = 6,
        num_heads: Size = 6,
        mlp_dim: Size = 1536,
        norm_position: str = "pre",
        pooling: str = "mean",
        dropout: Rate = 0.1,
        attention: str = "xla",
        remat: bool = False,
        scan_layers: bool = False,
        compute_dtype: str | None = None,
        rngs: nnx.Rngs,
    ):
        check_name("pooling", pooling, POOLINGS)
        dtype = activation_dtype(compute_dtype)
        shape = BlockShape(num_heads, mlp_dim, attention, norm_position, dropout, dtype)
        check_blocks(hidden_dim, shape)
        scale = jax.nn.initializers.normal(0.02)
        layer_norm = functools.partial(nnx.LayerNorm, hidden_dim, dtype=dtype, rngs=rngs)
        self.token_table = nnx.Param(scale(rngs.params(), (vocabulary_size, hidden_dim)))
        self.position_table = nnx.Param(scale(rngs.params(), (max_tokens, hidden_dim)))
        self.blocks: Any = make_blocks(
            hidden_dim, shape, num_layers=num_layers, scan=scan_layers, rngs=rngs
        )
        # Post-LN normalises the embeddings, pre-LN the output of the last block.
        self.norm = layer_norm()
        self.projection = nnx.Linear(hidden_dim, dim, dtype=dtype, rngs=rngs)
        self.norm_position = norm_position
        self.pooling = pooling
        self.dropout = dropout
        self.num_layers = num_layers
        self.remat = remat
        self.dtype = dtype

    def __call__(self, inputs: PyTree, rngs: RowKeys | None = None) -> Embeddings:
        """Embed `{"tokens": int32[b, t]}`; `rngs`, one key per row, enables dropout."""
        tokens = tokens_of(inputs, "TransformerEncoder")
        check_length(tokens, self.position_table.shape[0])
        mask = token_mask(inputs)
        hidden = self.token_table[...][tokens] + self.position_table[...][None, : tokens.shape[1]]
        hidden = hidden.astype(self.dtype)
        if self.norm_position == "post":
            hidden = self.norm(hidden)
        hidden = row_dropout(hidden, rngs, rate=self.dropout, layer=0)
        hidden = run_blocks(
            self.blocks, hidden, mask, rngs, num_layers=self.num_layers, remat=self.remat
        )
        if self.norm_position == "pre":
            hidden = self.norm(hidden)
        return unit_vectors(self.projection(pool(hidden, mask, pooling=self.pooling)))


class BlockShape(NamedTuple):
    """The options that all blocks of a transformer share; `TransformerEncoder` documents them."""

    num_heads: int
    mlp_dim: int
    attention: str
    norm_position: str
    dropout: float
    dtype: jnp.dtype


def check_blocks(hidden_dim: int, shape: BlockShape) -> None:
    """Raise a `ValueError` for an unknown name, or options of blocks that do not fit together."""
    check_name("attention", shape.attention, ATTENTIONS)
    check_name("norm_position", shape.norm_position, NORM_POSITIONS)
    if hidden_dim % shape.num_heads:
        raise ValueError(
            f"hidden_dim={hidden_dim} does not divide over {shape.num_heads} heads; use a multiple"
        )
    if shape.attention == "cudnn" and shape.dtype.itemsize != 2:
        raise ValueError(
            f"attention='cudnn' with activations of {shape.dtype}; set compute_dtype to "
            "'bfloat16', or attention to 'xla'"
        )


def make_blocks(
    hidden_dim: int, shape: BlockShape, *, num_layers: int, scan: bool, rngs: nnx.Rngs
) -> nnx.Module:
    """Build the blocks of a transformer: a list, or one stacked module to scan over."""

    def make_block(rngs: nnx.Rngs) -> Block:
        return Block(hidden_dim, shape, rngs=rngs)

    if scan:
        return stacked(make_block, rngs, num_layers=num_layers)
    return nnx.List([make_block(rngs) for _ in range(num_layers)])


def run_blocks(
    blocks: Any,
    hidden: Hidden,
    mask: TokenMask | None,
    rngs: RowKeys | None,
    *,
    num_layers: int,
    remat: bool,
) -> Hidden:
    """Run the result of `make_blocks` in sequence; the arguments are as for `run_layers`."""
    if not isinstance(blocks, nnx.List):
        return run_layers(blocks, hidden, mask, rngs, num_layers=num_layers, remat=remat)
    run = nnx.remat(_run_block, static_argnums=4) if remat else _run_block
    for layer, block in enumerate(blocks):
        hidden = run(block, hidden, mask, rngs, layer)
    return hidden


def _run_block(
    block: "Block", hidden: Hidden, mask: TokenMask | None, rngs: RowKeys | None, layer: int
) -> Hidden:
    return block(hidden, mask, rngs, layer)


class Block(nnx.Module):
    """Self-attention and an MLP, each with a residual, a norm and dropout."""

    def __init__(self, hidden_dim: int, shape: BlockShape, *, rngs: nnx.Rngs):
        num_heads, mlp_dim, attention, norm_position, dropout, dtype = shape
        linear = functools.partial(linear_layer, dtype=dtype, rngs=rngs)
        layer_norm = functools.partial(nnx.LayerNorm, hidden_dim, dtype=dtype, rngs=rngs)
        self.attention_norm = layer_norm()
        self.mlp_norm = layer_norm()
        self.projections = linear(hidden_dim, 3 * hidden_dim)
        self.output = linear(hidden_dim, hidden_dim)
        self.widen = linear(hidden_dim, mlp_dim)
        self.narrow = linear(mlp_dim, hidden_dim)
        self.num_heads = num_heads
        self.attention = attention
        self.norm_position = norm_position
        self.dropout = dropout

    def __call__(
        self, hidden: Hidden, mask: TokenMask | None, rngs: RowKeys | None, layer: Layer
    ) -> Hidden:
        drop = functools.partial(row_dropout, rngs=rngs, rate=self.dropout)
        first, second = 1 + 2 * layer, 2 + 2 * layer  # the embeddings are layer 0
        if self.norm_position == "pre":
            hidden += drop(self.attend(self.attention_norm(hidden), mask), layer=first)
            return hidden + drop(self.transform(self.mlp_norm(hidden)), layer=second)
        hidden = self.attention_norm(hidden + drop(self.attend(hidden, mask), layer=first))
        return self.mlp_norm(hidden + drop(self.transform(hidden), layer=second))

    def attend(self, hidden: Hidden, mask: TokenMask | None) -> Hidden:
        b, t, h = hidden.shape
        heads = self.projections(hidden).reshape(b, t, 3, self.num_heads, h // self.num_heads)
        queries, keys, values = (heads[:, :, part] for part in range(3))
        # A row without tokens attends to its first position: a softmax needs at least one key.
        if self.attention == "cudnn":  # lengths, since a mask becomes a full matrix of biases
            lengths = None
            if mask is not None:
                lengths = jnp.maximum(jnp.count_nonzero(mask, axis=1), 1).astype(jnp.int32)
            mixed = jax.nn.dot_product_attention(
                queries, keys, values, key_value_seq_lengths=lengths, implementation="cudnn"
            )
        else:
            seen = None
            if mask is not None:
                attended = mask | (~mask.any(1, keepdims=True) & (jnp.arange(t) == 0))
                seen = attended[:, None, None, :]
            mixed = attend(queries, keys, values, None, seen)
        return self.output(mixed.reshape(b, t, h))

    def transform(self, hidden: Hidden) -> Hidden:
        return self.narrow(_gelu(self.widen(hidden)))
