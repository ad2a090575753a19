"""A run's own folder: one run at a time, of one config, with files that are whole or not there."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxcl.host.files import read_json_object, write_whole

try:
    import fcntl
except ImportError:  # on Windows nothing keeps two runs apart
    fcntl = None  # type: ignore[assignment] # asked for before each use

__all__ = [
    "claim_workdir",
    "fields_of",
    "lock_workdir",
    "read_config",
]

_MAY_CHANGE = "run"
_AS_BEFORE = {"assignment.gcbs.preset": "full"}  # what was done before there were such fields


@contextlib.contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
    """Makes a run's folder and keeps other runs out of it, until the process ends at the latest.

    Raises:
      ValueError: if another run is at work there.
      PermissionError: if it cannot be written.
    """
    if jax.process_index() != 0 or fcntl is None:
        yield
        return
    with _explained(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another run is at work in {workdir}; wait until it ends, or choose another "
                "--workdir"
            ) from None
        yield


def claim_workdir(workdir: Path, config: ConfigDict) -> None:
    """Makes a run's folder, or checks that it is this config's.

    What stands under `config.run` (cadences, mesh, folders) may differ from the start before: it
    does not change what the run computes. Before the first checkpoint nothing is lost by another
    config: then the folder becomes this one's.

    Raises:
      ValueError: if a run of another config has saved a step there, with the fields that differ.
      PermissionError: if it cannot be written.
    """
    workdir = Path(workdir)
    path = workdir / "config.json"
    with _explained(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        before = _read_json(path) if path.exists() else None
        now = json.loads(config.to_json_best_effort())
        if before is not None and (different := _differences(before, now)):
            if _has_checkpoint(workdir):
                raise ValueError(
                    f"the workdir {workdir} belongs to another config: {'; '.join(different)}. "
                    "Choose another --workdir, or take the settings back"
                )
            for made_for_it in ("data.json", "tokenizer.json"):
                (workdir / made_for_it).unlink(missing_ok=True)
        if jax.process_index() == 0:
            write_whole(path, json.dumps(now, indent=2) + "\n")


def read_config(workdir: Path) -> ConfigDict:
    """The config of the run in a folder.

    Raises:
      ValueError: if no run has begun there.
    """
    path = Path(workdir) / "config.json"
    if not path.exists():
        raise ValueError(
            f"there is no run in {workdir} (no {path.name}); give the --workdir that was trained"
        )
    return ConfigDict(_read_json(path))


def fields_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a run computes of a config: its fields by dotted name, but for those under `run`.

    Without those that are `None`, `False` or empty: a later version may add more of them, of which
    these mean what was done before. And without the settings of assignments that are not its own.
    """
    assignment = config.get("assignment", {})
    others = tuple(f"assignment.{name}." for name in assignment if name != assignment.get("name"))
    return {
        field: value
        for field, value in _flat(config)
        if field.split(".")[0] != _MAY_CHANGE
        and not field.startswith(others)
        and value not in (None, {})
        and value is not False
        and (field not in _AS_BEFORE or value != _AS_BEFORE[field])
    }


@contextlib.contextmanager
def _explained(workdir: Path) -> Iterator[None]:
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        raise PermissionError(
            f"the workdir {workdir} cannot be a folder: a file is in the way; choose another "
            "--workdir"
        ) from error
    except OSError as error:
        raise PermissionError(
            f"cannot write to the workdir {workdir} ({error.strerror}); make it writable, or "
            "choose another --workdir"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except ValueError as error:
        raise ValueError(
            f"{error}; put it back, or delete it and give the config that the run began with"
        ) from error


def _has_checkpoint(workdir: Path) -> bool:
    checkpoints = workdir / "checkpoints"
    return checkpoints.is_dir() and any(path.name.isdigit() for path in checkpoints.iterdir())


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The fields in which two configs differ, but for those that may change."""
    ours, theirs = fields_of(now), fields_of(before)
    here, there = dict(_flat(now)), dict(_flat(before))
    return [
        f"{field} is {here.get(field, 'nothing')} here and {there.get(field, 'nothing')} there"
        for field in sorted(ours.keys() | theirs.keys())
        if ours.get(field) != theirs.get(field)
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
