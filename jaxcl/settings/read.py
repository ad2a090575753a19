"""From a config to checked settings: the only place that reads a ConfigDict."""

from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from jaxcl.settings.checks import check_settings
from jaxcl.settings.effects import check_effects
from jaxcl.settings.parts import (
    ENCODERS,
    LOSSES,
    OPTIMIZERS,
    SCHEDULES,
    Part,
    Trust,
    find_part,
    given_options,
    is_function_name,
)
from jaxcl.settings.ranges import read_section
from jaxcl.settings.sections import Parts, Settings

__all__ = ["as_dict", "read_settings"]


def read_settings(
    config: ConfigDict | Mapping[str, Any],
    *,
    changed: Collection[str] = (),
    trust: Trust = None,
) -> Settings:
    """Read a config, and check all of it.

    Args:
      config: as the files of `configs/` return it, or a mapping of the same form. Fields that are
        left out have their defaults.
      changed: dotted names of the fields that the user changed, on the command line for example.
        One that has no effect is an error; a default that has none is not.
      trust: the packages from which parts named `package.module:function` are imported; `None`
        for all, as where the config was given on the command line. A loss or an optimizer that may
        not be imported is `unresolved` in the result.

    Returns:
      The settings, with the functions that the config names.

    Raises:
      ValueError: for an unknown field or name, a value of another type or out of its range, and
        settings that do not go together. The message names the field.
      PermissionError: for an encoder that may not be imported.

    Example:
      >>> read_settings({"steps": 20}).steps
      20
    """
    given = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    if "parts" in given:
        raise ValueError("parts is no field of a config; the names in it say which parts are used")
    settings = _with_parts(read_section(Settings, given), trust)
    check_settings(settings)
    check_effects(settings, changed)
    return settings


def _with_parts(settings: Settings, trust: Trust) -> Settings:
    """The settings with the functions that they name, and the options that are set."""
    model, loss, optimizer = settings.model, settings.loss, settings.optimizer
    encoder = find_part("model.name", model.name, ENCODERS, trust=trust)
    model = model._replace(options=given_options("model", model.name, encoder, model.options))
    found: dict[str, Part] = {}
    named = {
        "loss": ("loss.name", loss.name, LOSSES),
        "optimizer": ("optimizer.name", optimizer.name, OPTIMIZERS),
        "schedule": ("optimizer.schedule", optimizer.schedule, SCHEDULES),
    }
    own: Mapping[str, Part] = {}
    if ":" in settings.assignment.name:
        named["assignment"] = ("assignment.name", settings.assignment.name, own)
    if is_function_name(settings.data.name):
        named["source"] = ("data.name", str(settings.data.name), own)
    for part, (setting, name, registry) in named.items():
        try:
            found[part] = find_part(setting, name, registry, trust=trust)
        except PermissionError:  # an encoder alone can be opened without it
            continue
    if "loss" in found:
        options = given_options("loss", loss.name, found["loss"], loss.options)
        loss = loss._replace(options=options)
    if "optimizer" in found:
        options = given_options("optimizer", optimizer.name, found["optimizer"], optimizer.options)
        optimizer = optimizer._replace(options=options)
    parts = Parts(encoder.function, **{name: part.function for name, part in found.items()})
    return settings._replace(model=model, loss=loss, optimizer=optimizer, parts=parts)


def as_dict(settings: Settings) -> dict[str, Any]:
    """The settings as nested dicts of JSON's types, which `read_settings` reads back.

    Options that are not set are left out.
    """
    return _plain(settings)


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
