"""The images that `EmbeddingModel.encode` accepts, and how a side reads them."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from jaxcl.data.images.decoder_probe import decoder_fingerprint
from jaxcl.data.images.image_modality import Image
from jaxcl.data.modality import Reader
from jaxcl.host.paths import AnyPath
from jaxcl.settings.data_sections import DataSettings
from jaxcl.typing import Int

__all__ = ["ImageSide", "Images", "as_sequence", "chosen", "image_side", "is_one_image"]

Images: TypeAlias = Any
"""An image, or a sequence of images: paths, `bytes` of image files, PIL images, uint8 arrays."""


class ImageSide(NamedTuple):
    """How a side reads images.

    Attributes:
      read: images -> inputs of an encoder, arrays `[n, …]`.
      length: the number of patches in an image, which determines the size of batches.
      description: the settings on which the inputs depend, in JSON types.
    """

    read: Reader
    length: int
    description: dict[str, Any]


def image_side(data: DataSettings, side: str, folder: AnyPath) -> ImageSide:
    """The reader of a side whose modality is images.

    Args:
      data: the settings of the run, with the size of its images.
      side: `"query"` or `"key"`.
      folder: the folder of the run or model.
    """
    image = Image()
    return ImageSide(
        image.reader(data, side, folder),
        image.length(data, side),
        {**data.images._asdict(), "decoder": decoder_fingerprint()},
    )


def is_one_image(images: Images) -> bool:
    """Whether these are one image, and not a sequence of images."""
    if isinstance(images, np.ndarray):
        return images.ndim < 4
    return isinstance(images, str | bytes | os.PathLike) or not isinstance(images, Sequence)


def as_sequence(images: Images) -> Sequence[Any]:
    """The images as a sequence. A lazy sequence, which reads values on use, is not read here."""
    if is_one_image(images):
        return [images]
    return list(images) if isinstance(images, np.ndarray) else images


def chosen(images: Sequence[Any], rows: Int[np.ndarray, " b"]) -> list[Any]:
    """The images of the given rows, with paths as `str`."""
    values = [images[row] for row in rows.tolist()]
    return [os.fspath(value) if isinstance(value, os.PathLike) else value for value in values]
