"""The identity of a run: the settings, data and JAX flags that determine its result bit for bit.

Every checkpoint has a record of these, so that a run never resumes from the state of another run.
"""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxcl.data.prepare import RememberedData
from jaxcl.settings.derived import gcbs_rule, learning_rate_of
from jaxcl.settings.read import as_dict
from jaxcl.settings.section_reader import read_section
from jaxcl.settings.sections import AssignmentSettings, Settings
from jaxcl.typing import Int

__all__ = [
    "differences",
    "fields_of",
    "jax_flags",
    "migrated",
    "pretrained_fingerprints",
    "process_report",
    "run_record",
    "settings_differences",
]

# Fields that only the evaluation or the host reads. `jaxcl.evaluation.in_training` raises an error
# if the data of an evaluation set change under the same name.
_MAY_CHANGE = (
    "run.",
    *(
        f"evaluation.{name}"
        for name in (
            *("methods", "directions", "exclude_groups", "rrf_k", "sets"),
            *("best_metric", "patience", "min_delta"),
        )
    ),
)

_FLAGS = ("jax_enable_x64", "jax_default_prng_impl", "jax_threefry_partitionable")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tokenizers")


def fields_of(settings: Settings) -> dict[str, Any]:
    """The settings that determine the result of a run, by dotted name.

    These are all settings except `run` (intervals, mesh and folders), evaluation, early stopping,
    and the sections of assignments that the run does not use. `epochs` are included as `steps`.
    """
    unused = tuple(
        f"assignment.{name}."
        for name in AssignmentSettings._fields
        if name not in ("name", settings.assignment.name)
    )
    return {
        field: value
        for field, value in _flat(as_dict(settings))
        if not field.startswith(_MAY_CHANGE + unused) and field != "epochs"
    }


def settings_differences(
    saved: Mapping[str, Any], settings: Settings, *, saved_step: int | None
) -> list[str]:
    """Describe each difference between the settings of a checkpoint and the current settings.

    The number of steps may change if no completed step depends on it, as with a constant learning
    rate.

    Args:
      saved: the settings of the checkpoint, as `as_dict` returns them.
      settings: the current settings.
      saved_step: the step of the newest checkpoint; if it is unknown (`None`), a different number
        of steps is a difference.

    Returns:
      One description per field that differs.

    Raises:
      ValueError: if the saved settings cannot be read.
    """
    # Parts are not looked up, since a file must not decide which code is imported.
    before = read_section(Settings, migrated(saved))._replace(parts=settings.parts)
    different = differences(fields_of(before), fields_of(settings))
    if settings.epochs is not None:  # the number of steps is compared when the rows are known
        return [text for text in different if not text.startswith("steps ")]
    if before.steps == settings.steps or saved_step is None:
        return different
    others = [text for text in different if not text.startswith("steps ")]
    reasons = _reasons_to_keep_steps(before, settings, saved_step)
    if reasons:
        changed = f"steps is {settings.steps} here and {before.steps} there"
        return [f"{changed} ({', '.join(reasons)})", *others]
    return others


def migrated(config: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the config of an earlier version to the names of this version."""
    config = dict(config)
    if config.get("steps", 0) is None:  # of a run of epochs that ended before its rows were known
        del config["steps"]
    model = dict(config.get("model", {}))
    options = dict(model.get("options", {}))
    if "token_dropout" in options and "augmentation" not in config:
        rate = options.pop("token_dropout")
        config["augmentation"] = {"name": "token_dropout", "options": {"rate": rate}}
        config["model"] = model | {"options": options}
    return config


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe each field whose values differ; a missing field counts as `None`."""
    return [
        f"{field} is {now.get(field, 'nothing')} here and {before.get(field, 'nothing')} there"
        for field in sorted(before.keys() | now.keys())
        if before.get(field) != now.get(field)
    ]


def run_record(settings: Settings, remembered: RememberedData) -> dict[str, Any]:
    """The record of a run for its checkpoints, in JSON types.

    Args:
      settings: the settings of the run.
      remembered: the data that the run reads.
    """
    return {
        "settings": as_dict(settings),
        "pretrained": pretrained_fingerprints(settings),
        "data": remembered._asdict(),
        "flags": jax_flags(),
        "versions": _versions(),
    }


def process_report(settings: Settings) -> dict[str, Any]:
    """The values, by name, that must be equal in all processes of a run when they start."""
    host_fields = {f"run.{name}": value for name, value in settings.run._asdict().items()}
    del host_fields["run.data_dir"]  # hosts may mount it at different paths
    evaluation = settings.evaluation
    host_fields |= {
        f"evaluation.{name}": getattr(evaluation, name)
        for name in ("best_metric", "patience", "min_delta")
    }
    host_fields["the names in evaluation.sets"] = list(evaluation.sets)
    models = {
        f"the files of {section}.pretrained": fingerprint
        for section, fingerprint in pretrained_fingerprints(settings).items()
    }
    epochs = {"epochs": settings.epochs}
    return fields_of(settings) | epochs | models | host_fields | jax_flags() | _versions()


def pretrained_fingerprints(settings: Settings) -> dict[str, str]:
    """Compute digests of the files of pretrained models, without weights, by config section."""
    return {
        section: _digest(model.files, model.tensors)
        for section, model in settings.parts.pretrained.items()
    }


def _digest(files: Mapping[str, bytes], tensors: Mapping[str, Mapping[str, Any]]) -> str:
    content = {
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        "tensors": {
            f"{file}/{name}": [str(dtype), *shape]
            for file, named in tensors.items()
            for name, (dtype, shape) in named.items()
        },
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def jax_flags() -> dict[str, Any]:
    """The JAX flags that affect the results of a run."""
    return {name: getattr(jax.config, name) for name in _FLAGS}


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _reasons_to_keep_steps(before: Settings, now: Settings, saved_step: int) -> list[str]:
    """The reasons why completed steps would have been different with the new number of steps."""
    if saved_step > now.steps:
        return [f"{saved_step:,} steps are already completed"]
    completed = np.unique(np.linspace(0, max(saved_step - 1, 0), num=1_000).astype(np.int32))
    values: Mapping[str, Callable[[Settings], np.ndarray]] = {
        "optimizer.schedule": lambda one: _learning_rates(one, completed),
        "negatives.momentum_encoder": lambda one: _ramp(one.negatives.momentum_encoder, one.steps),
        "assignment.gcbs.random_final": _random_share,
    }
    return [
        f"{name} depends on it"
        for name, value in values.items()
        if not np.array_equal(value(before), value(now))
    ]


def _learning_rates(settings: Settings, steps: Int[np.ndarray, " _"]) -> np.ndarray:
    rate = learning_rate_of(settings.optimizer, settings.parts, steps=settings.steps)
    return np.asarray(jax.vmap(rate)(steps))


def _ramp(ends: tuple[float | None, float], steps: int) -> np.ndarray:
    """The initial value and the steps of a value that changes over the run; 0 if it is constant."""
    initial, final = ends
    if initial is None or initial == final:
        return np.zeros(2)
    return np.array([initial, steps])


def _random_share(settings: Settings) -> np.ndarray:
    if gcbs_rule(settings) is None:
        return np.zeros(2)
    gcbs = settings.assignment.gcbs
    return _ramp((gcbs.random_initial, gcbs.random_final), settings.steps)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
