"""Files that are whole or not there: each is written under another name, then renamed."""

from pathlib import Path

import numpy as np

__all__ = ["write_npz", "write_whole"]


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
