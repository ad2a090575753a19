"""Files: written whole or not at all, and JSON from others read with a limit.

A file is written under another name, then renamed.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["read_json_object", "write_npz", "write_whole"]

_MAX_CHARACTERS = 64 * 2**20
"""Of a JSON file; the largest real ones have a few million."""


def read_json_object(path: Any) -> dict[str, Any]:
    """Read a JSON file of limited size that holds an object.

    Args:
      path: a `pathlib.Path` or `etils.epath.Path`.

    Raises:
      ValueError: if the file has more than 64 Mi characters, or does not hold a JSON object.
      OSError: if it cannot be read.
    """
    try:
        with path.open() as file:  # as text, in the encoding in which TFDS reads it
            text = file.read(_MAX_CHARACTERS + 1)
        if len(text) > _MAX_CHARACTERS:
            raise ValueError(f"it has more than {_MAX_CHARACTERS:,} characters")
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("it does not hold a JSON object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    return content


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader finds all of it or none of it."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
    unfinished.replace(path)


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays to an `.npz` as `write_whole` does, creating its folder if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    unfinished.replace(path)
