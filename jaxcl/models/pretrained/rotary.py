"""Rotary positions: the frequencies that a model's `config.json` asks for."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxcl.models.pretrained.config_values import check_supported, positive
from jaxcl.typing import Float

__all__ = ["Rotary", "frequencies", "read_rotary"]

_TYPES = ("default", "linear", "llama3")


class Rotary(NamedTuple):
    """The rotary positions of a layer.

    Attributes:
      base: the base of the frequencies, `rope_theta`.
      factor: a divisor of the frequencies, for texts longer than in pretraining.
      turns: `None` to divide all frequencies. For Llama 3, `(least, most)`: a feature pair that
        makes fewer than `least` turns over `tokens` has its frequency divided by `factor`, a pair
        with more than `most` turns keeps its frequency, and pairs in between are interpolated.
      tokens: the maximum length of a text in pretraining, in tokens; only with `turns`.
    """

    base: float
    factor: float = 1.0
    turns: tuple[float, float] | None = None
    tokens: float = 0.0


def frequencies(rotary: Rotary, width: int) -> Float[np.ndarray, " half"]:
    r"""The angle per token of each pair of a head's features, $\text{base}^{-2i/c}$ if unscaled.

    Args:
      rotary: the rotary positions.
      width: the number $c$ of features of a head, an even number.

    Returns:
      $c/2$ angles in float64.

    Reference:
      Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021; Grattafiori
      et al., "The Llama 3 Herd of Models", 2024.
    """
    half = width // 2
    angles = rotary.base ** (-np.arange(half) / half)
    if rotary.turns is None:
        return angles / rotary.factor
    least, most = rotary.turns
    share = np.clip((rotary.tokens * angles / (2 * math.pi) - least) / (most - least), 0, 1)
    return angles * ((1 - share) / rotary.factor + share)


def read_rotary(parameters: Mapping[str, Any], *, base: float) -> Rotary:
    """Read rotary positions from `rope_parameters`, or from `rope_scaling` of an older config.

    Args:
      parameters: the content of the field, or its part for one kind of layer.
      base: the value of a missing `rope_theta`.

    Raises:
      ValueError: for an unsupported type, or a value out of range.
    """
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in _TYPES:
        raise ValueError(
            f"config.json: rope_type={kind!r:.99} is not supported; only "
            f"{', '.join(map(repr, _TYPES))} are"
        )
    check_supported(parameters, partial_rotary_factor=1.0)
    base = positive(parameters, "rope_theta", base)
    if kind == "default":
        return Rotary(base)
    factor = positive(parameters, "factor")
    if kind == "linear":
        return Rotary(base, factor)
    least, most = (positive(parameters, f"{end}_freq_factor") for end in ("low", "high"))
    if least >= most:
        raise ValueError(
            f"config.json: low_freq_factor={least} must be less than high_freq_factor={most}"
        )
    return Rotary(
        base, factor, (least, most), positive(parameters, "original_max_position_embeddings")
    )
