"""Augmentations of images: random crops, flips and colour jitter, with parameters from papers.

Each maps `{"image": uint8[height, width, 3]}` to `{"image": float32[size, size, 3]}` in [0, 1].
Encoders subtract the mean and divide by the standard deviation.
"""

import functools

import jax
import jax.numpy as jnp

from jaxcl.models.image_operations import (
    Image,
    as_float_image,
    check_interpolation,
    colour_jitter,
    gaussian_blur,
    grayscale,
    random_crop_box,
    random_jitter,
    resized_crop,
    solarised,
)
from jaxcl.models.layers import images_of
from jaxcl.typing import (
    Array,
    Augment,
    Key,
    NotNegative,
    Positive,
    PositiveShare,
    PyTree,
    Share,
    Size,
    check_arguments,
)

__all__ = ["clip", "moco_v2", "random_view", "simclr"]

_BLUR_RADIUS = 20  # image size divided by the radius
_SIMCLR_JITTER = (0.8, 0.8, 0.8, 0.2)
_MOCO_JITTER = (0.4, 0.4, 0.4, 0.1)
_NO_JITTER = (0.0, 0.0, 0.0, 0.0)


@check_arguments
def random_view(
    jitter: tuple[Share, Share, Share, Share],
    *,
    size: Size | None = None,
    crop_scale: tuple[PositiveShare, PositiveShare] = (0.08, 1.0),
    aspect_ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3),
    interpolation: str = "bicubic",
    flip_rate: Share = 0.5,
    jitter_strength: NotNegative = 1.0,
    jitter_rate: Share = 0.8,
    grayscale_rate: Share = 0.2,
    blur_rate: Share = 0.5,
    blur_sigma: tuple[Positive, Positive] = (0.1, 2.0),
    solarise_rate: Share = 0.0,
) -> Augment:
    """Make an augmentation that draws random views; `simclr`, `moco_v2` and `clip` are presets.

    The operations are, in this order: a resized random crop, a horizontal flip, colour jitter,
    conversion to grayscale, a blur, and solarisation. Colour jitter draws its factors and the order
    of its operations for each image.

    Args:
      jitter: the ranges of brightness, contrast, saturation and hue at a `jitter_strength` of 1.
        The factors of the first three differ from 1 by at most their range; the hue is shifted by
        at most its range, as a fraction of the hue circle.
      size: the height and width of the view, in pixels; `None` keeps the height of the image.
      crop_scale: the smallest and the largest area of the crop, as fractions of the image;
        `(1.0, 1.0)` keeps the whole of a square image.
      aspect_ratio: the smallest and the largest ratio of width to height of the crop.
      interpolation: `"bilinear"` or `"bicubic"`.
      flip_rate: the probability of a flip.
      jitter_strength: the strength of the colour jitter.
      jitter_rate: the probability of colour jitter.
      grayscale_rate: the probability of conversion to grayscale.
      blur_rate: the probability of a blur. Its kernel has a radius of a twentieth of `size`.
      blur_sigma: the smallest and the largest standard deviation of the blur, in pixels.
      solarise_rate: the probability of solarisation, which inverts values above a half.

    Returns:
      The augmentation of `{"image": uint8[height, width, 3]}`.

    Raises:
      ValueError: for an option out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> view = simclr(size=24)({"image": jnp.zeros((32, 32, 3), jnp.uint8)}, jax.random.key(0))
      >>> view["image"].shape, str(view["image"].dtype)
      ((24, 24, 3), 'float32')
    """
    ranges = {"crop_scale": crop_scale, "aspect_ratio": aspect_ratio, "blur_sigma": blur_sigma}
    check_interpolation(interpolation)
    for name, (least, most) in ranges.items():
        if least > most:
            raise ValueError(f"{name}={(least, most)}; give the smaller value first")
    amounts = [amount * jitter_strength for amount in jitter]

    def augment(inputs: PyTree, key: Key[Array, ""]) -> PyTree:
        image = as_float_image(images_of(inputs, "this augmentation"))
        crop, flip, colour, grey, blur, solarise = jax.random.split(key, 6)
        height, width = image.shape[:2]
        image = resized_crop(
            image,
            random_crop_box(crop, height, width, scale=crop_scale, aspect_ratio=aspect_ratio),
            size=size or height,
            interpolation=interpolation,
            flip=jax.random.bernoulli(flip, flip_rate),
        )
        if jitter_rate and any(amounts):
            chance, draws = jax.random.split(colour)
            jittered = colour_jitter(image, random_jitter(draws, *amounts))
            image = _sometimes(chance, jitter_rate, jittered, image)
        if grayscale_rate:
            image = _sometimes(grey, grayscale_rate, grayscale(image), image)
        if blur_rate:
            chance, draw = jax.random.split(blur)
            sigma = jax.random.uniform(draw, minval=blur_sigma[0], maxval=blur_sigma[1])
            blurred = gaussian_blur(image, sigma=sigma, radius=_blur_radius(image))
            image = _sometimes(chance, blur_rate, blurred, image)
        if solarise_rate:
            image = _sometimes(solarise, solarise_rate, solarised(image), image)
        return {**inputs, "image": image}

    return augment


simclr = functools.partial(random_view, _SIMCLR_JITTER)
simclr.__doc__ = """Make random views as in SimCLR: `random_view` with its defaults.

At `jitter_strength` 1, brightness, contrast and saturation are multiplied by factors between 0.2
and 1.8, and hue is shifted by up to a fifth of the hue circle; 0.5 suits small images. The authors'
code (Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", 2020,
appendix A) pads the image with zeros before the blur; this function pads by reflection.
"""

moco_v2 = functools.partial(
    random_view, _MOCO_JITTER, crop_scale=(0.2, 1.0), interpolation="bilinear"
)
moco_v2.__doc__ = """Make random views as in MoCo v2: larger crops than `simclr`, half its jitter.

The authors' code (Chen et al., "Improved Baselines with Momentum Contrastive Learning", 2020) blurs
with Pillow, which approximates a Gaussian kernel by box filters.
"""


def clip(
    *,
    size: Size | None = None,
    crop_scale: tuple[PositiveShare, PositiveShare] = (0.9, 1.0),
    aspect_ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3),
    interpolation: str = "bicubic",
    flip_rate: Share = 0.0,
) -> Augment:
    """Make random large crops and nothing else, so that a caption still describes its image.

    The arguments and errors are as for `random_view`.

    Reference:
      Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021,
      section 2.4; the range of areas is OpenCLIP's.
    """
    return random_view(
        _NO_JITTER,
        size=size,
        crop_scale=crop_scale,
        aspect_ratio=aspect_ratio,
        interpolation=interpolation,
        flip_rate=flip_rate,
        jitter_rate=0.0,
        grayscale_rate=0.0,
        blur_rate=0.0,
    )


def _blur_radius(image: Image) -> int:
    return max(1, image.shape[0] // _BLUR_RADIUS)


def _sometimes(key: Key[Array, ""], rate: float, changed: Image, image: Image) -> Image:
    return jnp.where(jax.random.bernoulli(key, rate), changed, image)
