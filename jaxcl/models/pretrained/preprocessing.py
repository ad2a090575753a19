"""Read from a folder's `preprocessor_config.json` how its images become pixels."""

import math
from collections.abc import Mapping
from typing import Any

from jaxcl.models.pretrained.containment import join
from jaxcl.models.pretrained.description import ImagePreprocessing
from jaxcl.models.pretrained.modules import parse_json
from jaxcl.models.vision.entry import PixelRule

__all__ = ["PREPROCESSING_FILES", "parse_image_rule", "with_image_size"]

PREPROCESSING_FILES = ("preprocessor_config.json", "processor_config.json")
"""The older file, and the newer one of transformers 5 with a key `image_processor`."""

_CUBIC = {2: False, 3: True}
"""Pillow's number of an interpolation, linear or cubic -> whether it is cubic."""
_LARGEST = 8192


def parse_image_rule(
    files: Mapping[str, bytes], folder: str, *, resize: str, pixels: PixelRule
) -> ImagePreprocessing:
    """Parse the size, the interpolation, the mean and the standard deviation of a folder's images.

    Args:
      files: path in the model's folder -> content.
      folder: the encoder's folder.
      resize, pixels: the family's defaults, which replace missing files and values.

    Raises:
      ValueError: for an unsupported step or value; the message names the file.
    """
    file = next(
        (join(folder, name) for name in PREPROCESSING_FILES if join(folder, name) in files), ""
    )
    config = parse_json(files, file) if file else {}
    config = config.get("image_processor", config)
    if not isinstance(config, dict):
        raise ValueError(f"{file} has image_processor={config!r:.99}; restore the file")
    try:
        return _parse(config, resize, pixels)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def with_image_size(rule: ImagePreprocessing, image_size: int) -> ImagePreprocessing:
    """The rule for an encoder that reads images of another size."""
    pixels = rule.pixels._replace(size=image_size)
    return rule._replace(size=round(image_size / pixels.kept), pixels=pixels)


def _parse(config: Mapping[str, Any], resize: str, pixels: PixelRule) -> ImagePreprocessing:
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if config.get(step) not in (None, True):
            raise ValueError(f"{step}={config[step]!r:.99} is not supported; only true is")
    factor = config.get("rescale_factor")
    if factor is not None and not (
        isinstance(factor, float) and math.isclose(factor, 1 / 255, rel_tol=1e-3)
    ):
        raise ValueError(f"rescale_factor={factor!r:.99} is not supported; only 1 / 255 is")
    resample = config.get("resample")
    if resample is not None and resample not in _CUBIC:
        raise ValueError(
            f"resample={resample!r:.99} is not supported; only 2 (bilinear) and 3 (bicubic) are"
        )
    size, resize = _size(config, round(pixels.size / pixels.kept), resize)
    crops = config.get("do_center_crop", resize == "crop")
    crop = _square(config, "crop_size", pixels.size) if crops else size
    if resize == "crop" and not crops:
        raise ValueError("do_center_crop=False leaves images of any shape, which is not supported")
    if crop > size:
        raise ValueError(f"crop_size={crop} is larger than size={size}, which is not supported")
    return ImagePreprocessing(
        size,
        resize,
        PixelRule(
            crop,
            _channels(config, "image_mean", pixels.mean),
            _channels(config, "image_std", pixels.std),
            crop / size,
            pixels.cubic if resample is None else _CUBIC[resample],
        ),
    )


def _size(config: Mapping[str, Any], default: int, resize: str) -> tuple[int, str]:
    """The size of decoded images, and how images are resized to it."""
    value = config.get("size")
    if isinstance(value, dict) and set(value) == {"shortest_edge"}:
        return _pixels(value["shortest_edge"], "size"), "crop"
    if isinstance(value, dict):
        return _square(config, "size", default), "stretch"
    return default if value is None else _pixels(value, "size"), resize


def _square(config: Mapping[str, Any], key: str, default: int) -> int:
    value = config.get(key)
    if isinstance(value, dict):
        if set(value) != {"height", "width"} or value["height"] != value["width"]:
            raise ValueError(f"{key}={value!r:.99}; only equal height and width are supported")
        value = value["height"]
    return default if value is None else _pixels(value, key)


def _pixels(value: Any, key: str) -> int:
    if type(value) is not int or not 0 < value <= _LARGEST:
        raise ValueError(f"{key}={value!r:.99}; it must be a number of pixels up to {_LARGEST}")
    return value


def _channels(config: Mapping[str, Any], key: str, default: tuple[float, ...]) -> tuple[float, ...]:
    values = config.get(key)
    if values is None:
        return default
    least = 1e-6 if key == "image_std" else 0
    if (
        not isinstance(values, list)
        or len(values) != 3
        or not all(type(one) in (int, float) and least <= one <= 1 for one in values)
    ):
        raise ValueError(f"{key}={values!r:.99}; it must be three numbers in [0, 1]")
    return tuple(float(one) for one in values)
