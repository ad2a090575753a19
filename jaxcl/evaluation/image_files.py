"""Image files of evaluation sets: labelled folders, and paths inside of a folder."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxcl.evaluation.labelled import LabelledParts, part_of
from jaxcl.host.files import read_regular
from jaxcl.typing import Int

__all__ = [
    "IMAGE_SUFFIXES",
    "ImageFiles",
    "file_inside",
    "read_class_folders",
    "read_labelled_images",
]

IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"),
)
"""The suffixes of image files, in lower case; other files in a folder of images are ignored."""

_MAX_IMAGE_BYTES = 256 * 2**20
_PARTS = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}


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


def read_labelled_images(path: Path) -> LabelledParts:
    """Read a folder of labelled images, and divide it into parts if it is not divided.

    The folder has the subfolders `train` and `test`, and optionally `validation`, `val` or `valid`,
    each with a folder per class; or it only has a folder per class. Parts that are missing are
    chosen by a digest of the content, so that equal images are in one part: a fifth for the test
    part, and a fifth for the validation part.

    Raises:
      ValueError: if there is only one class, a class has no training image, a part is empty, only
        one of `train` and `test` exists, or a path leads outside of the folder.
      OSError: if a file cannot be read.
    """
    folders = _part_folders(path)
    files = {part: read_class_folders(folder) for part, folder in folders.items()}
    classes = tuple(sorted({name for of_part in files.values() for name in of_part}))
    numbers = {name: number for number, name in enumerate(classes)}
    digest = hashlib.sha256("\0".join(classes).encode())
    paths: dict[str, list[Path]] = {part: [] for part in _PARTS}
    labels: dict[str, list[int]] = {part: [] for part in _PARTS}
    for given, name, file in _all_files(files):
        of_file = hashlib.sha256(read_regular(file, limit=_MAX_IMAGE_BYTES)).digest()
        part = given or part_of(of_file)
        if part == "train" and given and "validation" not in files:
            part = part_of(of_file, test_share=0.0)
        paths[part].append(file)
        labels[part].append(numbers[name])
        digest.update(f"{part} {numbers[name]} ".encode() + of_file)
    images = {part: ImageFiles(of_part) for part, of_part in paths.items()}
    arrays = {part: np.array(of_part, np.int64) for part, of_part in labels.items()}
    _check_parts(path, classes, arrays)
    return LabelledParts(classes, images, arrays, digest.hexdigest())


def read_class_folders(path: Path) -> dict[str, list[Path]]:
    """List the image files of each subfolder and its subfolders, sorted; hidden ones are ignored.

    Returns:
      Name of the subfolder -> its image files; subfolders without any are left out.

    Raises:
      ValueError: if a link leads outside of the folder.
    """
    classes = {}
    for folder in sorted(path.iterdir()):
        if folder.is_dir() and not folder.name.startswith("."):
            files = [file for file in _walk(folder) if file.suffix.lower() in IMAGE_SUFFIXES]
            if files:
                classes[folder.name] = [file_inside(path, file) for file in files]
    return classes


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


def _part_folders(path: Path) -> dict[str, Path]:
    present = {
        part: path / name
        for part, names in _PARTS.items()
        for name in names
        if (path / name).is_dir()
    }
    if not {"train", "test"} & set(present):
        return {"": path}
    if not {"train", "test"} <= set(present):
        (only,) = {"train", "test"} & set(present)
        raise ValueError(
            f"{path} has a folder {only!r}, but no {'test' if only == 'train' else 'train'!r}; add "
            "it, or put the folders of the classes directly into the folder, to have it divided"
        )
    return present


def _all_files(files: Mapping[str, Mapping[str, Sequence[Path]]]) -> Iterator[tuple]:
    for part, of_part in files.items():
        for name, paths in of_part.items():
            yield from ((part, name, path) for path in paths)


def _check_parts(
    path: Path, classes: Sequence[str], labels: Mapping[str, Int[np.ndarray, " n"]]
) -> None:
    if len(classes) < 2:
        raise ValueError(
            f"{path} has images of {len(classes)} classes; give a folder with a subfolder of "
            f"images ({', '.join(IMAGE_SUFFIXES)}) for each of at least two classes"
        )
    for part, of_part in labels.items():
        if not len(of_part):
            raise ValueError(f"the {part} part of {path} has no image; add more images")
    missing = sorted(set(range(len(classes))) - set(labels["train"].tolist()))
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(classes)} classes in {path} have no training image, first "
            f"{classes[missing[0]]!r}; add images, or remove the class"
        )
