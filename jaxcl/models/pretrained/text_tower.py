"""A configurable text transformer that covers the text towers of CLIP and SigLIP."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcl.models.layers import TokenMask, activation_dtype, check_length, row_dropout
from jaxcl.models.pretrained.description import PLAIN, Computation, Tensor
from jaxcl.models.pretrained.tensor_names import linear_tensors, norm_tensors
from jaxcl.models.pretrained.tower_blocks import (
    BlockNames,
    BlockSizes,
    layer_norm,
    make_blocks,
    run_blocks,
)
from jaxcl.typing import Array, Embeddings, Int, RowKeys, Tokens

__all__ = ["TextArchitecture", "TextNames", "TextTower"]

_LARGEST_ID = 2
"""The `end_token` in old config files, where the token with the largest id ends a text."""


class TextArchitecture(NamedTuple):
    """The sizes and variants of a text tower.

    Attributes:
      sizes: the sizes of the blocks. Without causal attention, all texts are padded to
        `max_tokens` and attend to the padding, as in the training of SigLIP.
      vocabulary_size: rows of the token table.
      max_tokens: rows of the position table.
      end_token: the token whose state is pooled, at its first occurrence; 2 for the token with the
        largest id. `None` for the last position. A text without the token is pooled at its first
        token, as in transformers, so its embedding hardly depends on the text.
      padding_token: the id of padding tokens.
      projection_dim: width of a linear layer after pooling; `None` for no such layer.
      projection_bias: whether the linear layer after pooling has a bias.
    """

    sizes: BlockSizes
    vocabulary_size: int
    max_tokens: int
    end_token: int | None
    padding_token: int
    projection_dim: int | None
    projection_bias: bool

    @property
    def dim(self) -> int:
        """The width of the embeddings."""
        return self.projection_dim or self.sizes.hidden_dim

    @property
    def required_token(self) -> int | None:
        """The token that every text must have; `None` if there is none."""
        return None if self.end_token == _LARGEST_ID else self.end_token


class TextNames(NamedTuple):
    """The tensor names of a family of text towers, without `.weight` and `.bias`."""

    tokens: str
    positions: str
    blocks: BlockNames
    final_norm: str
    projection: str

    def tensors(self, a: TextArchitecture) -> dict[str, Tensor]:
        """Map the path of each parameter to its tensor."""
        tensors = {
            "token_table": Tensor(f"{self.tokens}.weight"),
            "position_table": Tensor(f"{self.positions}.weight"),
            **self.blocks.tensors(a.sizes),
            **norm_tensors("final_norm", self.final_norm, bias=True),
        }
        if a.projection_dim is not None:
            tensors |= linear_tensors("projection", self.projection, bias=a.projection_bias)
        return tensors


class TextTower(nnx.Module):
    """Embed texts with the text tower of CLIP or SigLIP.

    Args:
      architecture: sizes and variants.
      computation: the dropout rate, the recomputation and the type of activations.
      rngs: random streams for the initial parameters.

    Raises:
      ValueError: if the width does not divide over the heads.

    Reference:
      Radford et al., "Learning Transferable Visual Models From Natural Language Supervision"
      (CLIP), 2021; Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (SigLIP), 2023.
    """

    def __init__(
        self, architecture: TextArchitecture, computation: Computation = PLAIN, *, rngs: nnx.Rngs
    ):
        a = architecture
        sizes = computation.of(a.sizes)
        dtype = activation_dtype(computation.compute_dtype)

        def table(rows: int) -> nnx.Param:
            return nnx.Param(0.02 * jax.random.normal(rngs.params(), (rows, sizes.hidden_dim)))

        self.token_table = table(a.vocabulary_size)
        self.position_table = table(a.max_tokens)
        self.blocks = nnx.List(make_blocks(sizes, dtype=dtype, rngs=rngs))
        self.final_norm = layer_norm(sizes, dtype=dtype, rngs=rngs)
        self.projection = (
            None
            if a.projection_dim is None
            else nnx.Linear(
                sizes.hidden_dim,
                a.projection_dim,
                use_bias=a.projection_bias,
                dtype=dtype,
                rngs=rngs,
            )
        )
        self.architecture = a
        self.dropout = sizes.dropout
        self.remat = computation.remat
        self.dtype = dtype

    def __call__(self, tokens: Tokens, mask: TokenMask, rngs: RowKeys | None = None) -> Embeddings:
        """Embed texts, in at least float32; the arguments are as for `Transformer`."""
        a = self.architecture
        check_length(tokens, a.max_tokens)
        positions = _place(tokens, mask, a)
        seen: TokenMask | None = mask
        if not a.sizes.causal:
            rest = ((0, 0), (0, a.max_tokens - tokens.shape[1]))
            filled = jnp.where(mask, tokens, a.padding_token)
            tokens, seen = jnp.pad(filled, rest, constant_values=a.padding_token), None
        hidden = self.token_table[...][tokens] + self.position_table[: tokens.shape[1]]
        hidden = row_dropout(hidden.astype(self.dtype), rngs, rate=self.dropout, layer=0)
        hidden = run_blocks(self.blocks, hidden, seen, rngs, remat=self.remat)
        pooled = self.final_norm(
            jnp.take_along_axis(hidden, positions[:, None, None], axis=1)[:, 0]
        )
        if self.projection is not None:
            pooled = self.projection(pooled)
        return pooled.astype(jnp.promote_types(pooled.dtype, jnp.float32))


def _place(tokens: Tokens, mask: TokenMask, a: TextArchitecture) -> Int[Array, " b"]:
    """The position whose state is pooled."""
    if a.end_token is None:
        return jnp.full(len(tokens), a.max_tokens - 1)
    if a.end_token == _LARGEST_ID:
        return jnp.where(mask, tokens, -1).argmax(1)
    return ((tokens == a.end_token) & mask).argmax(1)
