"""Recognise files of pairs in `data.name` and `data.splits`, and parse the shares of splits."""

import os
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

from jaxcl.host.paths import local_path

__all__ = [
    "BUILT_IN",
    "COMPRESSIONS",
    "HUGGING_FACE_FILES",
    "IMAGE_SUFFIXES",
    "KINDS",
    "REST",
    "WHOLE",
    "Share",
    "file_kind",
    "image_names",
    "is_image_folder",
    "is_pattern",
    "names_files",
    "names_other_files",
    "reads_files",
    "relocated_splits",
    "share_of_split",
]

BUILT_IN = ("code_pairs", "glyphs", "emoji")
"""Data sets that jaxcl makes from installed packages, as values of `data.name`."""

KINDS = ("jsonl", "ndjson", "json", "csv", "tsv", "parquet", "tar")
"""Suffixes of files of rows; `.ndjson` and `.json` are read as JSON lines, `.tar` as WebDataset."""

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm"),
)
"""Suffixes of image files, in lower case."""

COMPRESSIONS = ("gz", "bz2", "xz", "zst")
"""Suffixes of compressed files, after a suffix of `KINDS`."""

HUGGING_FACE_FILES = ("dataset_dict.json", "state.json")
"""Files written by `save_to_disk` of Hugging Face's `datasets`, the first for several splits."""

REST = "rest"
"""The split with the training rows that no other role takes."""

WHOLE = 1_000_000
"""The number of units in a whole split: a share is a range of these units."""

_SPLIT = re.compile(
    r"(?P<name>\w+)(\[((?P<start>\d+(\.\d+)?)%)?:((?P<stop>\d+(\.\d+)?)%)?\])?", re.ASCII
)


_TFDS_SPLIT = re.compile(r"\w+(\[[^\]]*\])?(\+\w+(\[[^\]]*\])?)*", re.ASCII)
"""A split as TFDS writes it, such as `train[:100]+dev`, whose brackets are not a file pattern."""


class Share(NamedTuple):
    """The rows of a split whose hashes lie in a range.

    Attributes:
      split: the name of the split; a plain file has only `"train"`.
      start, stop: the range, in millionths.
    """

    split: str
    start: int = 0
    stop: int = WHOLE


def file_kind(path: Path) -> tuple[str, str | None]:
    """The kind of a file and its compression, by the suffixes of its name.

    Raises:
      ValueError: for an unknown suffix.

    Example:
      >>> file_kind(Path("pairs.jsonl.gz")), file_kind(Path("pairs.csv"))
      (('jsonl', 'gz'), ('csv', None))
    """
    *_, before, last = ["", "", *path.name.lower().split(".")[1:]]
    kind, compression = (before, last) if last in COMPRESSIONS else (last, None)
    if last == "tgz" or (kind == "tar" and compression):
        raise ValueError(
            f"{path} is compressed, so its members cannot be read in any order; decompress it to a "
            ".tar, which is hardly larger, because images are compressed themselves"
        )
    if kind not in KINDS or (kind == "parquet" and compression):
        raise ValueError(
            f"{path} has an unknown suffix; files of pairs are named .jsonl, .csv, .tsv, "
            ".parquet or .tar, and all but .parquet and .tar may be compressed "
            f"(.{', .'.join(COMPRESSIONS)})"
        )
    return kind, compression


def names_files(name: str | None) -> bool:
    """Whether a data set is one or more files of pairs, and not a TFDS data set.

    Files are a path with a known suffix or a pattern such as `part-*.jsonl`, any file that exists,
    a folder that `datasets` has written, and a folder of images.

    Example:
      >>> names_files("pairs.jsonl"), names_files("part-*.csv.gz"), names_files("snli:1.1.0")
      (True, True, False)
    """
    if name is None or name in BUILT_IN:
        return False
    try:
        path = local_path(name)
        if path.is_dir():  # even with the marks of a pattern in its name
            is_written = any((path / file).is_file() for file in HUGGING_FACE_FILES)
            return is_written or is_image_folder(path)
        if is_pattern(name) or path.is_file():
            return True
        file_kind(path)
        return True
    except (ValueError, OSError):  # a URL, or a name with another suffix
        return False


def is_image_folder(path: Path) -> bool:
    """Whether a folder has subfolders with images, and is not a prepared data set."""
    if not path.is_dir() or (path / "dataset_info.json").exists():
        return False
    if any((path / file).is_file() for file in HUGGING_FACE_FILES):
        return False
    with os.scandir(path) as entries:
        classes = [one.path for one in entries if one.is_dir() and not one.name.startswith(".")]
    return any(next(image_names(Path(folder)), None) is not None for folder in classes)


def image_names(folder: Path) -> Iterator[str]:
    """The image files of a folder and its subfolders, as paths relative to the folder.

    The files of a folder come before the files of its subfolders, both sorted. Hidden files and
    folders are ignored, and links to folders are not followed.
    """
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        where = Path(parent).relative_to(folder)
        for name in sorted(files):
            if not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES):
                yield (where / name).as_posix()


def names_other_files(split: str) -> bool:
    """Whether a split is a path, as for held-out rows in another file."""
    return split != REST and _TFDS_SPLIT.fullmatch(split) is None and names_files(split)


def reads_files(name: str | None, split: str) -> bool:
    """Whether the rows of a split come from files of pairs, and not from a TFDS data set."""
    return names_files(name) or names_other_files(split)


def relocated_splits(
    splits: Mapping[str, str], *, name: str | None, absolute_name: str
) -> dict[str, str]:
    """Make the relative paths in splits absolute.

    Args:
      splits: role -> split.
      name: the files of the other splits, as the config names them.
      absolute_name: the absolute path of these files, which gives the folder of relative paths.

    Example:
      >>> splits = {"train": "rest", "validation": "dev.jsonl"}
      >>> relocated_splits(splits, name="a.jsonl", absolute_name="/data/a.jsonl")
      {'train': 'rest', 'validation': '/data/dev.jsonl'}
    """
    if name is None or Path(name).is_absolute() or not absolute_name.endswith(f"/{name}"):
        return dict(splits)
    folder = Path(absolute_name.removesuffix(name))
    return {
        role: str(folder / Path(split).expanduser()) if names_other_files(split) else split
        for role, split in splits.items()
    }


def is_pattern(name: str) -> bool:
    """Whether a name is a pattern that may match several files, as in a shell."""
    return any(mark in name for mark in "*?[")


def share_of_split(split: str) -> Share | None:
    """The share of a split such as `"train"` or `"train[:95%]"`; `None` for anything else.

    Raises:
      ValueError: for an empty share, or one outside of 0% to 100%.

    Example:
      >>> share_of_split("train[95%:]"), share_of_split("dev.jsonl")
      (Share(split='train', start=950000, stop=1000000), None)
    """
    match = _SPLIT.fullmatch(split)
    if match is None:
        return None
    start, stop = _millionths(match["start"] or "0"), _millionths(match["stop"] or "100")
    if not 0 <= start < stop <= WHOLE:
        raise ValueError(f"the split {split!r} is empty; give a share such as train[:95%]")
    return Share(match["name"], start, stop)


def _millionths(percent: str) -> int:
    return int(Decimal(percent) * WHOLE / 100)
