"""From a config to checked settings: the only place that reads a ConfigDict."""

import contextlib
import math
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from jaxcl.host.paths import AnyPath
from jaxcl.losses import LOSSES, Loss
from jaxcl.models import ENCODERS, EncoderPart
from jaxcl.models.augmentations import AUGMENTATIONS, Augmentation
from jaxcl.models.pretrained.description import PretrainedModel
from jaxcl.settings.checks import check_settings
from jaxcl.settings.effects import check_effects
from jaxcl.settings.optimizers import OPTIMIZERS
from jaxcl.settings.parts import (
    SCHEDULES,
    Part,
    Trust,
    find_part,
    given_options,
    is_function_name,
)
from jaxcl.settings.pretrained import PRETRAINED, encoder_part, with_pretrained
from jaxcl.settings.section_reader import read_section
from jaxcl.settings.sections import ModelSettings, Settings

__all__ = ["as_dict", "read_data_settings", "read_settings", "with_steps"]

_SELECTION = ("sets", "best_metric", "patience", "min_delta")
"""The fields of `evaluation` that only training reads."""
_DATA_SECTIONS = ("data", "evaluation", "run")
_DATA_FIELDS = (
    *("name", "code_pairs", "splits", "query_field", "key_field", "concatenated"),
    *("group_field", "score_field", "metadata_fields", "files", "modality", "images"),
)
"""The fields of `data` that select the rows, and not how a model reads them."""


def read_settings(
    config: ConfigDict | Mapping[str, Any],
    *,
    changed: Collection[str] = (),
    trust: Trust = None,
    workdir: AnyPath | None = None,
) -> Settings:
    """Convert a config to checked settings.

    For pretrained models, only the small files and the headers of the weights are read.

    Args:
      config: a config as the files of `configs/` return it, or a mapping of the same form. Fields
        that are left out have their defaults.
      changed: dotted names of the fields that the user changed, on the command line for example.
        A changed field without effect is an error; a default without effect is not.
      trust: the packages from which parts named `package.module:function` are imported; `None`
        for all, as for a config given on the command line. A loss or an optimizer that may
        not be imported is `unresolved` in the result. Unless it is `None`, no pretrained model
        outside `workdir` is read.
      workdir: the workdir of a run that has begun; its copies of pretrained models are read
        instead of the folders that the config names.

    Returns:
      The settings, with the functions that the config names.

    Raises:
      ValueError: for an unknown field or name, a value of another type or out of its range, and
        settings that contradict each other. The message names the field.
      OSError: if the folder of a pretrained model does not exist.
      PermissionError: for an encoder that may not be imported.

    Example:
      >>> read_settings({"steps": 20}).steps
      20
    """
    fields = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    if "parts" in fields:
        raise ValueError(
            "parts is not a field of a config; the names in it say which parts are used"
        )
    settings = read_section(Settings, _with_either(fields))
    settings = with_pretrained(settings, changed=changed, trust=trust, workdir=workdir)
    settings = _with_parts(settings, trust)
    check_settings(settings)
    check_effects(settings, changed)
    return settings


def _with_either(fields: dict[str, Any]) -> dict[str, Any]:
    """Check that a config sets either `steps` or `epochs`, and leave out a `steps` of `None`."""
    if fields.get("epochs") is not None and fields.get("steps") is not None:
        raise ValueError(
            f"steps={fields['steps']} and epochs={fields['epochs']} are both given; set one to None"
        )
    if "steps" in fields and fields["steps"] is None:
        if fields.get("epochs") is None:
            raise ValueError("steps and epochs are both None; set one of them")
        return {name: value for name, value in fields.items() if name != "steps"}
    return fields


def with_steps(settings: Settings, *, num_rows: int) -> Settings:
    """Replace the epochs in the settings by a number of steps.

    Epochs follow each other without a gap, so that the last batch may hold rows of the next
    epoch. The steps are rounded up to whole updates of the optimizer, so that every row of
    the last epoch is trained on; `jaxcl.run.epochs.epoch_summary` reports this.

    Args:
      settings: the settings, as `read_settings` returns them.
      num_rows: the number of training rows.

    Raises:
      ValueError: for settings that conflict with this number of steps.

    Example:
      >>> settings = read_settings({"epochs": 1.5, "global_batch_size": 8})
      >>> with_steps(settings, num_rows=20).steps
      4
    """
    if settings.epochs is None:
        return settings
    every = settings.optimizer.accumulate_steps
    rows_per_update = settings.global_batch_size * every
    steps = every * math.ceil(settings.epochs * num_rows / rows_per_update)
    settings = settings._replace(steps=steps, epochs=None)
    check_settings(settings)
    return settings


def read_data_settings(config: ConfigDict, *, changed: Collection[str] = ()) -> Settings:
    """Read only the fields of a config that select rows, evaluation and folders.

    All other settings keep their defaults, so the result can be used with any model, and a config
    with a pretrained encoder does not need the encoder's folder.

    Args:
      config, changed: as for `read_settings`.

    Raises:
      ValueError: as in `read_settings`, and for any other field that the user changed.
    """
    unused = [field for field in changed if not _says_which_rows(field)]
    if unused:
        raise ValueError(
            f"{', '.join(unused)} has no effect here: only the rows of data, the ranking of "
            "evaluation, and run are read from the config"
        )
    fields = {"data": {}} | config.to_dict()
    read_section(Settings, fields)  # an unknown field is an error in every section
    fields["data"] = {name: one for name, one in fields["data"].items() if name in _DATA_FIELDS}
    return read_settings({name: one for name, one in fields.items() if name in _DATA_SECTIONS})


def _says_which_rows(field: str) -> bool:
    section, *names = field.split(".")
    if section == "evaluation" and names[:1] in [[name] for name in _SELECTION]:
        return False
    if section != "data":
        return section in _DATA_SECTIONS
    # The prompts of a data set say how the model of a run reads it.
    return names[:1] in [[name] for name in _DATA_FIELDS] and names[2:3] != ["prompts"]


def _with_parts(settings: Settings, trust: Trust) -> Settings:
    """The settings with the functions that they name, and the options that are set."""
    sections: dict[str, Any] = {}
    parts: dict[str, Any] = {}
    pretrained = settings.parts.pretrained
    sections["model"], parts["encoders"] = _with_encoders(settings.model, pretrained, trust)
    # Opening only an encoder does not need the other parts.
    with contextlib.suppress(PermissionError):
        sections["loss"], parts["loss"] = _resolved("loss", settings.loss, LOSSES, Loss, trust)
    with contextlib.suppress(PermissionError):
        sections["optimizer"], optimizer = _resolved(
            "optimizer", settings.optimizer, OPTIMIZERS, Part, trust
        )
        parts["optimizer"] = optimizer.function
    if settings.augmentation.name is None:
        sections["augmentation"] = settings.augmentation._replace(options={})
    else:
        with contextlib.suppress(PermissionError):
            sections["augmentation"], augmentation = _resolved(
                "augmentation", settings.augmentation, AUGMENTATIONS, Augmentation, trust
            )
            parts["augmentation"] = augmentation.function
    others: dict[str, tuple[str, str, Mapping[str, Part]]] = {
        "schedule": ("optimizer.schedule", settings.optimizer.schedule, SCHEDULES)
    }
    if ":" in settings.assignment.name:
        others["assignment"] = ("assignment.name", settings.assignment.name, {})
    if is_function_name(settings.data.name):
        others["source"] = ("data.name", str(settings.data.name), {})
    for name, (setting, value, registry) in others.items():
        with contextlib.suppress(PermissionError):
            parts[name] = find_part(setting, value, registry, kind=Part, trust=trust).function
    return settings._replace(**sections, parts=settings.parts._replace(**parts))


def _with_encoders(
    model: ModelSettings, pretrained: Mapping[str, PretrainedModel], trust: Trust
) -> tuple[ModelSettings, dict[str, EncoderPart]]:
    """The model with the options that are set, and the encoders by the section that names them."""
    own = {section: {PRETRAINED: encoder_part(one)} for section, one in pretrained.items()}
    registry = {**ENCODERS, **own.get("model", {})}
    model, part = _resolved("model", model, registry, EncoderPart, trust)
    encoders = {"model": part}
    if model.key.name is None:
        model = model._replace(key=_without_unset(model.key))
    else:
        registry = {**ENCODERS, **own.get("model.key", {})}
        key, part = _resolved("model.key", model.key, registry, EncoderPart, trust)
        encoders["model.key"] = part
        model = model._replace(key=key)
    return model, encoders


def _without_unset(section: Any) -> Any:
    """Remove the unset options from a section that does not name a part."""
    options = {name: value for name, value in section.options.items() if value is not None}
    return section._replace(options=options)


def _resolved(
    path: str, section: Any, registry: Mapping[str, Any], kind: Any, trust: Trust
) -> tuple[Any, Any]:
    """A section with the options that are set, and the part that it names."""
    part = find_part(f"{path}.name", section.name, registry, kind=kind, trust=trust)
    options = given_options(path, section.name, part, section.options)
    return section._replace(options=options), part


def as_dict(settings: Settings) -> dict[str, Any]:
    """The settings as nested dicts of JSON types, which `read_settings` reads back.

    Options that are not set are left out. While `epochs` is set, `steps` is `None`.
    """
    fields = _plain(settings)
    return fields if settings.epochs is None else fields | {"steps": None}


def _plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        fields = value._asdict()
        fields.pop("parts", None)
        options = fields.get("options", {})
        if options:
            fields["options"] = {name: one for name, one in options.items() if one is not None}
        return {name: _plain(one) for name, one in fields.items()}
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(one) for one in value]
    return value
