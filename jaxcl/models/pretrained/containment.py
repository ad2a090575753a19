"""Checks that the paths in a model's files stay inside the model's folder."""

import os
from pathlib import Path, PurePosixPath, PureWindowsPath

from jaxcl.host.files import is_remote
from jaxcl.host.paths import AnyPath

__all__ = ["join", "lies_in", "path_inside"]


def join(folder: str, name: str) -> str:
    """The path of a file in a folder; `""` stands for the model's folder itself."""
    return f"{folder}/{name}" if folder else name


def lies_in(file: str, folder: str) -> bool:
    """Whether a file lies directly in a folder; both paths are relative to the model's folder."""
    return PurePosixPath(file).parent == PurePosixPath(folder)


def path_inside(root: AnyPath, name: str) -> AnyPath:
    """The path of a file in the model's folder.

    Symbolic links are followed if they stay in the folder. In the cache of the Hugging Face Hub,
    `models--…/snapshots/…` may also link into `models--…/blobs`.

    Args:
      root: the model's folder.
      name: a path relative to it, from `modules.json` or the index of a sharded model.

    Raises:
      ValueError: for an absolute path, a path with `..`, or a link that leaves the folder.
    """
    # Windows has two separators and drive letters; its stricter rules are safe everywhere.
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
    """The folders that may hold the files of a model."""
    repository = root.parent.parent
    if root.parent.name == "snapshots" and repository.name.startswith("models--"):
        return [root, repository / "blobs"]
    return [root]
