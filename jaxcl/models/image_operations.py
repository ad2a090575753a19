"""Operations on one image, such as crops and colour jitter, from which augmentations are built.

Each is a pure function of an image in [0, 1] and of explicit parameters. These may be traced, so
`jax.vmap` can apply different parameters to each image of a batch. Results agree with
torchvision on float images; `tests/models/test_image_operations.py` compares them.

    crop = random_crop_box(key, 96, 128, scale=(0.2, 1.0))
    image = resized_crop(image, crop, size=64)
    image = gaussian_blur(solarised(image), sigma=1.5, radius=3)
"""

import functools
import math
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.models.resizing import resize_weights
from jaxcl.typing import Array, Bool, Float, Int, Key, Scalar

__all__ = [
    "INTERPOLATIONS",
    "JITTER_OPERATIONS",
    "CropBox",
    "Image",
    "Jitter",
    "as_float_image",
    "check_interpolation",
    "colour_jitter",
    "flipped",
    "gaussian_blur",
    "grayscale",
    "random_crop_box",
    "random_jitter",
    "resized_crop",
    "shifted_hue",
    "solarised",
    "with_brightness",
    "with_contrast",
    "with_saturation",
]

Image: TypeAlias = Float[Array, "y x 3"]

INTERPOLATIONS = ("bilinear", "bicubic")

JITTER_OPERATIONS = ("brightness", "contrast", "saturation", "hue")
"""The operations of `colour_jitter`, by the numbers in `Jitter.order`."""

_BRIGHTNESS, _CONTRAST, _, _HUE = range(4)

_LUMA = (0.2989, 0.587, 0.114)  # the weights of red, green and blue, as in ITU-R 601
_CROP_TRIES = 10

_Number: TypeAlias = int | float | Scalar
_Planes: TypeAlias = Float[Array, "3 y x"]


def as_float_image(image: Array) -> Float[Array, "*b y x 3"]:
    """Convert an image, or several, to floats in [0, 1]; floats are returned unchanged."""
    if jnp.issubdtype(image.dtype, jnp.floating):
        return image
    return image.astype(jnp.float32) / 255


class CropBox(NamedTuple):
    """A part of an image, in pixels."""

    top: _Number
    left: _Number
    height: _Number
    width: _Number


def random_crop_box(
    key: Key[Array, ""],
    height: int,
    width: int,
    *,
    scale: tuple[float, float],
    aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> CropBox:
    """Draw a box of random area, shape and position.

    The area and the logarithm of the aspect ratio are uniform. Boxes that do not fit are drawn
    again, so large areas are rarer than small ones. After ten attempts, the box is the
    largest central box with an allowed aspect ratio.

    Args:
      key: a random key.
      height, width: the size of the image.
      scale: the smallest and the largest area, as fractions of the image.
      aspect_ratio: the smallest and the largest ratio of width to height.

    Reference:
      Szegedy et al., "Going Deeper with Convolutions", 2015; torchvision's `RandomResizedCrop`.
    """
    of_area, of_shape, of_place = jax.random.split(key, 3)
    low, high = map(math.log, aspect_ratio)
    tries = (_CROP_TRIES,)
    area = height * width * jax.random.uniform(of_area, tries, minval=scale[0], maxval=scale[1])
    ratio = jnp.exp(jax.random.uniform(of_shape, tries, minval=low, maxval=high))
    widths, heights = jnp.round(jnp.sqrt(area * ratio)), jnp.round(jnp.sqrt(area / ratio))
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first, any_fits = jnp.argmax(fits), fits.any()
    central_width = min(width, round(height * aspect_ratio[1]))
    central_height = min(height, round(width / aspect_ratio[0]))
    box_height = jnp.where(any_fits, heights[first], central_height)
    box_width = jnp.where(any_fits, widths[first], central_width)
    free = jnp.stack([height - box_height, width - box_width])  # pixels outside of the box
    drawn = jnp.floor(jax.random.uniform(of_place, (2,)) * (free + 1))
    top, left = jnp.where(any_fits, jnp.minimum(drawn, free), jnp.floor(free / 2))
    return CropBox(top, left, box_height, box_width)


def resized_crop(
    image: Image,
    box: CropBox,
    *,
    size: int | tuple[int, int],
    interpolation: str = "bilinear",
    flip: bool | Bool[Array, ""] = False,
) -> Float[Array, "_ _ 3"]:
    r"""Crop a box, resize it with antialiasing, and optionally flip it horizontally.

    $$y = R\, x\, C^\top$$

    with a small matrix $R$ for rows and another $C$ for columns, so that the box may be traced.
    Pixels outside of the box have no weight.

    Args:
      image: the image.
      box: the part to keep.
      size: the height and width of the result, or one number for both.
      interpolation: `"bilinear"` or `"bicubic"`. Bicubic values may exceed [0, 1] and are clipped.
      flip: whether to flip the result horizontally.

    Raises:
      ValueError: for an unknown interpolation.
    """
    check_interpolation(interpolation)
    height, width = (size, size) if isinstance(size, int) else size
    weights = functools.partial(resize_weights, cubic=interpolation == "bicubic", module=jnp)
    rows = weights(image.shape[0], box.top, box.height, height).astype(image.dtype)
    columns = weights(image.shape[1], box.left, box.width, width)
    columns = jnp.where(flip, columns[::-1], columns).astype(image.dtype)
    # The default precision of accelerators would lose bits of 8-bit pixels.
    narrow = jnp.einsum("wx,yxc->ywc", columns, image, precision=lax.Precision.HIGHEST)
    resized = jnp.einsum("hy,ywc->hwc", rows, narrow, precision=lax.Precision.HIGHEST)
    return jnp.clip(resized, 0, 1)


def check_interpolation(name: str) -> None:
    """Raise a `ValueError` that lists the known names for an unknown interpolation."""
    if name not in INTERPOLATIONS:
        raise ValueError(
            f"interpolation={name!r} is unknown; use one of {', '.join(INTERPOLATIONS)}"
        )


def flipped(image: Image) -> Image:
    """Flip an image horizontally."""
    return image[:, ::-1]


def grayscale(image: Image) -> Image:
    """Convert an image to grayscale, with three equal channels."""
    return jnp.broadcast_to(_luma(_planes(image))[..., None], image.shape)


def with_brightness(image: Image, factor: _Number) -> Image:
    """Multiply the values of an image by a factor."""
    return _blended(image, 0.0, factor)


def with_contrast(image: Image, factor: _Number) -> Image:
    """Multiply the differences from the mean of the grayscale image by a factor."""
    return _blended(image, _luma(_planes(image)).mean(), factor)


def with_saturation(image: Image, factor: _Number) -> Image:
    """Multiply the differences from the grayscale image by a factor; 0 gives a grayscale image."""
    return _blended(image, _luma(_planes(image))[..., None], factor)


def shifted_hue(image: Image, shift: _Number) -> Image:
    """Shift the hues of an image.

    Args:
      image: the image.
      shift: a fraction of the hue circle; 1/3 turns red to green.
    """
    return _image_of(_turned(_planes(image), shift))


def _planes(image: Image) -> _Planes:
    """Move the channels to the front, so that the values of each fill whole vectors of a CPU."""
    return jnp.moveaxis(image, -1, 0)


def _image_of(planes: _Planes) -> Image:
    return jnp.moveaxis(planes, 0, -1)


def _luma(planes: _Planes) -> Float[Array, "y x"]:
    red, green, blue = _LUMA
    return red * planes[0] + green * planes[1] + blue * planes[2]


def _blended(values: Array, other: float | Array, factor: _Number) -> Array:
    return jnp.clip(factor * values + (1 - factor) * other, 0, 1)


def _turned(planes: _Planes, shift: _Number) -> _Planes:
    red, green, blue = planes
    high, low = planes.max(0), planes.min(0)
    spread = high - low
    safe = jnp.where(spread == 0, 1, spread)
    # Not `high == red`: a fused kernel may compute the channels again with other rounding, and then
    # none of them equals the maximum.
    hue = jnp.where(
        (red >= green) & (red >= blue),
        (green - blue) / safe,
        jnp.where(green >= blue, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    turned = hue + 6 * shift
    # Back to colours: each channel is a trapezoidal function of the hue, which is in [0, 6).
    position = jnp.stack([start + turned for start in (5, 3, 1)]) % 6
    return high - spread * jnp.clip(jnp.minimum(position, 4 - position), 0, 1)


class Jitter(NamedTuple):
    """The parameters of colour jitter for one image.

    Attributes:
      brightness, contrast, saturation: factors; 1 changes nothing.
      hue: a fraction of the hue circle; 0 changes nothing.
      order: the numbers of `JITTER_OPERATIONS` in the order in which they are applied.
    """

    brightness: _Number
    contrast: _Number
    saturation: _Number
    hue: _Number
    order: Int[Array, "4"]


def random_jitter(
    key: Key[Array, ""], brightness: float, contrast: float, saturation: float, hue: float
) -> Jitter:
    """Draw the parameters of colour jitter, including a random order of the operations.

    Args:
      key: a random key.
      brightness, contrast, saturation: factors are uniform in [max(0, 1 - value), 1 + value].
      hue: the shift is uniform in [-hue, hue].

    Reference:
      torchvision's `ColorJitter`.
    """
    keys = jax.random.split(key, 5)

    def factor(key: Key[Array, ""], amount: float) -> Float[Array, ""]:
        return jax.random.uniform(key, minval=max(0.0, 1 - amount), maxval=1 + amount)

    return Jitter(
        brightness=factor(keys[0], brightness),
        contrast=factor(keys[1], contrast),
        saturation=factor(keys[2], saturation),
        hue=jax.random.uniform(keys[3], minval=-hue, maxval=hue),
        order=jax.random.permutation(keys[4], 4),
    )


def colour_jitter(image: Image, jitter: Jitter) -> Image:
    """Change brightness, contrast, saturation and hue, in the order of `jitter.order`.

    A `lax.switch` for each of the four steps would compute all four operations each time under
    `vmap`, sixteen in total. Instead, the hue, by far the most expensive, is shifted once. The
    other three are blends. There are three blends before the hue shift and three after it, and the
    three that are not due change nothing, since their factor is 1.
    """
    hue_position = jnp.argmax(jitter.order == _HUE)
    factors = jnp.stack([jnp.asarray(factor, image.dtype) for factor in (*jitter[:3], 1.0)])

    def blended(planes: _Planes, position: int, active: Bool[Array, ""]) -> _Planes:
        operation = jitter.order[position]
        luma = _luma(planes)
        other = jnp.where(operation == _CONTRAST, luma.mean(), luma)
        other = jnp.where(operation == _BRIGHTNESS, 0, other)
        return _blended(planes, other, jnp.where(active, factors[operation], 1))

    planes = _planes(image)
    for position in range(3):
        planes = blended(planes, position, position < hue_position)
    planes = _turned(planes, jitter.hue)
    for position in range(1, 4):
        planes = blended(planes, position, position > hue_position)
    return _image_of(planes)


def solarised(image: Image, threshold: float = 128 / 255) -> Image:
    """Invert the values that reach a threshold."""
    return jnp.where(image >= threshold, 1 - image, image)


def gaussian_blur(image: Image, *, sigma: _Number, radius: int) -> Image:
    """Blur an image with a Gaussian kernel, with reflection padding.

    The blur is two matrix products, one for rows and one for columns, so that `sigma` may be traced
    and a larger radius costs nothing.

    Args:
      image: the image.
      sigma: the standard deviation in pixels.
      radius: the radius of the kernel in pixels; less than the height and the width.

    Raises:
      ValueError: if the radius is not less than the height and the width.
    """
    if not 0 <= radius < min(image.shape[:2]):
        raise ValueError(
            f"radius={radius} of the blur in an image of {image.shape[0]} by {image.shape[1]} "
            "pixels; set it to at least 0 and less than the size"
        )
    rows, columns = (
        _blur_weights(length, sigma, radius).astype(image.dtype) for length in image.shape[:2]
    )
    narrow = jnp.einsum("wx,yxc->ywc", columns, image, precision=lax.Precision.HIGHEST)
    return jnp.einsum("hy,ywc->hwc", rows, narrow, precision=lax.Precision.HIGHEST)


def _blur_weights(length: int, sigma: _Number, radius: int) -> Float[Array, "_ _"]:
    """The weight of each pixel in each blurred pixel of a line, with reflection padding."""

    def kernel(offset: Array) -> Float[Array, "_ _"]:
        value = jnp.exp(-(offset.astype(jnp.float32) ** 2) / (2 * sigma**2))
        return jnp.where(jnp.abs(offset) <= radius, value, 0)

    blurred, pixel = jnp.arange(length)[:, None], jnp.arange(length)
    last = length - 1
    weights = kernel(pixel - blurred)
    weights += jnp.where(pixel > 0, kernel(-pixel - blurred), 0)
    weights += jnp.where(pixel < last, kernel(2 * last - pixel - blurred), 0)
    return weights / weights.sum(1, keepdims=True)
