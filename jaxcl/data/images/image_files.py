"""List and read the image files in a folder, and reject paths that lead outside of it."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxcl.data.images.decoding import MAX_IMAGE_BYTES, BadImage, ImageRule, decode_image
from jaxcl.host.files import read_regular
from jaxcl.settings.file_kinds import image_names

__all__ = [
    "ImageFiles",
    "check_images_decode",
    "file_inside",
    "image_files",
    "naming_damaged",
]


class ImageFiles(Sequence[bytes]):
    """The contents of image files, read when they are used.

    Args:
      files: the path of each file, or its content.
    """

    def __init__(self, files: Sequence[Path | bytes]) -> None:
        self.files = list(files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row):
        file = self.files[row]
        if isinstance(row, slice):
            return ImageFiles(file)
        return file if isinstance(file, bytes) else read_regular(file, limit=MAX_IMAGE_BYTES)

    def check(self) -> None:
        """Raise a `ValueError` that names the first image that cannot be decoded."""
        names = [
            f"number {number:,}" if isinstance(file, bytes) else os.fspath(file)
            for number, file in enumerate(self.files, start=1)
        ]
        check_images_decode(names, self)


@contextlib.contextmanager
def naming_damaged(images: Sequence[Any]) -> Iterator[None]:
    """Make decoding errors name the damaged file instead of its position in a batch."""
    try:
        yield
    except ValueError:
        if isinstance(images, ImageFiles):
            images.check()
        raise


def check_images_decode(names: Sequence[str], images: Iterable[Any]) -> None:
    """Raise a `ValueError` with the name of the first image that cannot be decoded.

    Args:
      names: the name of each image.
      images: the images, as `jaxcl.data.images.decoding.decode_image` accepts them.
    """
    for name, image in zip(names, images, strict=True):
        try:
            decode_image(image, ImageRule(size=1))
        except BadImage as error:
            raise ValueError(f"the image {name} cannot be decoded: {error}") from error


def image_files(folder: Path) -> list[Path]:
    """The image files of a folder and its subfolders, sorted; hidden ones are ignored.

    Raises:
      ValueError: if a link leads outside of the folder.
    """
    return [file_inside(folder, name) for name in image_names(folder)]


def file_inside(folder: Path, name: str | os.PathLike[str]) -> Path:
    """Join a folder and the relative path of a file, which must be inside of the folder.

    Raises:
      ValueError: if the path leads outside of the folder, directly or through a link.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{os.fspath(name)!r} is outside of {folder}; give a path inside of it")
    return path
