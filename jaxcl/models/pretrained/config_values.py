"""Checked access to the values of a `config.json`."""

import math
from collections.abc import Mapping
from typing import Any

from jaxcl.models.pretrained.activations import ACTIVATIONS

__all__ = ["activation", "check_supported", "flag", "number", "size"]


def size(config: Mapping[str, Any], key: str, default: int | None = None, *, least: int = 1) -> int:
    """Read a whole number.

    Args:
      config: the content of a `config.json`.
      key: its key.
      default: the value of a missing key; `None` if the key is required.
      least: the smallest value allowed.

    Raises:
      ValueError: for any other value, or if a required key is missing.
    """
    value = config.get(key, default)
    if type(value) is not int or value < least:
        raise ValueError(
            f"config.json: {key}={value!r}; it must be a whole number of at least {least}"
        )
    return value


def number(config: Mapping[str, Any], key: str, default: float) -> float:
    """Read a finite number of at least 0; raise a `ValueError` for any other value."""
    value = config.get(key, default)
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise ValueError(f"config.json: {key}={value!r}; it must be a number of at least 0")
    return float(value)


def flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """Read true or false; raise a `ValueError` for any other value."""
    value = config.get(key, default)
    if type(value) is not bool:
        raise ValueError(f"config.json: {key}={value!r}; it must be true or false")
    return value


def activation(config: Mapping[str, Any], key: str) -> str:
    """Read the name of a known activation, by default `"gelu"`; raise a `ValueError` for others."""
    value = config.get(key, "gelu")
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise ValueError(
            f"config.json: {key}={value!r} is not supported; only {', '.join(ACTIVATIONS)} are"
        )
    return value


def check_supported(config: Mapping[str, Any], **supported: Any) -> None:
    """Raise a `ValueError` for a value that is set and differs from the supported one."""
    for key, value in supported.items():
        given = config.get(key)
        if given is not None and given != value:
            only = "" if value is None else f"; only {value!r} is"
            raise ValueError(f"config.json: {key}={given!r} is not supported{only}")
