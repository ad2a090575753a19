"""Image files in a folder: their list, their contents, and paths that must be inside of it."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxcl.host.files import read_regular

__all__ = ["IMAGE_SUFFIXES", "ImageFiles", "file_inside", "image_files"]

IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"),
)
"""The suffixes of image files, in lower case; other files in a folder of images are ignored."""

_MAX_IMAGE_BYTES = 256 * 2**20


class ImageFiles(Sequence[bytes]):
    """The contents of image files, read when they are used.

    Args:
      paths: the files.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row):
        if isinstance(row, slice):
            return ImageFiles(self.paths[row])
        return read_regular(self.paths[row], limit=_MAX_IMAGE_BYTES)


def image_files(folder: Path) -> list[Path]:
    """The image files of a folder and its subfolders, sorted; hidden ones are ignored.

    Raises:
      ValueError: if a link leads outside of the folder.
    """
    return [
        file_inside(folder, path) for path in _walk(folder) if path.suffix.lower() in IMAGE_SUFFIXES
    ]


def file_inside(folder: Path, name: str | os.PathLike[str]) -> Path:
    """The path of a file, by its path relative to a folder that it must be inside of.

    Raises:
      ValueError: if the path leads outside of the folder, also by a link.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{os.fspath(name)!r} is outside of {folder}; give a path inside of it")
    return path


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(files) if not name.startswith("."))
