"""A small convolutional encoder for small images, on laptops."""

import functools
import itertools
import math
from typing import Any

import jax
from flax import nnx

from jaxcl.models.vision.entry import Means, PixelRule, Spreads
from jaxcl.models.vision.image_encoder import HALF, ImageEncoder, Pixels, ProjectionHead
from jaxcl.typing import Array, Float, PositiveShare, RowKeys, Size, check_arguments

__all__ = ["ConvNetEncoder"]


@check_arguments
class ConvNetEncoder(ImageEncoder):
    """Convolutions of stride 2, and a dense layer over all positions.

    Unlike an average over positions, the dense layer depends on where something is in the image.
    Layer norms follow the convolutions, so that each row is independent of the others.

    Args:
      loaded_size: height and width of the images in the data (`data.images.size`).
      dim: dimension of the embeddings.
      image_size: height and width of the images that the encoder reads; others are resized.
        `None` uses `loaded_size`.
      widths: the number of channels of each convolution; each halves height and width.
      hidden_dim: the width of the features below the projection head.
      head: the widths of the hidden layers of the projection head; `()` for a linear layer.
      mean, std: the mean and standard deviation of the pixels in [0, 1], by channel.
      kept: the fraction of height and width that a centre crop keeps, before an image is resized.
      compute_dtype: type of activations; `None` uses bfloat16 on accelerators and float32
        elsewhere.
      rngs: random streams for the initial parameters.

    Raises:
      ValueError: for an option out of range.
    """

    def __init__(
        self,
        loaded_size: int,
        *,
        dim: int,
        image_size: Size | None = None,
        widths: tuple[Size, ...] = (32, 64, 128),
        hidden_dim: Size = 256,
        head: tuple[Size, ...] = (),
        mean: Means = HALF,
        std: Spreads = HALF,
        kept: PositiveShare = 1.0,
        compute_dtype: str | None = None,
        rngs: nnx.Rngs,
    ):
        if not widths:
            raise ValueError("widths=() has no convolution; give at least one number of channels")
        size = image_size or loaded_size
        super().__init__(PixelRule(size, mean, std, kept), compute_dtype=compute_dtype)
        conv = functools.partial(
            nnx.Conv, kernel_size=(3, 3), strides=2, use_bias=False, dtype=self.dtype, rngs=rngs
        )
        norm = functools.partial(nnx.LayerNorm, dtype=self.dtype, rngs=rngs)
        channels = (3, *widths)
        self.convolutions: Any = nnx.List([conv(*pair) for pair in itertools.pairwise(channels)])
        self.norms: Any = nnx.List([norm(width) for width in widths])
        length = functools.reduce(lambda length, _: math.ceil(length / 2), widths, size)
        self.dense = nnx.Linear(length**2 * channels[-1], hidden_dim, dtype=self.dtype, rngs=rngs)
        self.head = ProjectionHead(hidden_dim, head, dim, dtype=self.dtype, rngs=rngs)

    def backbone(self, pixels: Pixels, rngs: RowKeys | None) -> Float[Array, "b h"]:
        """Compute the features of images below the projection head."""
        hidden = pixels
        for conv, norm in zip(self.convolutions, self.norms, strict=True):
            hidden = jax.nn.gelu(norm(conv(hidden)))
        return jax.nn.gelu(self.dense(hidden.reshape(hidden.shape[0], -1)))
