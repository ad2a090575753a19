"""Find the files of a data set that is named by a path, a pattern or a folder."""

import glob
import hashlib
from collections.abc import Sequence
from pathlib import Path

from jaxcl.data.digests import file_digests
from jaxcl.data.images.folder_rows import folder_digest
from jaxcl.host.files import read_json_object
from jaxcl.host.paths import local_path
from jaxcl.settings.file_kinds import (
    HUGGING_FACE_FILES,
    REST,
    file_kind,
    is_image_folder,
    is_pattern,
)

__all__ = ["cached_digests", "describe_files", "find_paths", "unknown_split"]


_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "dev", "test"}


def find_paths(name: str, split: str) -> tuple[Path, ...]:
    """The files of a data set, in order.

    Raises:
      ValueError: if there is no such file or split, or a file has an unknown suffix.
    """
    path = local_path(name)
    if not path.exists() and is_pattern(name):
        paths = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        # Patterns such as **/** match a file twice, and links may lead to the same file.
        distinct = {file.resolve(): file for file in reversed(paths) if file.is_file()}
        paths = list(distinct.values())[::-1]
        if not paths:
            raise ValueError(f"no file matches {path}")
    elif path.is_dir() and not is_image_folder(path):
        return _hugging_face_files(path, split)
    elif not path.exists():
        raise ValueError(f"{path} does not exist")
    else:
        paths = [path]
    for file in paths:
        if file.is_dir():
            _check_classes(file)
        else:
            file_kind(file)
    if split != "train":
        what = "folder of images" if path.is_dir() else "file"
        raise ValueError(f"{unknown_split(name, split)}. A {what} has only the split 'train'")
    return tuple(paths)


def _check_classes(folder: Path) -> None:
    """Reject a folder of splits, whose names would become the classes."""
    names = sorted(one.name for one in folder.iterdir() if one.is_dir())
    if set(names) <= _SPLIT_NAMES:
        raise ValueError(
            f"{folder} has a folder per split ({', '.join(names)}) and not per class; set "
            f"data.name={folder / names[0]}, and the path of another in data.splits, such as "
            f"data.splits.validation={folder / names[-1]}"
        )


def _hugging_face_files(folder: Path, split: str) -> tuple[Path, ...]:
    """The Arrow files of a folder that `save_to_disk` wrote."""
    splits_file, state_file = HUGGING_FACE_FILES
    if (folder / splits_file).is_file():
        splits = read_json_object(folder / splits_file).get("splits")
        if not isinstance(splits, list) or split not in splits:
            raise ValueError(f"{folder} has no split {split!r}; it has {splits}")
        return _hugging_face_files(folder / split, "train")
    if not (folder / state_file).is_file():
        raise ValueError(
            f"{folder} holds no data set: it has neither {state_file}, which datasets writes, nor "
            "the dataset_info.json of a prepared TFDS data set, nor subfolders with images; give "
            f"a file, or a pattern such as {folder}/*.jsonl"
        )
    if split != "train":
        raise ValueError(f"{folder} holds one data set, so its only split is 'train', not {split}")
    entries = read_json_object(folder / state_file).get("_data_files")
    names = []
    for file in entries if isinstance(entries, list) else []:
        name = file.get("filename") if isinstance(file, dict) else None
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix != ".arrow":
            raise ValueError(
                f"{folder / state_file} is damaged (it names {name!r}); write it again"
            )
        names.append(name)
    if not names:
        raise ValueError(f"{folder} has no rows")
    return tuple(folder / name for name in names)


def unknown_split(name: str, split: str) -> str:
    """A message about a split that a data set does not have."""
    return (
        f"{name} has no split {split!r}; give a share such as 'train[:95%]', {REST!r} for the "
        "rows that no other role takes, or the path of another file"
    )


def cached_digests(paths: Sequence[Path], directory: Path) -> tuple[str, ...]:
    """The digests of the files; digests of unchanged files come from a cache in `directory`.

    The digest of a folder of images covers the names and contents of the images.
    """
    folders = [path for path in paths if path.is_dir()]
    digests = {path: folder_digest(path, directory / "folders") for path in folders}
    for parent in dict.fromkeys(path.parent for path in paths if path not in folders):
        name = hashlib.sha256(str(parent.absolute()).encode()).hexdigest()[:16]
        cache = directory / "digests" / name
        cache.mkdir(parents=True, exist_ok=True)
        files = [path for path in paths if path.parent == parent and path not in folders]
        digests |= dict(zip(files, file_digests(cache, files), strict=True))
    return tuple(digests[path] for path in paths)


def describe_files(paths: Sequence[Path]) -> str:
    """Name the first file and count the others, for messages."""
    more = f" and {len(paths) - 1:,} more files" if len(paths) > 1 else ""
    return f"{paths[0]}{more}"
