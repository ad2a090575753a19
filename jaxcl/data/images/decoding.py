"""Decode image files to arrays of one size, by fixed rules.

    decode_image(Path("cat.jpg").read_bytes(), ImageRule(size=224))  # uint8[224, 224, 3]

The array depends only on the file, the rule and the version of Pillow.
"""

import contextlib
import functools
import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxcl.settings.data_sections import DataSettings
from jaxcl.typing import UInt8

__all__ = [
    "FORMATS",
    "MAX_IMAGE_BYTES",
    "BadImage",
    "ImageRule",
    "decode_image",
    "image_rule",
    "pillow",
    "verify_image",
]

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""The supported formats. Other formats may start programs: Pillow runs Ghostscript for EPS."""

MAX_IMAGE_BYTES = 2**30
"""The largest image file that is read."""

_REDUCING_GAP = 2
"""A large JPEG is decoded at a reduced size, at least this many times the size of the result."""
_LONGEST = 8
"""Images with a larger ratio of the longer to the shorter side are resized in two steps."""
_ORIENTATION = 0x0112  # the EXIF tag
_TURNED = range(2, 9)  # the orientations of images that are stored mirrored or rotated

_DAMAGE = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, OSError, RuntimeError),
    *(SyntaxError, TypeError, ValueError, struct.error, zlib.error),
)
"""The errors that Pillow's readers raise for damaged files. `MemoryError` is not one of
them: it says nothing about the file, and the check would cache the file as bad."""


class BadImage(ValueError):
    """An image that cannot be decoded, with the reason."""


class ImageRule(NamedTuple):
    """The rule for decoding an image to an array.

    Attributes:
      size: the height and width of the array.
      resize: `"crop"` resizes the short side to `size` and takes the centre; `"stretch"` resizes
        both sides to `size`.
      background: the colour behind transparent pixels: red, green, blue.
    """

    size: int
    resize: str = "crop"
    background: tuple[int, int, int] = (255, 255, 255)


def image_rule(data: DataSettings) -> ImageRule:
    """The `ImageRule` of the settings."""
    return ImageRule(data.images.size, data.images.resize, data.images.background)


@functools.cache
def pillow() -> Any:
    """The module `PIL.Image`.

    Raises:
      ValueError: if Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError(
            'images need Pillow, which is not installed; run pip install "jaxcl[images]"'
        ) from error
    return Image


def decode_image(value: Any, rule: ImageRule) -> UInt8[np.ndarray, "s s 3"]:
    """Decode an image to RGB.

    JPEG, PNG, WebP, GIF (the first frame), TIFF, AVIF, BMP and PPM are read. The EXIF orientation
    is applied. Transparent images are composited over the background, grayscale images get three
    equal channels, CMYK is converted without a colour profile, and 16-bit levels are scaled to 8.
    Resizing is bicubic with antialiasing. A large JPEG is decoded at a half, a quarter or an eighth
    of its size if that is at least twice the size of the result.

    Args:
      value: the bytes of an image file, a PIL image, or a uint8 array `[h, w]` or `[h, w, c]` with
        1, 3 or 4 channels.
      rule: the size of the array, and how the image is made square.

    Raises:
      BadImage: if the file is damaged, truncated or in another format, or has more pixels than
        Pillow's limit `PIL.Image.MAX_IMAGE_PIXELS`.

    Example:
      >>> decode_image(np.zeros((8, 6), np.uint8), ImageRule(size=4)).shape
      (4, 4, 3)
    """
    module = pillow()
    with _reasons(module):
        image = _opened(value, module)
        _check_pixels(image, module)
        if image is not value and image.format == "JPEG":
            image.draft(None, (_REDUCING_GAP * rule.size,) * 2)
        rgb = _as_rgb(_upright(image), rule.background, module)
        return np.asarray(_resized(rgb, rule, module.Resampling.BICUBIC))


def verify_image(value: Any) -> None:
    """Check the checksums of an image file, which `decode_image` skips; only PNG files have them.

    Args:
      value: as for `decode_image`.

    Raises:
      BadImage: if a checksum is wrong.
    """
    module = pillow()
    if isinstance(value, bytes):
        with _reasons(module):
            _opened(value, module).verify()


@contextlib.contextmanager
def _reasons(module: Any) -> Iterator[None]:
    """Turn the errors of Pillow's readers into `BadImage`, with the same reason on all hosts."""
    try:
        yield
    except BadImage:
        raise
    except (module.DecompressionBombError, module.DecompressionBombWarning) as error:
        raise BadImage(_too_large(module)) from error
    except module.UnidentifiedImageError as error:
        raise BadImage(f"it is not an image file ({', '.join(FORMATS)})") from error
    except _DAMAGE as error:
        raise BadImage(str(error).partition("\n")[0] or type(error).__name__) from error


def _opened(value: Any, module: Any) -> Any:
    if isinstance(value, bytes):
        if not value:
            raise BadImage("the file is empty")
        return module.open(io.BytesIO(value), formats=FORMATS)
    if isinstance(value, np.ndarray):
        channels = value.shape[2] if value.ndim == 3 else 1
        if value.dtype != np.uint8 or value.ndim not in (2, 3) or channels not in (1, 3, 4):
            raise BadImage(
                f"it is a {value.dtype} array of shape {value.shape}; give uint8, [h, w] or "
                "[h, w, c] with 1, 3 or 4 channels"
            )
        return module.fromarray(value[..., 0] if value.ndim == 3 and channels == 1 else value)
    if isinstance(value, module.Image):
        return value
    raise BadImage(f"it is of type {type(value).__name__}, not the bytes of an image file")


def _check_pixels(image: Any, module: Any) -> None:
    width, height = image.size
    if not width * height:
        raise BadImage(f"it has no pixels ({width} × {height})")
    if module.MAX_IMAGE_PIXELS is not None and width * height > module.MAX_IMAGE_PIXELS:
        raise BadImage(_too_large(module))


def _too_large(module: Any) -> str:
    return f"it has more pixels than PIL.Image.MAX_IMAGE_PIXELS={module.MAX_IMAGE_PIXELS:,}"


def _upright(image: Any) -> Any:
    """The image with its EXIF orientation applied; unreadable EXIF data are ignored."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except _DAMAGE:
        return image
    if orientation not in _TURNED:
        return image
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


def _as_rgb(image: Any, background: tuple[int, int, int], module: Any) -> Any:
    if image.mode == "F":
        raise BadImage("it has floating-point pixels, whose range is unknown")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _eight_bits(image, module).convert("RGB")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    base = module.new("RGBA", image.size, (*background, 255))
    base.alpha_composite(image.convert("RGBA"))
    return base.convert("RGB")


def _eight_bits(image: Any, module: Any) -> Any:
    """Scale 16-bit grey levels to 8 bits."""
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65_535:
        raise BadImage("it has 32-bit pixels beyond 16 bits, whose range is unknown")
    return module.fromarray(((pixels + 128) // 257).astype(np.uint8))


def _resized(image: Any, rule: ImageRule, filter_: Any) -> Any:
    size = rule.size
    width, height = image.size
    if rule.resize == "stretch":
        if height > _LONGEST * width:  # otherwise Pillow widens all rows first
            image = image.resize((width, size), filter_)
        return image.resize((size, size), filter_)
    short = min(width, height)
    if max(width, height) > _LONGEST * short:  # most resized pixels would be cropped
        image = _centre(image, min(width, _LONGEST * short), min(height, _LONGEST * short))
        width, height = image.size
    image = image.resize((size * width // short, size * height // short), filter_)
    return _centre(image, size, size)


def _centre(image: Any, width: int, height: int) -> Any:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
