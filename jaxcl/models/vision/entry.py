"""The first stage of image encoders: images of any size and type in, normalised pixels out."""

from typing import Annotated, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxcl.typing import Array, Float, Num, Positive, Range

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Means",
    "PixelRule",
    "Spreads",
    "enter",
    "keys_cubic",
    "resize_weights",
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
        such as 224 / 256 for images of 256 pixels and an encoder of 224.
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
        None
        if image.shape[1:3] == (rule.size, rule.size)
        else resize_weights(length, rule.size, kept=rule.kept, cubic=rule.cubic)
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


def resize_weights(
    length: int, size: int, *, kept: float = 1.0, cubic: bool = False
) -> Float[np.ndarray, "s y"] | None:
    r"""The matrix that resizes one axis of an image, as Pillow does.

    Output pixel $i$ lies at $c_i = (i + 1/2)\, r - 1/2$ with the ratio $r$ of the lengths, and has
    the weights $w_{ij} \propto k((j - c_i) / \max(r, 1))$. The kernel $k$ is a triangle, or Keys'
    cubic function with $a = -1/2$.

    Args:
      length: number of pixels of the input.
      size: number of pixels of the output.
      kept: the fraction of the input that a centre crop keeps.
      cubic: whether the kernel is cubic.

    Returns:
      The weights `[size, length]`, or `None` for the identity.

    Reference:
      Keys, "Cubic Convolution Interpolation for Digital Image Processing", 1981.
    """
    extent = min(round(kept * length), length)
    if extent == length == size:
        return None
    start = round((length - extent) / 2)
    ratio = extent / size
    centre = (np.arange(size) + 0.5) * ratio - 0.5
    pixel = np.arange(length) - start
    kernel = _keys if cubic else _triangle
    weights = kernel((pixel - centre[:, None]) / max(ratio, 1.0))
    weights = np.where((pixel >= 0) & (pixel < extent), weights, 0)
    return weights / weights.sum(1, keepdims=True)


def _triangle(distance: Float[np.ndarray, "s y"]) -> Float[np.ndarray, "s y"]:
    return np.maximum(0, 1 - np.abs(distance))


def _keys(distance: Float[np.ndarray, "s y"]) -> Float[np.ndarray, "s y"]:
    return keys_cubic(distance, -0.5)


def keys_cubic(distance: Float[np.ndarray, "*s"], a: float) -> Float[np.ndarray, "*s"]:
    """Keys' cubic kernel with the parameter `a`: -0.5 in Pillow, -0.75 in PyTorch."""
    x = np.abs(distance)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0))
