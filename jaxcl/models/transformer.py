"""The transformer encoder: BERT's family, pre-LN or post-LN."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcl.models.layers import PADDING_ID, POOLINGS, pool, row_dropout
from jaxcl.ops.vectors import normalise
from jaxcl.typing import Array, Bool, Embeddings, Float, PyTree, RowKeys

__all__ = ["NORM_POSITIONS", "TransformerEncoder"]

NORM_POSITIONS = ("pre", "post")


class TransformerEncoder(nnx.Module):
    """Embeds a text by self-attention over its tokens.

    Args:
      vocabulary_size: number of token ids; id 0 is padding.
      dim: width of the embeddings.
      max_tokens: the longest text, in tokens; each position has a learned embedding.
      hidden_dim: width inside, a multiple of `num_heads`.
      num_layers: attention and MLP blocks.
      num_heads: attention heads.
      mlp_dim: width of the MLP.
      norm_position: `"pre"` (stable to train from scratch) or `"post"` (as BERT).
      pooling: `"mean"` over the tokens, or `"cls"`, the first.
      dropout: on embeddings and on each block's two outputs, by row.
      remat: keeps one activation per block for the backward pass, and computes the others again.
      compute_dtype: of activations, such as `"bfloat16"`; `None` takes that on accelerators and
        float32 elsewhere. Parameters stay float32, and so do the sums inside norms and softmax.
      rngs: for the initial parameters.

    Raises:
      ValueError: for an unknown name, or heads that do not divide the width.

    Reference:
      Vaswani et al., 2017; pre-LN: Xiong et al., "On Layer Normalization in the Transformer
      Architecture", ICML 2020.
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        dim: int,
        max_tokens: int,
        hidden_dim: int = 384,
        num_layers: int = 6,
        num_heads: int = 6,
        mlp_dim: int = 1536,
        norm_position: str = "pre",
        pooling: str = "mean",
        dropout: float = 0.1,
        remat: bool = False,
        compute_dtype: str | None = None,
        rngs: nnx.Rngs,
    ):
        if norm_position not in NORM_POSITIONS:
            raise ValueError(
                f"norm_position={norm_position!r} is unknown; use one of "
                f"{', '.join(NORM_POSITIONS)}"
            )
        if pooling not in POOLINGS:
            raise ValueError(f"pooling={pooling!r} is unknown; use one of {', '.join(POOLINGS)}")
        if hidden_dim % num_heads:
            raise ValueError(
                f"hidden_dim={hidden_dim} does not divide over {num_heads} heads; use a multiple"
            )
        on_accelerator = jax.default_backend() in ("gpu", "tpu")
        dtype = jnp.dtype(compute_dtype or ("bfloat16" if on_accelerator else "float32"))
        scale = jax.nn.initializers.normal(0.02)
        layer_norm = functools.partial(nnx.LayerNorm, hidden_dim, dtype=dtype, rngs=rngs)
        self.token_table = nnx.Param(scale(rngs.params(), (vocabulary_size, hidden_dim)))
        self.position_table = nnx.Param(scale(rngs.params(), (max_tokens, hidden_dim)))
        self.blocks = nnx.List(
            [
                Block(
                    hidden_dim,
                    num_heads=num_heads,
                    mlp_dim=mlp_dim,
                    norm_position=norm_position,
                    dropout=dropout,
                    first_dropout=1 + 2 * layer,
                    dtype=dtype,
                    rngs=rngs,
                )
                for layer in range(num_layers)
            ]
        )
        # Post-LN normalises the embeddings, pre-LN what leaves the last block.
        self.norm = layer_norm()
        self.projection = nnx.Linear(hidden_dim, dim, dtype=dtype, rngs=rngs)
        self.norm_position = norm_position
        self.pooling = pooling
        self.dropout = dropout
        self.remat = remat
        self.dtype = dtype

    def __call__(self, inputs: PyTree, rngs: RowKeys | None = None) -> Embeddings:
        """Embeds `{"tokens": int32[b, t]}`; with `rngs` (one key per row) it drops out."""
        tokens = inputs["tokens"]
        longest = self.position_table.shape[0]
        if tokens.shape[1] > longest:
            raise ValueError(f"texts of {tokens.shape[1]} tokens; this encoder reads {longest}")
        mask = tokens != PADDING_ID
        hidden = self.token_table[...][tokens] + self.position_table[...][: tokens.shape[1]]
        hidden = hidden.astype(self.dtype)
        if self.norm_position == "post":
            hidden = self.norm(hidden)
        hidden = row_dropout(hidden, rngs, rate=self.dropout, layer=0)
        run = nnx.remat(_run_block) if self.remat else _run_block
        for block in self.blocks:
            hidden = run(block, hidden, mask, rngs)
        if self.norm_position == "pre":
            hidden = self.norm(hidden)
        vectors = self.projection(pool(hidden, mask, pooling=self.pooling))
        # At least float32, or the norm is a bf16 sum.
        return normalise(vectors.astype(jnp.promote_types(vectors.dtype, jnp.float32)))


def _run_block(
    block: "Block", hidden: Float[Array, "b t h"], mask: Bool[Array, "b t"], rngs: RowKeys | None
) -> Float[Array, "b t h"]:
    return block(hidden, mask, rngs)


class Block(nnx.Module):
    """Self-attention and an MLP, each with a residual, a norm and dropout."""

    def __init__(
        self,
        hidden_dim: int,
        *,
        num_heads: int,
        mlp_dim: int,
        norm_position: str,
        dropout: float,
        first_dropout: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        linear = functools.partial(nnx.Linear, dtype=dtype, rngs=rngs)
        layer_norm = functools.partial(nnx.LayerNorm, hidden_dim, dtype=dtype, rngs=rngs)
        self.attention_norm = layer_norm()
        self.mlp_norm = layer_norm()
        self.projections = linear(hidden_dim, 3 * hidden_dim)
        self.output = linear(hidden_dim, hidden_dim)
        self.widen = linear(hidden_dim, mlp_dim)
        self.narrow = linear(mlp_dim, hidden_dim)
        self.num_heads = num_heads
        self.norm_position = norm_position
        self.dropout = dropout
        self.first_dropout = first_dropout

    def __call__(
        self, hidden: Float[Array, "b t h"], mask: Bool[Array, "b t"], rngs: RowKeys | None
    ) -> Float[Array, "b t h"]:
        drop = functools.partial(row_dropout, rngs=rngs, rate=self.dropout)
        first, second = self.first_dropout, self.first_dropout + 1
        if self.norm_position == "pre":
            hidden += drop(self.attend(self.attention_norm(hidden), mask), layer=first)
            return hidden + drop(self.transform(self.mlp_norm(hidden)), layer=second)
        hidden = self.attention_norm(hidden + drop(self.attend(hidden, mask), layer=first))
        return self.mlp_norm(hidden + drop(self.transform(hidden), layer=second))

    def attend(
        self, hidden: Float[Array, "b t h"], mask: Bool[Array, "b t"]
    ) -> Float[Array, "b t h"]:
        b, t, h = hidden.shape
        heads = self.projections(hidden).reshape(b, t, 3, self.num_heads, h // self.num_heads)
        # A row without any token attends to all of its padding: a softmax needs something.
        attended = mask | ~mask.any(1, keepdims=True)
        mixed = jax.nn.dot_product_attention(
            heads[:, :, 0], heads[:, :, 1], heads[:, :, 2], mask=attended[:, None, None, :]
        )
        return self.output(mixed.reshape(b, t, h))

    def transform(self, hidden: Float[Array, "b t h"]) -> Float[Array, "b t h"]:
        return self.narrow(jax.nn.gelu(self.widen(hidden)))
