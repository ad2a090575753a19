"""Split the files of a model with an image tower and a text tower, such as CLIP, by tower."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxcl.models.pretrained.families import TWO_TOWERS
from jaxcl.models.pretrained.tensor_files import Specs

__all__ = ["LOGITS", "logit_values", "tower_config", "tower_tensors"]

LOGITS = ("logit_scale", "logit_bias")
"""The tensors of the loss: the logarithm of the inverse temperature, and the bias."""

_CONFIGS = {"text": "text_config", "image": "vision_config"}
_OWN = {
    "text": ("text_model.", "text_projection."),
    "image": ("vision_model.", "visual_projection."),
}
_OTHER = {"text": _OWN["image"], "image": _OWN["text"]}


def tower_config(config: Mapping[str, Any], modality: str) -> dict[str, Any]:
    """The part of a `config.json` that describes one tower.

    Args:
      config: the content of the file, whose `model_type` is one of `TWO_TOWERS`.
      modality: `"text"` or `"image"`.

    Raises:
      ValueError: if the part is not a JSON object.
    """
    name = _CONFIGS[modality]
    own: dict[str, Any] = {}
    # Older files repeat some values under a second name, which takes precedence.
    for key in (name, f"{name}_dict"):
        part = config.get(key)
        if part is not None and not isinstance(part, dict):
            raise ValueError(f"config.json has {key}={part!r:.99}; restore it")
        own |= part or {}
    own["model_type"] = TWO_TOWERS[config["model_type"]][modality]
    if config["model_type"] == "clip":
        own["projection_dim"] = config.get("projection_dim", 512)
    return own


def tower_tensors(tensors: Mapping[str, Specs], modality: str) -> dict[str, Specs]:
    """The tensors of one tower and of the loss, by file."""
    by_file = {
        file: {name: spec for name, spec in specs.items() if not name.startswith(_OTHER[modality])}
        for file, specs in tensors.items()
    }
    return {file: specs for file, specs in by_file.items() if specs}


def logit_values(tensors: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The scalars of the loss in a file, by name.

    Raises:
      ValueError: if one of these tensors is not a finite scalar.
    """
    values = {}
    for name in LOGITS:
        if name in tensors:
            value = np.asarray(tensors[name], np.float64)
            if value.size != 1 or not np.isfinite(value).all():
                raise ValueError(f"{name} is not a finite number; download the folder again")
            values[name] = float(value.reshape(()))
    return values
