"""The rows of a folder of images, whose subfolders are the classes."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxcl.data.images.file_index import digest_of_files
from jaxcl.settings.file_kinds import image_names

__all__ = ["FOLDER_FIELDS", "folder_digest", "folder_rows"]

FOLDER_FIELDS = ("image", "label", "path")


def folder_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """The images of a folder, in the order of their paths.

    Args:
      folder: a folder whose subfolders are the classes. Classes may have subfolders.

    Yields:
      `"image"`, a path relative to the folder; `"label"`, the name of the class; `"path"`, the same
      path as a text field.
    """
    for name in _names(folder):
        yield {"image": name, "label": name.partition("/")[0], "path": name}


def folder_digest(folder: Path, directory: Path) -> str:
    """A sha256 of the names and contents of the images in a folder.

    Args:
      folder: the folder.
      directory: the folder that caches the digests of the files.
    """
    digest = digest_of_files(folder, list(_names(folder)), directory=directory)
    return hashlib.sha256(f"folder {digest}".encode()).hexdigest()


def _names(folder: Path) -> Iterator[str]:
    """The paths of the images in all classes, sorted by class and path."""
    with os.scandir(folder) as entries:
        classes = sorted(one.name for one in entries if one.is_dir() and one.name[0] != ".")
    for label in classes:
        yield from sorted(f"{label}/{name}" for name in image_names(folder / label))
