"""A configurable vision transformer that covers CLIP, SigLIP, ViT and DINOv2."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxcl.models.attention import attend
from jaxcl.models.layers import Hidden, activation_dtype, linear_layer, row_dropout
from jaxcl.models.pretrained.description import PLAIN, Computation, Tensor
from jaxcl.models.pretrained.tensor_names import linear_tensors, norm_tensors
from jaxcl.models.pretrained.tower_blocks import (
    BlockNames,
    BlockSizes,
    TowerMLP,
    layer_norm,
    make_blocks,
    run_blocks,
)
from jaxcl.models.resizing import keys_cubic
from jaxcl.typing import Array, Embeddings, Float, RowKeys

__all__ = ["ImageArchitecture", "ImageNames", "ImageTower", "position_weights"]

Pixels = Float[Array, "b y x c"]


class ImageArchitecture(NamedTuple):
    """The sizes and variants of a vision transformer.

    Attributes:
      sizes: the sizes of the blocks.
      image_size: height and width of the images in pretraining, which determine the positions.
      patch_size: height and width of a patch.
      pooling: `"cls"` for the state of the class token, `"mean"` for the mean over the patches, or
        `"attention"` for a head that attends to all patches.
      projection_dim: width of a linear layer after pooling; `None` for no such layer.
      class_token: whether a learned token precedes the patches.
      patch_bias: whether the projection of the patches has a bias.
      embedding_norm: whether a norm precedes the blocks.
      unit_axes: number of axes of length 1 with which the class token and the position table begin
        in the files.
    """

    sizes: BlockSizes
    image_size: int
    patch_size: int
    pooling: str
    projection_dim: int | None = None
    class_token: bool = True
    patch_bias: bool = True
    embedding_norm: bool = False
    unit_axes: int = 0

    @property
    def grid(self) -> int:
        """The number of patches along each axis in pretraining."""
        return self.image_size // self.patch_size

    @property
    def dim(self) -> int:
        """The width of the embeddings."""
        return self.projection_dim or self.sizes.hidden_dim


class ImageNames(NamedTuple):
    """The tensor names of a family of vision transformers, without `.weight` and `.bias`.

    Attributes:
      patches: the projection of the patches.
      class_token: the class token, as a complete name.
      positions: the position table, as a complete name.
      blocks: the blocks.
      final_norm: the norm after the blocks.
      embedding_norm: the norm before the blocks, if there is one.
      head: the head of attention pooling, if there is one.
      projection: the linear layer after pooling, if there is one.
    """

    patches: str
    class_token: str
    positions: str
    blocks: BlockNames
    final_norm: str
    embedding_norm: str = ""
    head: str = ""
    projection: str = ""

    def tensors(self, a: ImageArchitecture) -> dict[str, Tensor]:
        """Map the path of each parameter to its tensor."""
        tensors = {
            "embeddings/kernel": Tensor(f"{self.patches}.weight", transposed=True),
            "embeddings/position_table": Tensor(self.positions),
        }
        if a.patch_bias:
            tensors["embeddings/bias"] = Tensor(f"{self.patches}.bias")
        if a.class_token:
            tensors["embeddings/class_token"] = Tensor(self.class_token)
        if a.embedding_norm:
            tensors |= norm_tensors("norm", self.embedding_norm, bias=True)
        tensors |= self.blocks.tensors(a.sizes)
        tensors |= norm_tensors("final_norm", self.final_norm, bias=True)
        if a.pooling == "attention":
            tensors |= {
                "head/probe": Tensor(f"{self.head}.probe"),
                "head/projections/kernel": Tensor(f"{self.head}.attention.in_proj_weight", True),
                "head/projections/bias": Tensor(f"{self.head}.attention.in_proj_bias"),
                **norm_tensors("head/norm", f"{self.head}.layernorm", bias=True),
                **linear_tensors("head/output", f"{self.head}.attention.out_proj", bias=True),
                **linear_tensors("head/mlp/widen", f"{self.head}.mlp.fc1", bias=True),
                **linear_tensors("head/mlp/narrow", f"{self.head}.mlp.fc2", bias=True),
            }
        if a.projection_dim is not None:
            tensors |= linear_tensors("projection", self.projection, bias=False)
        return tensors


class ImageTower(nnx.Module):
    """Embed images with a vision transformer.

    For images of a different size than in pretraining, positions are interpolated
    (`position_weights`).

    Args:
      architecture: sizes and variants.
      computation: the dropout rate, the recomputation and the type of activations.
      rngs: random streams for the initial parameters.

    Raises:
      ValueError: if the width does not divide over the heads, or an image is smaller than a patch.

    Reference:
      Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021; Radford et al., "Learning
      Transferable Visual Models From Natural Language Supervision" (CLIP), 2021; Zhai et al.,
      "Sigmoid Loss for Language Image Pre-Training" (SigLIP), 2023; Oquab et al., "DINOv2", 2023.
    """

    def __init__(
        self, architecture: ImageArchitecture, computation: Computation = PLAIN, *, rngs: nnx.Rngs
    ):
        a = architecture
        sizes = computation.of(a.sizes)
        if not a.grid:
            raise ValueError(
                f"config.json: patches of {a.patch_size} pixels do not fit in images of "
                f"{a.image_size}"
            )
        dtype = activation_dtype(computation.compute_dtype)
        self.embeddings = PatchEmbeddings(a, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(sizes, dtype=dtype, rngs=rngs) if a.embedding_norm else _identity
        self.blocks = nnx.List(make_blocks(sizes, dtype=dtype, rngs=rngs))
        self.final_norm = layer_norm(sizes, dtype=dtype, rngs=rngs)
        self.head = (
            AttentionPooling(sizes, dtype=dtype, rngs=rngs) if a.pooling == "attention" else None
        )
        self.projection = (
            None
            if a.projection_dim is None
            else nnx.Linear(
                sizes.hidden_dim, a.projection_dim, use_bias=False, dtype=dtype, rngs=rngs
            )
        )
        self.architecture = a
        self.dropout = sizes.dropout
        self.remat = computation.remat

    def __call__(self, pixels: Pixels, rngs: RowKeys | None = None) -> Embeddings:
        """Embed images.

        Args:
          pixels: normalised pixels; pixels at the right and the bottom that do not fill a whole
            patch are left out.
          rngs: a random key per row for dropout, or `None` for evaluation.

        Returns:
          One embedding per image, in at least float32.
        """
        a = self.architecture
        hidden = self.norm(self.embeddings(pixels))
        hidden = row_dropout(hidden, rngs, rate=self.dropout, layer=0)
        hidden = run_blocks(self.blocks, hidden, None, rngs, remat=self.remat)
        if a.pooling == "cls":
            hidden = hidden[:, :1]
        hidden = self.final_norm(hidden)
        if self.head is not None:
            pooled = self.head(hidden)
        else:
            patches = hidden[:, 1:] if a.pooling == "mean" and a.class_token else hidden
            pooled = patches.mean(1, dtype=jnp.promote_types(hidden.dtype, jnp.float32))
        if self.projection is not None:
            pooled = self.projection(pooled)
        return pooled.astype(jnp.promote_types(pooled.dtype, jnp.float32))


def _identity(hidden: Hidden) -> Hidden:
    return hidden


class PatchEmbeddings(nnx.Module):
    """Project the patches of images, and add a class token and positions.

    The axes of the kernel are the columns and rows of a patch, the channels and the features: the
    axes in the file, reversed.
    """

    def __init__(self, a: ImageArchitecture, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        h, p = a.sizes.hidden_dim, a.patch_size

        def normal(*shape: int, scale: float = 0.02) -> nnx.Param:
            return nnx.Param(scale * jax.random.normal(rngs.params(), shape))

        self.kernel = normal(p, p, 3, h, scale=1 / math.sqrt(3 * p * p))
        self.bias = nnx.Param(jnp.zeros((h,))) if a.patch_bias else None
        units = (1,) * a.unit_axes
        self.class_token = normal(*units, *(1,) * bool(units), h) if a.class_token else None
        num_positions = a.grid**2 + a.class_token
        self.position_table = normal(*units, num_positions, h)
        self.architecture = a
        self.dtype = dtype

    def __call__(self, pixels: Pixels) -> Hidden:
        a = self.architecture
        b, p, h = len(pixels), a.patch_size, a.sizes.hidden_dim
        rows, columns = (length // p for length in pixels.shape[1:3])
        patches = pixels[:, : rows * p, : columns * p].reshape(b, rows, p, columns, p, 3)
        hidden = jnp.einsum(
            "brycxd,xydh->brch", patches.astype(self.dtype), self.kernel[...].astype(self.dtype)
        )
        if self.bias is not None:
            hidden += self.bias[...].astype(self.dtype)
        table = self.position_table[...].reshape(-1, h)
        of_token, of_patches = table[: a.class_token], table[a.class_token :]
        if (rows, columns) != (a.grid, a.grid):
            of_patches = _interpolated(of_patches, a.grid, rows, columns)
        hidden = hidden.reshape(b, rows * columns, h) + of_patches.astype(self.dtype)
        if self.class_token is None:
            return hidden
        first = (self.class_token[...].reshape(1, h) + of_token).astype(self.dtype)
        return jnp.concatenate([jnp.broadcast_to(first, (b, 1, h)), hidden], axis=1)


def _interpolated(
    table: Float[Array, "k h"], grid: int, rows: int, columns: int
) -> Float[Array, "p h"]:
    """Interpolate positions to a grid of another size, row by row."""
    of_rows, of_columns = (
        position_weights(grid, number).astype(table.dtype) for number in (rows, columns)
    )
    square = table.reshape(grid, grid, -1)
    resized = jnp.einsum("ai,bj,ijh->abh", of_rows, of_columns, square, precision="highest")
    return resized.reshape(rows * columns, -1)


def position_weights(before: int, after: int) -> Float[np.ndarray, "m n"]:
    """The matrix `[after, before]` that resizes one axis of a grid of positions.

    It is PyTorch's bicubic interpolation, with a = -0.75, without antialiasing, and with the edge
    values repeated beyond the edges. This is how transformers resizes position tables.
    """
    weights = np.zeros((after, before))
    for row in range(after):
        centre = (row + 0.5) * before / after - 0.5
        first = math.floor(centre) - 1
        for position in range(first, first + 4):
            inside = min(max(position, 0), before - 1)
            weights[row, inside] += keys_cubic(np.asarray(centre - position), -0.75)
    return weights


class AttentionPooling(nnx.Module):
    """Pool hidden states with a learned query, followed by an MLP with a residual."""

    def __init__(self, sizes: BlockSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        h = sizes.hidden_dim
        self.probe = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, 1, h)))
        self.projections = linear_layer(h, 3 * h, dtype=dtype, rngs=rngs)
        self.output = linear_layer(h, h, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(sizes, dtype=dtype, rngs=rngs)
        self.mlp = TowerMLP(sizes, dtype=dtype, rngs=rngs)
        self.num_heads = sizes.num_heads
        self.dtype = dtype

    def __call__(self, hidden: Hidden) -> Float[Array, "b h"]:
        b, _, h = hidden.shape
        probe = self.probe[...].astype(self.dtype)
        # The files store the three projections as one layer, but the query has a different input.
        query = self.projections(probe)[..., :h]
        keys, values = jnp.split(self.projections(hidden)[..., h:], 2, axis=-1)
        queries, keys, values = (
            part.reshape(-1, part.shape[1], self.num_heads, h // self.num_heads)
            for part in (jnp.broadcast_to(query, (b, 1, h)), keys, values)
        )
        mixed = self.output(attend(queries, keys, values, None, None).reshape(b, 1, h))
        return (mixed + self.mlp(self.norm(mixed)))[:, 0]
