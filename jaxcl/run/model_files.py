"""Write the files of an exported model as one folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxcl.host.staging import put_in_place, staging_folder
from jaxcl.models.pretrained.tensor_files import write_tensors

__all__ = ["ModelFiles", "as_json", "check_free", "with_dtype", "write_folder"]


class ModelFiles(NamedTuple):
    """The files of a model.

    Attributes:
      contents: the bytes of files, by path relative to the folder.
      tensors: the tensors of safetensors files, by path relative to the folder and by name.
    """

    contents: Mapping[str, bytes]
    tensors: Mapping[str, Mapping[str, np.ndarray]]


def as_json(content: Any) -> bytes:
    """Serialise a value as the content of a JSON file."""
    return (json.dumps(content, indent=2) + "\n").encode()


def with_dtype(
    tensors: Mapping[str, Mapping[str, np.ndarray]], dtype: np.dtype | None
) -> dict[str, dict[str, np.ndarray]]:
    """Convert the floating-point tensors, by file and name, to another type.

    Raises:
      ValueError: if a finite value overflows in that type.
    """

    def converted(name: str, tensor: np.ndarray) -> np.ndarray:
        if dtype is None or not jnp.issubdtype(tensor.dtype, np.floating):
            return tensor
        with np.errstate(over="ignore"):
            narrow = tensor.astype(dtype)
        if np.isfinite(tensor).all() and not np.isfinite(narrow).all():
            raise ValueError(
                f"dtype={dtype.name} cannot hold {name}, whose largest value is "
                f"{np.abs(tensor).max():g}; use bfloat16 or float32"
            )
        return narrow

    return {
        file: {name: converted(name, tensor) for name, tensor in named.items()}
        for file, named in tensors.items()
    }


def check_free(folder: Path) -> None:
    """Raise a `FileExistsError` unless a folder is new or empty."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty; remove its files, or give another folder")


def write_folder(folder: Path, files: ModelFiles) -> None:
    """Write a folder completely or not at all.

    Args:
      folder: a new or empty folder; its parent is created if necessary.
      files: the content of the folder.

    Raises:
      FileExistsError: if the folder is not empty.
      OSError: if the folder cannot be written.
    """
    check_free(folder)
    with staging_folder(folder) as staging:
        staged = staging / folder.name
        staged.mkdir()
        for name, content in files.contents.items():
            _path_of(staged, name).write_bytes(content)
        for name, tensors in files.tensors.items():
            write_tensors(_path_of(staged, name), tensors)
        put_in_place(staged, folder, replace=False)
        if staged.exists():  # another process was faster
            check_free(folder)


def _path_of(folder: Path, name: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
