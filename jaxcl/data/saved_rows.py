"""Write rows from a Python program to a file of pairs, so that a run can find them again."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxcl.host.staging import staging_folder

__all__ = ["save_rows"]


def save_rows(rows: Iterable[Mapping[str, Any]], folder: Path) -> Path:
    """Write rows as JSON lines, under a name that is a digest of their content.

    Args:
      rows: dicts with the fields of a file of pairs. They are written one by one, so a generator is
        never held in memory as a whole.
      folder: the folder of the file.

    Returns:
      The path of the file; equal rows have equal paths.

    Raises:
      ValueError: if a row is not a dict, or holds a value that JSON cannot represent.
      OSError: if the file cannot be written.

    Example:
      >>> import tempfile
      >>> path = save_rows([{"query": "add", "key": "a + b"}], Path(tempfile.mkdtemp()))
      >>> path.read_text()
      '{"query": "add", "key": "a + b"}\\n'
    """
    digest = hashlib.sha256()
    with staging_folder(folder / "new") as staging:
        unfinished = staging / "rows.jsonl"
        with unfinished.open("wb") as file:
            for number, row in enumerate(rows):
                line = _line(row, number)
                digest.update(line)
                file.write(line)
        path = folder / f"{digest.hexdigest()[:16]}.jsonl"
        unfinished.replace(path)
    return path


def _line(row: Any, number: int) -> bytes:
    if not isinstance(row, Mapping):
        raise ValueError(
            f"row {number:,} is a {type(row).__name__}; give dicts such as {{'query': …, 'key': …}}"
        )
    try:
        return json.dumps(dict(row), ensure_ascii=False, default=_plain).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"row {number:,} cannot be written as JSON ({error})") from error


def _plain(value: Any) -> Any:
    """Convert NumPy arrays and numbers to JSON types."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"it holds a {type(value).__name__}")
