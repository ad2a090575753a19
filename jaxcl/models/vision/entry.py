"""The first stage of image encoders: images of any size and type in, normalised pixels out."""

from typing import Annotated, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxcl.models.resizing import resize_weights
from jaxcl.typing import Array, Float, Num, Positive, Range

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Means",
    "PixelRule",
    "Spreads",
    "enter",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""The mean and standard deviation of ImageNet's pixels in [0, 1], by channel."""


_Level = Annotated[float, Range()]
Means = tuple[_Level, _Level, _Level]
Spreads = tuple[Positive, Positive, Positive]
"""The mean and the standard deviation of each channel."""


class PixelRule(NamedTuple):
    """How an image encoder resizes images and normalises pixels.

    Attributes:
      size: the height and width of the images that the backbone receives.
      mean, std: the mean and standard deviation of the pixels in [0, 1], by channel.
      kept: the fraction of height and width that a centre crop keeps of images of another size,
        such as 224 / 256 for images of 256 pixels and an encoder that reads 224.
      cubic: resize with cubic instead of linear interpolation.
    """

    size: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    kept: float = 1.0
    cubic: bool = False


def enter(image: Num[Array, "b y x c"], rule: PixelRule) -> Float[Array, "b s s c"]:
    r"""Crop images at the centre, resize them, and normalise their pixels: $(x - \mu) / \sigma$.

    Images that already have the encoder's size, such as augmented ones, are only normalised.

    Args:
      image: integers in [0, 255], or floats in [0, 1].
      rule: the size, the mean and the standard deviation.

    Returns:
      The pixels, in at least float32.
    """
    if jnp.issubdtype(image.dtype, jnp.integer):
        image = image.astype(jnp.float32) / 255
    image = image.astype(jnp.promote_types(image.dtype, jnp.float32))
    rows, columns = (
        None if image.shape[1:3] == (rule.size, rule.size) else _axis_weights(length, rule)
        for length in image.shape[1:3]
    )
    if rows is not None:
        image = jnp.einsum("sy,byxc->bsxc", rows.astype(image.dtype), image, precision="highest")
    if columns is not None:
        image = jnp.einsum("sx,byxc->bysc", columns.astype(image.dtype), image, precision="highest")
    if rule.cubic and (rows is not None or columns is not None):
        image = jnp.clip(image, 0, 1)  # cubic interpolation overshoots at edges
    mean, std = (np.asarray(values, image.dtype) for values in (rule.mean, rule.std))
    return (image - mean) / std


def _axis_weights(length: int, rule: PixelRule) -> Float[np.ndarray, "s y"] | None:
    """The matrix that crops the centre of one axis and resizes it; `None` for the identity."""
    extent = min(round(rule.kept * length), length)
    if extent == length == rule.size:
        return None
    start = round((length - extent) / 2)
    return resize_weights(length, start, extent, rule.size, cubic=rule.cubic)
