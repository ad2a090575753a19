"""The blocks of CLIP, SigLIP, ViT and DINOv2: pre-norm, with learned positions before them."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from jaxcl.models.attention import attend
from jaxcl.models.layers import (
    Hidden,
    Layer,
    TokenMask,
    joined,
    linear_layer,
    row_dropout,
    run_layers,
)
from jaxcl.models.pretrained import config_values
from jaxcl.models.pretrained.activations import ACTIVATIONS
from jaxcl.models.pretrained.config_values import number, size
from jaxcl.models.pretrained.description import Tensor
from jaxcl.models.pretrained.tensor_names import linear_tensors, norm_tensors
from jaxcl.typing import Array, Float, RowKeys

__all__ = [
    "BlockNames",
    "BlockSizes",
    "TowerBlock",
    "TowerMLP",
    "layer_norm",
    "make_blocks",
    "read_sizes",
    "run_blocks",
]


class BlockSizes(NamedTuple):
    """The sizes and variants of all blocks of a tower.

    Attributes:
      hidden_dim: width of the hidden states, a multiple of `num_heads`.
      num_layers: number of blocks, each with attention and an MLP.
      num_heads: number of attention heads.
      mlp_dim: width of the MLP.
      activation: name of the MLP's activation in `ACTIVATIONS`.
      epsilon: added to the variance in layer norms.
      dropout: the dropout rate in pretraining, which is also the default for fine-tuning.
      projection_bias: whether the projections to queries, keys and values have biases.
      causal: whether tokens attend to themselves and previous tokens only.
      layer_scale: whether learned factors scale each feature of the outputs of attention and MLP.
    """

    hidden_dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    activation: str
    epsilon: float
    dropout: float = 0.0
    projection_bias: bool = True
    causal: bool = False
    layer_scale: bool = False


def read_sizes(config: Mapping[str, Any], *, activation: str, epsilon: float) -> BlockSizes:
    """Read the sizes of the blocks from a `config.json`; the defaults are the sizes of ViT-B.

    Args:
      config: the content of the file.
      activation, epsilon: the values of missing keys.
    """
    return BlockSizes(
        hidden_dim=size(config, "hidden_size", 768),
        num_layers=size(config, "num_hidden_layers", 12),
        num_heads=size(config, "num_attention_heads", 12),
        mlp_dim=size(config, "intermediate_size", 3072),
        activation=config_values.activation(config, "hidden_act", activation),
        epsilon=number(config, "layer_norm_eps", epsilon),
    )


class BlockNames(NamedTuple):
    """The tensor names of a family's blocks, without `.weight` and `.bias`.

    Attributes:
      block: the prefix of each block's names; `{}` is replaced by its number.
      norms: norm in a block, such as `"attention_norm"` -> its name in the block.
      linear: linear layer in a block, such as `"attention/query"` -> its name in the block.
      scales: factors in a block, such as `"attention_scale"` -> their name in the block.
    """

    block: str
    norms: Mapping[str, str]
    linear: Mapping[str, str]
    scales: Mapping[str, str] = {}

    def tensors(self, sizes: BlockSizes) -> dict[str, Tensor]:
        """Map the path of each parameter to its tensor."""
        tensors: dict[str, Tensor] = {}
        for layer in range(sizes.num_layers):
            at, block = f"blocks/{layer}/", self.block.format(layer)
            for path, name in self.norms.items():
                tensors |= norm_tensors(at + path, block + name, bias=True)
            for path, name in self.linear.items():
                projects = path in ("attention/query", "attention/key", "attention/value")
                bias = sizes.projection_bias or not projects
                tensors |= linear_tensors(at + path, block + name, bias=bias)
            for path, name in self.scales.items():
                tensors[at + path] = Tensor(block + name)
        return tensors


def make_blocks(sizes: BlockSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> list["TowerBlock"]:
    """Build the blocks of a tower.

    Raises:
      ValueError: if the width does not divide over the heads.
    """
    if sizes.hidden_dim % sizes.num_heads:
        raise ValueError(
            f"config.json: a width of {sizes.hidden_dim} does not divide over {sizes.num_heads} "
            "heads"
        )
    return [TowerBlock(sizes, dtype=dtype, rngs=rngs) for _ in range(sizes.num_layers)]


def run_blocks(
    blocks: Sequence["TowerBlock"],
    hidden: Hidden,
    mask: TokenMask | None,
    rngs: RowKeys | None,
    *,
    remat: bool,
) -> Hidden:
    """Run the blocks of a tower in sequence.

    With `remat`, which large models need, the blocks run as one compiled loop, so that 24 blocks
    compile as fast as one, and sharded parameters are gathered one block at a time.

    Args:
      blocks: the result of `make_blocks`.
      hidden: the input of the first block.
      mask: `True` for the tokens to attend to; `None` for all.
      rngs: a random key per row for dropout, or `None` for evaluation.
      remat: keep one activation per block for the backward pass, and recompute the others.
    """
    if remat:
        stack = joined(blocks, dtype=hidden.dtype)
        return run_layers(stack, hidden, mask, rngs, num_layers=len(blocks), remat=True)
    for layer, block in enumerate(blocks):
        hidden = block(hidden, mask, rngs, layer)
    return hidden


def layer_norm(sizes: BlockSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """A layer norm with the width and epsilon of the blocks."""
    # The fast variance subtracts two large numbers when the mean is far from 0.
    return nnx.LayerNorm(
        sizes.hidden_dim, epsilon=sizes.epsilon, use_fast_variance=False, dtype=dtype, rngs=rngs
    )


class TowerBlock(nnx.Module):
    """Self-attention and an MLP, each with a norm before it, a residual and dropout."""

    def __init__(self, sizes: BlockSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        def scale() -> nnx.Param | None:
            return nnx.Param(jnp.ones((sizes.hidden_dim,))) if sizes.layer_scale else None

        self.attention_norm = layer_norm(sizes, dtype=dtype, rngs=rngs)
        self.attention = TowerAttention(sizes, dtype=dtype, rngs=rngs)
        self.attention_scale = scale()
        self.mlp_norm = layer_norm(sizes, dtype=dtype, rngs=rngs)
        self.mlp = TowerMLP(sizes, dtype=dtype, rngs=rngs)
        self.mlp_scale = scale()
        self.dropout = sizes.dropout

    def __call__(
        self, hidden: Hidden, mask: TokenMask | None, rngs: RowKeys | None, layer: Layer
    ) -> Hidden:
        drop = functools.partial(row_dropout, rngs=rngs, rate=self.dropout)
        mixed = _scaled(self.attention(self.attention_norm(hidden), mask), self.attention_scale)
        hidden += drop(mixed, layer=1 + 2 * layer)  # the embeddings are layer 0
        changed = _scaled(self.mlp(self.mlp_norm(hidden)), self.mlp_scale)
        return hidden + drop(changed, layer=2 + 2 * layer)


def _scaled(values: Hidden, scale: nnx.Param | None) -> Hidden:
    return values if scale is None else values * scale[...].astype(values.dtype)


class TowerAttention(nnx.Module):
    """Self-attention, bidirectional or causal."""

    def __init__(self, sizes: BlockSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        linear = functools.partial(
            linear_layer, sizes.hidden_dim, sizes.hidden_dim, dtype=dtype, rngs=rngs
        )
        self.query, self.key, self.value = (
            linear(use_bias=sizes.projection_bias) for _ in range(3)
        )
        self.output = linear()
        self.num_heads = sizes.num_heads
        self.causal = sizes.causal

    def __call__(self, hidden: Hidden, mask: TokenMask | None) -> Hidden:
        b, t, h = hidden.shape
        queries, keys, values = (
            project(hidden).reshape(b, t, self.num_heads, -1)
            for project in (self.query, self.key, self.value)
        )
        seen = None if mask is None else mask[:, None, None, :]
        if self.causal:
            before = jnp.tril(jnp.ones((t, t), bool))
            seen = jnp.broadcast_to(before if seen is None else seen & before, (b, 1, t, t))
        return self.output(attend(queries, keys, values, None, seen).reshape(b, t, h))


class TowerMLP(nnx.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, sizes: BlockSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        linear = functools.partial(linear_layer, dtype=dtype, rngs=rngs)
        self.widen = linear(sizes.hidden_dim, sizes.mlp_dim)
        self.narrow = linear(sizes.mlp_dim, sizes.hidden_dim)
        self.activation = ACTIVATIONS[sizes.activation]

    def __call__(self, hidden: Float[Array, "b t h"]) -> Float[Array, "b t h"]:
        return self.narrow(self.activation(self.widen(hidden)))
