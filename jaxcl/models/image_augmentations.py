"""Augmentations of images: random crops, flips and colour jitter, with the parameters of papers.

Each maps `{"image": uint8[height, width, 3]}` to `{"image": float32[size, size, 3]}` in [0, 1].
Encoders subtract the mean and divide by the standard deviation.
"""

from typing import Annotated, NamedTuple

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
from jaxcl.typing import Array, Augment, Key, PyTree, Range, check_ranges

__all__ = ["ClipOptions", "ImageOptions", "clip", "moco_v2", "simclr"]

_BLUR_RADIUS = 20  # the size of an image per pixel of the radius

_Share = Annotated[float, Range(least=0, most=1)]
_Area = Annotated[float, Range(above=0, most=1)]
_Positive = Annotated[float, Range(above=0)]


class ImageOptions(NamedTuple):
    """Options of `simclr` and `moco_v2` in a config."""

    size: Annotated[int, Range(least=1)] | None = None
    crop_scale: tuple[_Area, _Area] | None = None
    aspect_ratio: tuple[_Positive, _Positive] | None = None
    interpolation: str | None = None
    flip_rate: _Share | None = None
    jitter_strength: Annotated[float, Range(least=0)] | None = None
    jitter_rate: _Share | None = None
    grayscale_rate: _Share | None = None
    blur_rate: _Share | None = None
    blur_sigma: tuple[_Positive, _Positive] | None = None
    solarise_rate: _Share | None = None


class ClipOptions(NamedTuple):
    """Options of `clip` in a config."""

    size: Annotated[int, Range(least=1)] | None = None
    crop_scale: tuple[_Area, _Area] | None = None
    aspect_ratio: tuple[_Positive, _Positive] | None = None
    interpolation: str | None = None
    flip_rate: _Share | None = None


def simclr(
    *,
    size: int | None = None,
    crop_scale: tuple[float, float] = (0.08, 1.0),
    aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "bicubic",
    flip_rate: float = 0.5,
    jitter_strength: float = 1.0,
    jitter_rate: float = 0.8,
    grayscale_rate: float = 0.2,
    blur_rate: float = 0.5,
    blur_sigma: tuple[float, float] = (0.1, 2.0),
    solarise_rate: float = 0.0,
) -> Augment:
    """A random view of an image, as in SimCLR.

    The operations are, in this order: a resized random crop, a horizontal flip, colour jitter,
    conversion to grayscale, a blur, and solarisation. Colour jitter draws its factors and the order
    of its operations for each image.

    Args:
      size: the height and width of the view, in pixels; `None` keeps the height of the image.
      crop_scale: the smallest and the largest area of the crop, as fractions of the image;
        `(1.0, 1.0)` keeps the whole of a square image.
      aspect_ratio: the smallest and the largest ratio of width to height of the crop.
      interpolation: `"bilinear"` or `"bicubic"`.
      flip_rate: the probability of a flip.
      jitter_strength: the strength of the colour jitter. At 1, brightness, contrast and saturation
        are multiplied by factors between 0.2 and 1.8, and hue is shifted by up to a fifth of the
        circle; 0.5 suits small images.
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

    Reference:
      Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", 2020,
      appendix A. The authors' code pads the image with zeros before the blur; this one mirrors it.
    """
    return _random_view(
        size=size,
        crop_scale=crop_scale,
        aspect_ratio=aspect_ratio,
        interpolation=interpolation,
        flip_rate=flip_rate,
        jitter_strength=jitter_strength,
        jitter=(0.8, 0.8, 0.8, 0.2),
        jitter_rate=jitter_rate,
        grayscale_rate=grayscale_rate,
        blur_rate=blur_rate,
        blur_sigma=blur_sigma,
        solarise_rate=solarise_rate,
    )


def moco_v2(
    *,
    size: int | None = None,
    crop_scale: tuple[float, float] = (0.2, 1.0),
    aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "bilinear",
    flip_rate: float = 0.5,
    jitter_strength: float = 1.0,
    jitter_rate: float = 0.8,
    grayscale_rate: float = 0.2,
    blur_rate: float = 0.5,
    blur_sigma: tuple[float, float] = (0.1, 2.0),
    solarise_rate: float = 0.0,
) -> Augment:
    """A random view as in MoCo v2: larger crops and weaker colour jitter than in `simclr`.

    Args:
      size, crop_scale, aspect_ratio, interpolation, flip_rate, jitter_rate, grayscale_rate,
        blur_rate, blur_sigma, solarise_rate: as for `simclr`.
      jitter_strength: the strength of the colour jitter. At 1, brightness, contrast and saturation
        are multiplied by factors between 0.6 and 1.4, and hue is shifted by up to a tenth of the
        circle.

    Returns:
      The augmentation of `{"image": uint8[height, width, 3]}`.

    Raises:
      ValueError: for an option out of range.

    Reference:
      Chen et al., "Improved Baselines with Momentum Contrastive Learning", 2020. The authors' code
      blurs with Pillow, which approximates a Gaussian kernel by box filters.
    """
    return _random_view(
        size=size,
        crop_scale=crop_scale,
        aspect_ratio=aspect_ratio,
        interpolation=interpolation,
        flip_rate=flip_rate,
        jitter_strength=jitter_strength,
        jitter=(0.4, 0.4, 0.4, 0.1),
        jitter_rate=jitter_rate,
        grayscale_rate=grayscale_rate,
        blur_rate=blur_rate,
        blur_sigma=blur_sigma,
        solarise_rate=solarise_rate,
    )


def clip(
    *,
    size: int | None = None,
    crop_scale: tuple[float, float] = (0.9, 1.0),
    aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "bicubic",
    flip_rate: float = 0.0,
) -> Augment:
    """A random large crop of an image and nothing else, so that its caption still describes it.

    Args:
      size, crop_scale, aspect_ratio, interpolation, flip_rate: as for `simclr`.

    Returns:
      The augmentation of `{"image": uint8[height, width, 3]}`.

    Raises:
      ValueError: for an option out of range.

    Reference:
      Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021,
      section 2.4; the range of areas is OpenCLIP's.
    """
    return _random_view(
        size=size,
        crop_scale=crop_scale,
        aspect_ratio=aspect_ratio,
        interpolation=interpolation,
        flip_rate=flip_rate,
        jitter_strength=0.0,
        jitter=(0.0, 0.0, 0.0, 0.0),
        jitter_rate=0.0,
        grayscale_rate=0.0,
        blur_rate=0.0,
        blur_sigma=(1.0, 1.0),
        solarise_rate=0.0,
    )


def _random_view(
    *,
    size: int | None,
    crop_scale: tuple[float, float],
    aspect_ratio: tuple[float, float],
    interpolation: str,
    flip_rate: float,
    jitter_strength: float,
    jitter: tuple[float, float, float, float],
    jitter_rate: float,
    grayscale_rate: float,
    blur_rate: float,
    blur_sigma: tuple[float, float],
    solarise_rate: float,
) -> Augment:
    """The augmentation of `simclr`; `jitter` has the amounts of its colour jitter at strength 1."""
    check_ranges(
        ImageOptions(
            size=size,
            crop_scale=crop_scale,
            aspect_ratio=aspect_ratio,
            flip_rate=flip_rate,
            jitter_strength=jitter_strength,
            jitter_rate=jitter_rate,
            grayscale_rate=grayscale_rate,
            blur_rate=blur_rate,
            blur_sigma=blur_sigma,
            solarise_rate=solarise_rate,
        )
    )
    ranges = {"crop_scale": crop_scale, "aspect_ratio": aspect_ratio, "blur_sigma": blur_sigma}
    check_interpolation(interpolation)
    for name, (least, most) in ranges.items():
        if least > most:
            raise ValueError(f"{name}={(least, most)}; give the smaller value first")
    amounts = [amount * jitter_strength for amount in jitter]

    def augment(inputs: PyTree, key: Key[Array, ""]) -> PyTree:
        image = as_float_image(_image_of(inputs))
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


def _blur_radius(image: Image) -> int:
    return max(1, image.shape[0] // _BLUR_RADIUS)


def _sometimes(key: Key[Array, ""], rate: float, changed: Image, image: Image) -> Image:
    return jnp.where(jax.random.bernoulli(key, rate), changed, image)


def _image_of(inputs: PyTree) -> Array:
    if "image" not in inputs:
        raise ValueError(
            f"this augmentation reads images, but this side has {', '.join(inputs)}; see "
            "data.modality"
        )
    return inputs["image"]
