"""Folders of labelled images: a subfolder per class, and optionally parts."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxcl.data.images.image_files import ImageFiles, image_files
from jaxcl.evaluation.labelled import LabelledParts, part_of
from jaxcl.settings.file_kinds import IMAGE_SUFFIXES
from jaxcl.typing import Int

__all__ = ["read_class_folders", "read_labelled_images"]

_PARTS = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}


def read_labelled_images(path: Path) -> LabelledParts:
    """Read a folder of labelled images, and divide it into parts if it is not divided.

    The folder has the subfolders `train` and `test`, and optionally `validation`, `val` or `valid`,
    each with a folder per class; or it has only a folder per class. If there is no test or
    validation part, a digest of each image's content selects a fifth of the images for it, so that
    equal images are in the same part.

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
    for folder_part, name, file in _all_files(files):
        of_file = hashlib.sha256(ImageFiles([file])[0]).digest()
        part = folder_part or part_of(of_file)
        if part == "train" and folder_part and "validation" not in files:
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
            classes[folder.name] = image_files(folder)
    return {name: files for name, files in classes.items() if files}


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
