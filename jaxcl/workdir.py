"""A run's own folder: which config it belongs to, and files that are whole or not there."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

__all__ = ["claim_workdir", "read_config", "write_whole"]

_MAY_CHANGE = "run"


def claim_workdir(workdir: Path, config: ConfigDict) -> None:
    """Makes a run's folder, or checks that it is this config's.

    What stands under `config.run` (cadences, mesh, folders) may differ from the start before: it
    does not change what the run computes.

    Raises:
      ValueError: if the folder belongs to another config, with the fields that differ.
      PermissionError: if it cannot be written.
    """
    workdir = Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "config.json"
        before = json.loads(path.read_text()) if path.exists() else None
        now = json.loads(config.to_json_best_effort())
        if before is not None:
            _check_same(workdir, before, now)
        if jax.process_index() == 0:
            write_whole(path, json.dumps(now, indent=2) + "\n")
    except OSError as error:
        raise PermissionError(
            f"cannot write to the workdir {workdir} ({error.strerror}); make it writable, or "
            "choose another --workdir"
        ) from error


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
    return ConfigDict(json.loads(path.read_text()))


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


def _check_same(workdir: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    ours, theirs = dict(_flat(now)), dict(_flat(before))
    missing = "nothing"
    different = [
        f"{field} is {ours.get(field, missing)} here and {theirs.get(field, missing)} there"
        for field in sorted(ours.keys() | theirs.keys())
        if ours.get(field, missing) != theirs.get(field, missing)
        and field.split(".")[0] != _MAY_CHANGE
    ]
    if different:
        raise ValueError(
            f"the workdir {workdir} belongs to another config: {'; '.join(different)}. Choose "
            "another --workdir, or take the settings back"
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
