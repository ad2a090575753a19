"""The record of the run in each checkpoint, and the list of the checkpoints' file sizes."""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxcl.host.command import UserError
from jaxcl.host.files import read_json_object
from jaxcl.host.paths import AnyPath

__all__ = [
    "RECORD",
    "CheckpointError",
    "check_none_lost",
    "known_sizes",
    "newest_record",
    "saved_record",
    "sealed",
    "sizes_file",
    "steps_in",
]

RECORD = "record"
"""The name of the record next to the state in a checkpoint."""

_RECORD_FILE = Path(RECORD) / "data.json"  # as Orbax writes it


class CheckpointError(UserError):
    """A checkpoint cannot be written, or no checkpoint can be read."""


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Add a digest to a record, for `saved_record`."""
    return {"record": dict(record), "sha256": _digest(record)}


def saved_record(directory: AnyPath) -> Mapping[str, Any]:
    """Read the record of the checkpoint in a folder.

    Raises:
      CheckpointError: if the record is damaged, or belongs to another step.
    """
    try:
        content = read_json_object(directory / _RECORD_FILE)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"it has no record ({_RECORD_FILE}), like checkpoints of earlier versions"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"its record cannot be read: {error}") from error
    record = content.get("record")
    if not isinstance(record, dict) or content.get("sha256") != _digest(record):
        raise CheckpointError(f"its record in {_RECORD_FILE} is damaged")
    if record.get("step") != int(directory.name):
        raise CheckpointError(f"it is of step {record.get('step')}, so its folder was renamed")
    return record


def newest_record(directory: AnyPath) -> Mapping[str, Any] | None:
    """The record of the newest checkpoint with a readable record, or `None` if there is none."""
    for step in reversed(steps_in(directory)):
        with contextlib.suppress(CheckpointError):
            return saved_record(directory / str(step))
    return None


def check_none_lost(directory: AnyPath) -> None:
    """Raise a `CheckpointError` if steps were saved in a folder that now has no checkpoint."""
    file = sizes_file(directory)
    noted = known_sizes(file)
    if noted and not steps_in(directory):
        raise CheckpointError(
            f"step {max(map(int, noted))} was saved in {directory}, but that folder has no "
            "checkpoint now; mount its volume, or restore it from a copy. To start over, delete "
            f"{file}"
        )


def sizes_file(directory: AnyPath) -> AnyPath:
    """The path of the file that lists the sizes of the checkpoints in a folder."""
    return directory.with_name(f"{directory.name}.sizes.json")


def known_sizes(path: AnyPath) -> dict[str, dict[str, int]]:
    """Read the list of file sizes in bytes, by step and name; empty if it is missing or damaged."""
    try:
        content = read_json_object(path)
    except (OSError, ValueError):  # such as after a process was killed during its first save
        return {}
    return {
        step: sizes for step, sizes in content.items() if step.isdigit() and isinstance(sizes, dict)
    }


def steps_in(directory: AnyPath) -> list[int]:
    """The steps of the checkpoints in a folder, oldest first, including damaged ones."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
