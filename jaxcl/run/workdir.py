"""A run's own folder: one run at a time, of one config, with files that are whole or not there."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxcl.data.modalities import MODALITIES
from jaxcl.host.files import read_json_object, write_whole
from jaxcl.settings.read import as_dict
from jaxcl.settings.section_reader import read_section
from jaxcl.settings.sections import AssignmentSettings, Settings

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

CONFIG_FILE = "config.json"


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


def claim_workdir(workdir: Path, settings: Settings) -> None:
    """Makes a run's folder, or checks that it belongs to these settings.

    What stands under `run` (cadences, mesh, folders) may differ from earlier starts: it does not
    change what the run computes. Before the first checkpoint nothing is lost by other settings:
    then the folder becomes theirs.

    Raises:
      ValueError: if a run of other settings has saved a step there, with the fields that differ.
      PermissionError: if it cannot be written.
    """
    workdir = Path(workdir)
    path = workdir / CONFIG_FILE
    with _explained(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        if path.exists():
            before = read_section(Settings, _migrated(_read_json(path)))
            if different := _differences(fields_of(before), fields_of(settings)):
                if _has_checkpoint(workdir):
                    raise ValueError(
                        f"the workdir {workdir} belongs to another config: "
                        f"{'; '.join(different)}. Choose another --workdir, or take the settings "
                        "back"
                    )
                prepared = [name for modality in MODALITIES.values() for name in modality.files]
                for name in ("data.json", *prepared):
                    (workdir / name).unlink(missing_ok=True)
        if jax.process_index() == 0:
            write_whole(path, json.dumps(as_dict(settings), indent=2) + "\n")


def read_config(workdir: Path) -> Mapping[str, Any]:
    """The config of the run in a folder, for `read_settings`.

    Raises:
      ValueError: if no run has begun there.
    """
    path = Path(workdir) / CONFIG_FILE
    if not path.exists():
        raise ValueError(
            f"there is no run in {workdir} (no {path.name}); give the --workdir that was trained"
        )
    return _migrated(_read_json(path))


def _migrated(config: dict[str, Any]) -> dict[str, Any]:
    """A config of an earlier version, with the names of this one."""
    options = config.get("model", {}).get("options", {})
    if "token_dropout" in options and "augmentation" not in config:
        rate = options.pop("token_dropout")
        config["augmentation"] = {"name": "token_dropout", "options": {"rate": rate}}
    return config


def fields_of(settings: Settings) -> dict[str, Any]:
    """The settings that decide what a run computes, by dotted name.

    They are all except those under `run`, and those of assignments that the run does not use.
    """
    unused = tuple(
        f"assignment.{name}."
        for name in AssignmentSettings._fields
        if name not in ("name", settings.assignment.name)
    )
    return {
        field: value
        for field, value in _flat(as_dict(settings))
        if field.split(".")[0] != _MAY_CHANGE and not field.startswith(unused)
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


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The fields in which two runs differ; one that is unset is one that is not there."""
    return [
        f"{field} is {now.get(field, 'nothing')} here and {before.get(field, 'nothing')} there"
        for field in sorted(before.keys() | now.keys())
        if before.get(field) != now.get(field)
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
