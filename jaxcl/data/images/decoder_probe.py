"""Fingerprint how the installed Pillow decodes images, by decoding a few small images.

Versions of Pillow that decode these images to the same pixels have the same fingerprint, so most
upgrades can be used with an already trained model.
"""

import base64
import functools
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxcl.data.images.decoding import BadImage, ImageRule, decode_image, pillow

__all__ = ["decoder_fingerprint", "decoder_name", "reading_limits"]


_JPEG = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERXRT"
    "c4UG1RV19iZ2hnPk1xeXBkeFxlZ2P/2wBDARESEhgVGC8aGi9jQjhCY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2Nj"
    "Y2NjY2NjY2NjY2NjY2NjY2NjY2NjY2P/wAARCAAwACgDASIAAhEBAxEB/8QAGAAAAwEBAAAAAAAAAAAAAAAAAAQFAw"
    "L/xAAjEAABAwQBBQEBAAAAAAAAAAAAAQMRAgQTISISQWGB8HEF/8QAGgEAAQUBAAAAAAAAAAAAAAAABAACAwUGAf/E"
    "ACQRAAEDAgYCAwAAAAAAAAAAAAEAAgMEEhETFCEiIwVBMYHB/9oADAMBAAIRAxEAPwCo05CG2SSYjsKMtOSDOlv61n"
    "4af2naF2ONOQI0Lo6RyAcxabkreGC5U8kgSL67x2/Qi8nNeu/3kBNg1IzFyoqm0zssNx+1FSqVGWa4E2qpQ164LB1N"
    "Z2KWGHHZUqXdHSVST6HdhfXOO26EXk5r13+8kOBqzYFZWCCMyO9Jd+5z3NVaLxTVP4AmlUAGZYg4BZ4xmUl7vkrpp2"
    "ENskkxHIUZZcke6W/rWqhp8N09QuyW/d57iqtF4pqn8Nv6NxitulF5Oa9d/vJGRyB8VPpexDeRNxEI9bn8VNHJAUac"
    "kB5GdyQzIMAv/9k="
)
"""A JPEG of 40 × 48 pixels with chroma at half the resolution."""
_WEBP = (
    "UklGRjoBAABXRUJQVlA4IC4BAADwCACdASooADAAPu1mp1CppSMirjQMyTAdiWwAnTK4ta+8+ZFTX8BrCJR4VggPA8"
    "hNOgkPRZsaPQfU2gwlTOFu3ssCzM7dBlTnmVwL8zdcAAD+tMgKpAxJZbvk7U6r2eP/03bCRoNiqvzYvUS7Xq0D4oul"
    "bbskGXkcKR1cGvAx1j8IRb3azfTD149q2PYR+iSWrcj80nX8XUeqFGWrF61lvajnENHTK5K6jmAZ6TfmgnPreB47HK"
    "ODrFHMG/AgHMji4Jq3I/NUC6T2quwua+RE71J6PKrJom6Sn6j2Puq8Nkoj2GS5fjf3DdjTHwaVTkfxXj5xdSR0WNtz"
    "AoSmayOhcybbUgYLGyxGaxVuBpcVzzxjbtPaSEfTnp8Q/c5Akoc//E37B8u2r2W0jRQgAA=="
)
"""The same image as WebP."""

_RULES = (ImageRule(32), ImageRule(8), ImageRule(21, "stretch", (10, 20, 30)))
"""Rules that decode the JPEG at full size, at half size, and with stretching."""


def decoder_name() -> str:
    """The versions of Pillow and of the libraries that decode lossy formats."""
    from PIL import features

    libraries = {"libjpeg_turbo": "libjpeg-turbo", "webp": "WebP", "avif": "AVIF"}
    versions = [
        f"{name} {features.version(library)}"
        for library, name in libraries.items()
        if features.version(library) is not None
    ]
    return f"Pillow {pillow().__version__} ({', '.join(versions)})"


def reading_limits() -> dict[str, Any]:
    """The properties of Pillow that decide whether a file can be read at all, in JSON types.

    If Pillow was built without a library, it cannot read that library's format. The maximum number
    of pixels can be changed by the program that uses Pillow.
    """
    from PIL import features

    libraries = {name: features.check(name) for name in ("avif", "jpg", "libtiff", "webp", "zlib")}
    return {"libraries": libraries, "max_pixels": pillow().MAX_IMAGE_PIXELS}


@functools.cache
def decoder_fingerprint() -> str:
    """A hash of a few small images after decoding."""
    digest = hashlib.sha256()
    for image in _images():
        for rule in _RULES:
            try:
                digest.update(decode_image(image, rule).tobytes())
            except BadImage:  # built without WebP
                digest.update(b"not read")
    return digest.hexdigest()


def _images() -> Iterator[Any]:
    for encoded in (_JPEG, _WEBP):
        yield base64.b64decode(encoded)
    rows, columns = np.mgrid[:37, :45]
    channels = [rows * 7, columns * 5, rows * columns, (rows + columns) * 3]
    yield np.stack(channels, -1).astype(np.uint8)  # with transparency
    yield (rows * 6 ^ columns * 5).astype(np.uint8)
    yield pillow().fromarray((rows * 1500 + columns * 300).astype(np.uint16))
    yield pillow().frombytes("CMYK", (45, 37), np.stack(channels, -1).astype(np.uint8).tobytes())
