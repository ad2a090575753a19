"""Describe how results were obtained: the model, the devices and the package versions."""

import math
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax

from jaxcl.run.embedding_model import EmbeddingModel
from jaxcl.typing import SIDES

__all__ = ["describe_environment", "describe_model", "json_values"]


def describe_model(model: EmbeddingModel) -> dict[str, Any]:
    """The source of a model, and the settings on which its embeddings depend, in JSON types."""
    return {
        "model": model.source,
        "dim": model.dim,
        "max_tokens": model.max_tokens,
        "prompts": {side: model.prompts[side] for side in SIDES if side in model.prompts},
    }


def describe_environment() -> dict[str, Any]:
    """The devices and the versions of packages, in JSON types."""
    devices = jax.devices()
    return {
        "devices": f"{len(devices)} × {devices[0].device_kind}",
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("jaxcl", "jax", "flax", "optax")},
        },
    }


def json_values(value: Any) -> Any:
    """Replace NaN and infinity, such as the standard error over a single query, with `None`."""
    if isinstance(value, Mapping):
        return {name: json_values(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _version(package: str) -> str:
    """The installed version of a package; jaxcl itself may be just a checkout on the path."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
