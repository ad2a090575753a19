"""Residual networks with group normalisation and standardised weights."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcl.models.layers import check_name
from jaxcl.models.vision.entry import Means, PixelRule, Spreads
from jaxcl.models.vision.image_encoder import HALF, ImageEncoder, Pixels, ProjectionHead
from jaxcl.typing import Array, Float, PositiveShare, RowKeys, Size, check_arguments

__all__ = ["STEMS", "ResNetEncoder", "StandardisedConv"]

STEMS = ("large", "small")

_GROUPS = 32
_EXPANSION = 4  # of the last convolution of a bottleneck block
_WEIGHT_EPSILON = 1e-5

_Feature = Float[Array, "b y x h"]
_Changed = Float[Array, "b _ _ _"]


@check_arguments
class ResNetEncoder(ImageEncoder):
    """A residual network, ResNet-50 by default.

    It uses group normalisation with weight standardisation instead of batch normalisation. An
    embedding then depends only on its own image, so training is the same on any number of devices
    and with gradient caching, and evaluation needs no running statistics.

    Args:
      loaded_size: height and width of the images in the data (`data.images.size`).
      dim: dimension of the embeddings.
      image_size: height and width of the images that the encoder reads; others are resized.
        `None` uses `loaded_size`.
      stages: the number of blocks in each stage; all except the first halve height and width
        and double the channels. `(3, 4, 6, 3)` is ResNet-50, or ResNet-34 without bottlenecks.
      width: the channels of the first stage, before the expansion of bottlenecks.
      bottleneck: whether blocks have three convolutions with a narrow one in the middle, instead of
        two.
      stem: `"large"`, a convolution of 7 × 7 pixels and a maximum over 3 × 3, each of stride 2; or
        `"small"`, a convolution of 3 × 3 pixels, for images of about 32 pixels.
      head: the widths of the hidden layers of the projection head; `()` for a linear layer.
      mean, std: the mean and standard deviation of the pixels in [0, 1], by channel.
      kept: the fraction of height and width that a centre crop keeps, before an image is resized.
      remat: keep one activation per block for the backward pass, and recompute the others.
      compute_dtype: type of activations; `None` uses bfloat16 on accelerators and float32
        elsewhere. Weights are standardised in float32.
      rngs: random streams for the initial parameters.

    Raises:
      ValueError: for an option out of range, or an unknown stem.

    Reference:
      He et al., "Deep Residual Learning for Image Recognition", 2016; Qiao et al., "Weight
      Standardization", 2019; Kolesnikov et al., "Big Transfer", 2020.
    """

    def __init__(
        self,
        loaded_size: int,
        *,
        dim: int,
        image_size: Size | None = None,
        stages: tuple[Size, ...] = (3, 4, 6, 3),
        width: Size = 64,
        bottleneck: bool = True,
        stem: str = "large",
        head: tuple[Size, ...] = (),
        mean: Means = HALF,
        std: Spreads = HALF,
        kept: PositiveShare = 1.0,
        remat: bool = False,
        compute_dtype: str | None = None,
        rngs: nnx.Rngs,
    ):
        check_name("stem", stem, STEMS)
        if not stages:
            raise ValueError("stages=() has no block; give at least one number of blocks")
        rule = PixelRule(image_size or loaded_size, mean, std, kept)
        super().__init__(rule, compute_dtype=compute_dtype)
        dtype = self.dtype
        kernel, stride = (7, 2) if stem == "large" else (3, 1)
        self.stem_conv = StandardisedConv(3, width, kernel, stride=stride, dtype=dtype, rngs=rngs)
        self.stem_norm = _group_norm(width, dtype=dtype, rngs=rngs)
        blocks, channels = [], width
        for stage, count in enumerate(stages):
            narrow = width * 2**stage
            for number in range(count):
                stride = 2 if stage and not number else 1
                blocks.append(
                    Block(
                        channels,
                        narrow,
                        stride=stride,
                        bottleneck=bottleneck,
                        dtype=dtype,
                        rngs=rngs,
                    )
                )
                channels = blocks[-1].width
        self.blocks: Any = nnx.List(blocks)
        self.head = ProjectionHead(channels, head, dim, dtype=dtype, rngs=rngs)
        self.pools = stem == "large"
        self.remat = remat

    def backbone(self, pixels: Pixels, rngs: RowKeys | None) -> Float[Array, "b h"]:
        """Compute the features of images below the projection head."""
        hidden = jax.nn.relu(self.stem_norm(self.stem_conv(pixels)))
        if self.pools:
            hidden = nnx.max_pool(hidden, (3, 3), strides=(2, 2), padding="SAME")
        run = nnx.remat(_run_block) if self.remat else _run_block
        for block in self.blocks:
            hidden = run(block, hidden)
        return hidden.mean((1, 2), dtype=jnp.promote_types(hidden.dtype, jnp.float32))


def _run_block(block: "Block", hidden: _Feature) -> _Changed:
    return block(hidden)


class StandardisedConv(nnx.Module):
    """A convolution whose filters have mean 0 and standard deviation 1, and no bias.

    Args:
      channels: channels of the input.
      width: channels of the output.
      size: height and width of the filters.
      stride: the stride, in pixels.
      dtype: type of activations.
      rngs: random streams for the initial parameters.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        size: int,
        *,
        stride: int = 1,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (size, size, channels, width)))
        self.stride = stride
        self.dtype = dtype

    def __call__(self, hidden: _Feature) -> _Changed:
        kernel = self.kernel[...]
        kernel = kernel - kernel.mean((0, 1, 2))
        kernel = kernel / (jnp.std(kernel, (0, 1, 2)) + _WEIGHT_EPSILON)
        return jax.lax.conv_general_dilated(
            hidden,
            kernel.astype(self.dtype),
            window_strides=(self.stride, self.stride),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class Block(nnx.Module):
    """Two or three convolutions with a residual, normalised after each convolution."""

    def __init__(
        self,
        channels: int,
        narrow: int,
        *,
        stride: int,
        bottleneck: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.width = narrow * (_EXPANSION if bottleneck else 1)
        conv = functools.partial(StandardisedConv, dtype=dtype, rngs=rngs)
        norm = functools.partial(_group_norm, dtype=dtype, rngs=rngs)
        if bottleneck:
            convolutions = [
                conv(channels, narrow, 1),
                conv(narrow, narrow, 3, stride=stride),
                conv(narrow, self.width, 1),
            ]
        else:
            convolutions = [conv(channels, narrow, 3, stride=stride), conv(narrow, narrow, 3)]
        self.convolutions: Any = nnx.List(convolutions)
        last = norm(self.width, scale_init=nnx.initializers.zeros)  # a new block is the identity
        self.norms: Any = nnx.List([*(norm(narrow) for _ in convolutions[1:]), last])
        changes = stride > 1 or channels != self.width
        self.shortcut = conv(channels, self.width, 1, stride=stride) if changes else None
        self.shortcut_norm = norm(self.width) if changes else None

    def __call__(self, hidden: _Feature) -> _Changed:
        residual = hidden
        if self.shortcut is not None and self.shortcut_norm is not None:
            residual = self.shortcut_norm(self.shortcut(hidden))
        last = len(self.norms) - 1
        for number, (conv, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            hidden = norm(conv(hidden))
            if number < last:
                hidden = jax.nn.relu(hidden)
        return jax.nn.relu(hidden + residual)


def _group_norm(width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs, **options: Any) -> nnx.GroupNorm:
    """A group norm with at most 32 groups of equal size, as many as the width allows."""
    groups = next(count for count in range(min(_GROUPS, width), 0, -1) if width % count == 0)
    return nnx.GroupNorm(width, num_groups=groups, dtype=dtype, rngs=rngs, **options)
