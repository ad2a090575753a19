"""Checked access to the values of a `config.json`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxcl.models.pretrained.activations import ACTIVATIONS

__all__ = [
    "FULL",
    "SLIDING",
    "activation",
    "check_supported",
    "flag",
    "number",
    "positive",
    "size",
    "sliding_layers",
]

FULL, SLIDING = "full_attention", "sliding_attention"
"""The kinds of layers, as in `layer_types`."""


def size(config: Mapping[str, Any], key: str, default: int | None = None, *, least: int = 1) -> int:
    """Read a whole number.

    Args:
      config: the content of a `config.json`.
      key: the key of the number to read.
      default: the value of a missing key; `None` if the key is required.
      least: the smallest value allowed.

    Raises:
      ValueError: for a value that is not such a number, or if a required key is missing.
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


def positive(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """Read a finite number above 0; raise a `ValueError` for any other value.

    Args:
      config: the content of a `config.json`, or a part of it.
      key: the key of the number to read.
      default: the value of a missing key; `None` if the key is required.
    """
    value = config.get(key, default)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"config.json: {key}={value!r}; it must be a number above 0")
    return float(value)


def flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """Read true or false; raise a `ValueError` for any other value."""
    value = config.get(key, default)
    if type(value) is not bool:
        raise ValueError(f"config.json: {key}={value!r}; it must be true or false")
    return value


def activation(config: Mapping[str, Any], key: str, default: str = "gelu") -> str:
    """Read the name of a known activation; raise a `ValueError` for others."""
    value = config.get(key, default)
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise ValueError(
            f"config.json: {key}={value!r} is not supported; only {', '.join(ACTIVATIONS)} are"
        )
    return value


def check_supported(config: Mapping[str, Any], **supported: Any) -> None:
    """Raise a `ValueError` for a value that is set and differs from the supported one."""
    for key, value in supported.items():
        entry = config.get(key)
        if entry is not None and entry != value:
            only = "" if value is None else f"; only {value!r} is"
            raise ValueError(f"config.json: {key}={entry!r} is not supported{only}")


def sliding_layers(config: Mapping[str, Any], default: Sequence[bool]) -> Sequence[bool]:
    """Read from `layer_types` whether the attention of each layer has a sliding window.

    Args:
      config: the content of a `config.json`.
      default: the value if the key is missing or null.

    Raises:
      ValueError: if the list has another number of layers, or an unknown kind of layer.
    """
    kinds = config.get("layer_types")
    if kinds is None:
        return default
    if (
        not isinstance(kinds, list)
        or len(kinds) != len(default)
        or any(kind not in (FULL, SLIDING) for kind in kinds)
    ):
        raise ValueError(
            f"config.json: layer_types={kinds!r}; it must list {FULL!r} or {SLIDING!r} for each of "
            f"{len(default)} layers"
        )
    return [kind == SLIDING for kind in kinds]
