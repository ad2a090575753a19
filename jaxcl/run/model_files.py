"""The files of an exported model, put in place as one folder."""

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxcl.host.staging import put_in_place, staging_folder
from jaxcl.models.pretrained.tensor_files import write_tensors

__all__ = ["ModelFiles", "check_free", "write_folder"]


class ModelFiles(NamedTuple):
    """The files of a model.

    Attributes:
      contents: file, relative to the folder -> its bytes.
      tensors: safetensors file, relative to the folder -> its tensors by name.
    """

    contents: Mapping[str, bytes]
    tensors: Mapping[str, Mapping[str, np.ndarray]]


def check_free(folder: Path) -> None:
    """Raise a `FileExistsError` unless a folder is empty or absent."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        problem = "there are files in the way; remove them, or give another folder"
        raise FileExistsError(errno.EEXIST, problem, str(folder))


def write_folder(folder: Path, files: ModelFiles) -> None:
    """Write a folder whole or not at all.

    Args:
      folder: empty or absent; the folder that holds it is made if necessary.
      files: its content.

    Raises:
      FileExistsError: if the folder is not empty.
      OSError: if it cannot be written.
    """
    check_free(folder)
    with staging_folder(folder) as staging:
        made = staging / folder.name
        made.mkdir()
        for name, content in files.contents.items():
            _path_of(made, name).write_bytes(content)
        for name, tensors in files.tensors.items():
            write_tensors(_path_of(made, name), tensors)
        put_in_place(made, folder, replace=False)
        if made.exists():  # another process was faster
            check_free(folder)


def _path_of(folder: Path, name: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
