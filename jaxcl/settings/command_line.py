"""A config from the command line: `--config FILE[:VARIANT] --config.FIELD=VALUE …`."""

import ast
from argparse import Namespace
from typing import Any

from ml_collections import ConfigDict

from jaxcl.host.command_flags import CommandParser
from jaxcl.settings.config_files import load_config
from jaxcl.settings.section_reader import did_you_mean

__all__ = [
    "add_config_flags",
    "changed_fields",
    "config_of",
    "optional_config_of",
    "override",
    "parse_value",
]

_NAMED_BY_USERS = ("evaluation.sets",)
"""Sections whose fields are texts under names that the user chooses."""

_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def add_config_flags(parser: CommandParser, *, required: bool = True) -> None:
    """Add `--config`, and `--config.FIELD` for each field of the config."""
    parser.add_argument(
        "--config",
        required=required,
        metavar="FILE[:VARIANT]",
        help="a Python file with a function get_config, or the name of one of jaxcl's configs",
    )
    parser.add_fields(
        "config", help="set a field of the config, as in --config.steps=500; may be repeated"
    )


def config_of(arguments: Namespace) -> ConfigDict:
    """Load the config that the flags of `add_config_flags` select and override.

    Raises:
      ValueError: if there is no such config or field, or a value has the wrong type.
    """
    config = load_config(arguments.config)
    for field, text in arguments.config_fields:
        override(config, field, text)
    return config


def optional_config_of(arguments: Namespace) -> ConfigDict | None:
    """The config as `config_of` returns it, or `None` without `--config`.

    Raises:
      ValueError: as in `config_of`, or for a `--config.FIELD` flag without `--config`.
    """
    if arguments.config is not None:
        return config_of(arguments)
    if fields := changed_fields(arguments):
        raise ValueError(
            f"--config.{fields[0]} changes a field of --config, but there is no --config; add it"
        )
    return None


def changed_fields(arguments: Namespace) -> tuple[str, ...]:
    """The dotted names of the fields that the command line changes."""
    return tuple(field for field, _ in arguments.config_fields)


def override(config: ConfigDict, field: str, text: str, *, flag: str = "--config.") -> None:
    """Set a field of a config from text, in place.

    Args:
      config: the config.
      field: the dotted name of the setting.
      text: the value, which `parse_value` reads as the field's type.
      flag: what precedes the field on the command line, for error messages.

    Raises:
      ValueError: if there is no such field, or the text is not a value of the field's type.

    Example:
      >>> config = ConfigDict({"model": {"dim": 512}})
      >>> override(config, "model.dim", "256")
      >>> config.model.dim
      256
    """
    section: Any = config
    given = f"{flag}{field}={text}"
    *parents, leaf = field.split(".")
    for depth, name in enumerate([*parents, leaf]):
        if not isinstance(section, ConfigDict):
            section_name = ".".join(parents[:depth])
            raise ValueError(f"{given}: {section_name} is a value without fields")
        if name not in section:
            if depth == len(parents) and ".".join(parents) in _NAMED_BY_USERS:
                section[name] = text
                return
            section_name = ".".join(parents[:depth]) or "a config"
            raise ValueError(
                f"{given}: there is no such field as {name}"
                f"{did_you_mean(name, list(section))}; {section_name} has {', '.join(section)}"
            )
        if depth < len(parents):
            section = section[name]
    if isinstance(section[leaf], ConfigDict):
        fields = ", ".join(section[leaf]) or "no fields"
        raise ValueError(f"{given}: {field} is a section; set one of {fields}")
    try:
        section[leaf] = parse_value(text, section.get_type(leaf))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{given}: {error}") from error


def parse_value(text: str, kind: type) -> Any:
    """Convert text to a value of a type; `None` is a value of every type.

    Args:
      text: `true` or `false` for a bool; any text for a str; otherwise a Python literal. A tuple of
        names may be written as `dense,bm25`.
      kind: the type; `NoneType` and `object` stand for any type.

    Raises:
      ValueError: if the text is not a value of the type.

    Example:
      >>> parse_value("1e-3", float), parse_value("('row', 'text')", tuple)
      (0.001, ('row', 'text'))
    """
    if text == "None":
        return None
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in _BOOLEANS:
            raise ValueError("give true or false")
        return _BOOLEANS[text.lower()]
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError as error:
            raise ValueError({int: "give an integer", float: "give a number"}[kind]) from error
    value = _literal(text)
    if kind in (tuple, list):
        return kind(value if isinstance(value, (tuple, list)) else [value])
    if kind not in (object, type(None)) and not isinstance(value, kind):
        raise ValueError(f"give a {kind.__name__}")
    return value


def _literal(text: str) -> Any:
    """A Python literal; otherwise names between commas, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError) as error:
        if not text or any(mark in text for mark in "()[]{}'\""):
            raise ValueError("give a Python literal, such as ('dense', 'bm25')") from error
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    return names if "," in text else text
