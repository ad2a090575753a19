"""Paths that a folder's own files name: they may not leave the folder."""

import os
from pathlib import Path, PurePosixPath, PureWindowsPath

from jaxcl.host.files import is_remote
from jaxcl.host.paths import AnyPath

__all__ = ["join", "lies_in", "path_inside"]


def join(folder: str, name: str) -> str:
    """The path of a file in a folder, `""` being the model's folder itself."""
    return f"{folder}/{name}" if folder else name


def lies_in(file: str, folder: str) -> bool:
    """Whether a file, relative to the model's folder, lies in a folder and not deeper."""
    return PurePosixPath(file).parent == PurePosixPath(folder)


def path_inside(root: AnyPath, name: str) -> AnyPath:
    """The path of a file in the model's folder.

    Symbolic links are followed as long as they stay in the folder. The cache of the Hugging Face
    Hub is an exception: there `models--…/snapshots/…` holds links into `models--…/blobs`.

    Args:
      root: the model's folder.
      name: a path relative to it, as `modules.json` and the index of a sharded model give them.

    Raises:
      ValueError: for an absolute path, one with `..`, or a link that leaves the folder.
    """
    # On Windows both slashes separate, and there are drives; its rules are safe elsewhere too.
    parts = PureWindowsPath(name)
    if parts.anchor or ".." in parts.parts or "\0" in name:
        raise ValueError(
            f"{root} refers to {name!r}, which may lie outside of it; give a path inside the folder"
        )
    path = root / name
    if not is_remote(root):
        real = Path(os.path.realpath(path))
        if not any(real.is_relative_to(home) for home in _homes(Path(os.path.realpath(root)))):
            raise ValueError(
                f"{path} is a link to {real}, outside of the folder; copy the file into the folder"
            )
    return path


def _homes(root: Path) -> list[Path]:
    """The folders in which the files of a model may lie."""
    repository = root.parent.parent
    if root.parent.name == "snapshots" and repository.name.startswith("models--"):
        return [root, repository / "blobs"]
    return [root]
