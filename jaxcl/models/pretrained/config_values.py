"""Values of a `config.json`, checked."""

import math
from collections.abc import Mapping
from typing import Any

from jaxcl.models.pretrained.activations import ACTIVATIONS

__all__ = ["activation", "check_supported", "flag", "number", "size"]


def size(config: Mapping[str, Any], key: str, default: int | None = None, *, least: int = 1) -> int:
    """A whole number.

    Args:
      config: the content of a `config.json`.
      key: its key.
      default: the value of a missing key; `None` if the key is required.
      least: the smallest value allowed.

    Raises:
      ValueError: for another value, or for none.
    """
    value = config.get(key, default)
    if type(value) is not int or value < least:
        raise ValueError(
            f"config.json: {key}={value!r}; it must be a whole number of at least {least}"
        )
    return value


def number(config: Mapping[str, Any], key: str, default: float) -> float:
    """A finite number of at least 0; a `ValueError` for another value."""
    value = config.get(key, default)
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise ValueError(f"config.json: {key}={value!r}; it must be a number of at least 0")
    return float(value)


def flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """True or false; a `ValueError` for another value."""
    value = config.get(key, default)
    if type(value) is not bool:
        raise ValueError(f"config.json: {key}={value!r}; it must be true or false")
    return value


def activation(config: Mapping[str, Any], key: str) -> str:
    """The name of a known activation, by default the exact `"gelu"`; a `ValueError` for another."""
    value = config.get(key, "gelu")
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise ValueError(
            f"config.json: {key}={value!r} is not supported; only {', '.join(ACTIVATIONS)} are"
        )
    return value


def check_supported(config: Mapping[str, Any], **supported: Any) -> None:
    """Raise a `ValueError` for a key whose value is neither missing, null nor the supported one."""
    for key, value in supported.items():
        given = config.get(key)
        if given is not None and given != value:
            only = "" if value is None else f"; only {value!r} is"
            raise ValueError(f"config.json: {key}={given!r} is not supported{only}")
