"""The vision transformer: the blocks of `TransformerEncoder` over the patches of an image."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxcl.models.attention import attend
from jaxcl.models.layers import Hidden, check_name, linear_layer, row_dropout
from jaxcl.models.transformer import BlockShape, check_blocks, make_blocks, run_blocks
from jaxcl.models.vision.entry import Means, PixelRule, Spreads
from jaxcl.models.vision.image_encoder import HALF, ImageEncoder, Pixels, ProjectionHead
from jaxcl.typing import Array, Float, PositiveShare, Rate, RowKeys, Size, check_arguments

__all__ = ["POOLINGS", "POSITIONS", "ViTEncoder", "sincos_positions"]

POOLINGS = ("mean", "cls", "attention")
POSITIONS = ("learned", "sincos")

_MAX_WAVELENGTH = 10_000.0


@check_arguments
class ViTEncoder(ImageEncoder):
    """A vision transformer, ViT-S/16 by default.

    Args:
      loaded_size: height and width of the images in the data (`data.images.size`).
      dim: dimension of the embeddings.
      image_size: height and width of the images that the encoder reads, a multiple of `patch_size`;
        others are resized. `None` uses `loaded_size`.
      patch_size: height and width of a patch, in pixels.
      hidden_dim: dimension of the hidden states, a multiple of `num_heads`.
      num_layers: number of blocks, each with attention and an MLP.
      num_heads: number of attention heads.
      mlp_dim: dimension of the MLP.
      positions: `"learned"`, a table with an entry for each patch, or `"sincos"`, fixed sines and
        cosines of row and column.
      pooling: `"mean"` over the patches; `"cls"`, the state of a class token that precedes them; or
        `"attention"`, a learned query that attends to all patches, followed by an MLP.
      head: the widths of the hidden layers of the projection head; `()` for a linear layer.
      mean, std: the mean and standard deviation of the pixels in [0, 1], by channel.
      kept: the fraction of height and width that a centre crop keeps, before an image is resized.
      dropout: dropout rate of the patch embeddings and of the two outputs of each block.
      attention: `"xla"`, which runs everywhere, or `"cudnn"`, cuDNN's fused attention on NVIDIA
        GPUs, which needs 16-bit activations.
      remat: keep one activation per block for the backward pass, and recompute the others.
      scan_layers: scan the blocks in one compiled loop, with parameters stacked along a leading
        axis of layers.
      compute_dtype: type of activations; `None` uses bfloat16 on accelerators and float32
        elsewhere. Parameters, and sums in norms and softmax, are always float32.
      rngs: random streams for the initial parameters.

    Raises:
      ValueError: for an unknown name, an option out of range, sizes that do not divide, or cuDNN's
        attention with activations that are not 16 bits wide.

    Reference:
      Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021; sines and cosines, and
      mean pooling: Beyer et al., "Better plain ViT baselines for ImageNet-1k", 2022; attention
      pooling: Zhai et al., "Scaling Vision Transformers", 2022.
    """

    def __init__(
        self,
        loaded_size: int,
        *,
        dim: int,
        image_size: Size | None = None,
        patch_size: Size = 16,
        hidden_dim: Size = 384,
        num_layers: Size = 12,
        num_heads: Size = 6,
        mlp_dim: Size = 1536,
        positions: str = "learned",
        pooling: str = "mean",
        head: tuple[Size, ...] = (),
        mean: Means = HALF,
        std: Spreads = HALF,
        kept: PositiveShare = 1.0,
        dropout: Rate = 0.0,
        attention: str = "xla",
        remat: bool = False,
        scan_layers: bool = False,
        compute_dtype: str | None = None,
        rngs: nnx.Rngs,
    ):
        size = image_size or loaded_size
        check_name("positions", positions, POSITIONS)
        check_name("pooling", pooling, POOLINGS)
        _check_sizes(size, patch_size, hidden_dim, positions)
        super().__init__(PixelRule(size, mean, std, kept), compute_dtype=compute_dtype)
        dtype = self.dtype
        shape = BlockShape(num_heads, mlp_dim, attention, "pre", dropout, dtype)
        check_blocks(hidden_dim, shape)
        normal = jax.nn.initializers.normal(0.02)
        num_patches = (size // patch_size) ** 2
        self.patches = linear_layer(3 * patch_size**2, hidden_dim, dtype=dtype, rngs=rngs)
        self.position_table = (
            nnx.Param(normal(rngs.params(), (num_patches, hidden_dim)))
            if positions == "learned"
            else None
        )
        self.class_token = (
            nnx.Param(normal(rngs.params(), (hidden_dim,))) if pooling == "cls" else None
        )
        self.blocks: Any = make_blocks(
            hidden_dim, shape, num_layers=num_layers, scan=scan_layers, rngs=rngs
        )
        self.norm = nnx.LayerNorm(hidden_dim, dtype=dtype, rngs=rngs)
        self.pool = (
            AttentionPool(hidden_dim, num_heads, mlp_dim, dtype=dtype, rngs=rngs)
            if pooling == "attention"
            else None
        )
        self.head = ProjectionHead(hidden_dim, head, dim, dtype=dtype, rngs=rngs)
        self.patch_size = patch_size
        self.dropout = dropout
        self.num_layers = num_layers
        self.remat = remat

    def backbone(self, pixels: Pixels, rngs: RowKeys | None) -> Float[Array, "b h"]:
        """Compute the features of images below the projection head."""
        hidden = self._embed(pixels)
        hidden = row_dropout(hidden, rngs, rate=self.dropout, layer=0)
        hidden = run_blocks(  # without a mask, since all patches are attended to
            self.blocks, hidden, None, rngs, num_layers=self.num_layers, remat=self.remat
        )
        if self.class_token is not None:
            return self.norm(hidden[:, 0])
        hidden = self.norm(hidden)
        if self.pool is not None:
            return self.pool(hidden)
        return hidden.mean(1, dtype=jnp.promote_types(hidden.dtype, jnp.float32))

    def _embed(self, pixels: Pixels) -> Hidden:
        b, size, p = pixels.shape[0], pixels.shape[1], self.patch_size
        grid = size // p
        patches = pixels.reshape(b, grid, p, grid, p, 3).swapaxes(2, 3)
        hidden = self.patches(patches.reshape(b, grid**2, 3 * p**2))
        if self.position_table is not None:
            positions = self.position_table[...]
        else:
            positions = jnp.asarray(sincos_positions(grid, hidden.shape[-1]))
        hidden += positions.astype(hidden.dtype)
        if self.class_token is None:
            return hidden
        first = self.class_token[...].astype(hidden.dtype)
        return jnp.concatenate([jnp.broadcast_to(first, (b, 1, hidden.shape[-1])), hidden], axis=1)


def _check_sizes(size: int, patch_size: int, hidden_dim: int, positions: str) -> None:
    if size % patch_size:
        raise ValueError(
            f"images of {size} pixels do not divide into patches of patch_size={patch_size}; set "
            "image_size to a multiple"
        )
    if positions == "sincos" and (hidden_dim % 4 or hidden_dim < 8):
        raise ValueError(
            f"hidden_dim={hidden_dim} with positions='sincos'; use a multiple of 4, at least 8"
        )


@functools.cache
def sincos_positions(grid: int, width: int) -> Float[np.ndarray, "p h"]:
    r"""Fixed positions of the patches of a square image, row by row.

    With $n$ = `width` / 4 frequencies $\omega_k = 10000^{-k/(n-1)}$, the patch in row $r$ and
    column $c$ has $[\sin \omega c, \cos \omega c, \sin \omega r, \cos \omega r]$.

    Args:
      grid: the number of patches along each axis.
      width: the dimension of the positions, a multiple of 4.
    """
    count = width // 4
    frequencies = _MAX_WAVELENGTH ** -(np.arange(count) / (count - 1))
    row, column = (axis.ravel()[:, None] * frequencies for axis in np.mgrid[:grid, :grid])
    parts = [np.sin(column), np.cos(column), np.sin(row), np.cos(row)]
    return np.concatenate(parts, axis=1).astype(np.float32)


class AttentionPool(nnx.Module):
    """A learned query that attends to all patches, followed by an MLP with a residual."""

    def __init__(
        self, hidden_dim: int, num_heads: int, mlp_dim: int, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        linear = functools.partial(linear_layer, dtype=dtype, rngs=rngs)
        self.probe = nnx.Param(jax.nn.initializers.normal(0.02)(rngs.params(), (hidden_dim,)))
        self.query = linear(hidden_dim, hidden_dim)
        self.keys_values = linear(hidden_dim, 2 * hidden_dim)
        self.output = linear(hidden_dim, hidden_dim)
        self.norm = nnx.LayerNorm(hidden_dim, dtype=dtype, rngs=rngs)
        self.widen = linear(hidden_dim, mlp_dim)
        self.narrow = linear(mlp_dim, hidden_dim)
        self.num_heads = num_heads

    def __call__(self, hidden: Hidden) -> Float[Array, "b h"]:
        b, t, h = hidden.shape
        heads = self.num_heads, h // self.num_heads
        query = jnp.broadcast_to(self.query(self.probe[...]), (b, 1, h)).reshape(b, 1, *heads)
        keys_values = self.keys_values(hidden).reshape(b, t, 2, *heads)
        mixed = attend(query, keys_values[:, :, 0], keys_values[:, :, 1], None, None)
        pooled = self.output(mixed.reshape(b, h))
        return pooled + self.narrow(jax.nn.gelu(self.widen(self.norm(pooled))))
