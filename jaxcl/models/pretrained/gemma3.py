"""Gemma 3 for texts, and EmbeddingGemma: local attention in most layers, four norms per block."""

import math
from collections.abc import Mapping
from typing import Any

from jaxcl.models.pretrained.config_values import (
    FULL,
    SLIDING,
    activation,
    check_supported,
    flag,
    positive,
    size,
    sliding_layers,
)
from jaxcl.models.pretrained.decoder_blocks import DecoderArchitecture
from jaxcl.models.pretrained.decoders import decoder_architecture, decoder_family
from jaxcl.models.pretrained.rotary import Rotary, read_rotary

__all__ = ["GEMMA3", "gemma3_architecture"]

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "intermediate_size": 9216,
    "max_position_embeddings": 131072,
}
_ROTARY_KEYS = ("rope_parameters", "rope_scaling", "rope_theta")
_BASES = {FULL: 1_000_000.0, SLIDING: 10_000.0}
_OLD_BASES = {FULL: "rope_theta", SLIDING: "rope_local_base_freq"}
"""The keys of the rotary bases in configs older than `rope_parameters`."""


def gemma3_architecture(config: Mapping[str, Any]) -> DecoderArchitecture:
    """The architecture that the `config.json` of a Gemma 3 model describes.

    A causal window has `sliding_window` tokens, including the token itself. A bidirectional window
    reaches half of `sliding_window` to either side. Some versions of transformers save a
    bidirectional model with an already halved window; such a window is halved again.

    Reference:
      Kamath et al., "Gemma 3 Technical Report", 2025; Schechter Vera et al., "EmbeddingGemma:
      Powerful and Lightweight Text Representations", 2025.
    """
    check_supported(config, attn_logit_softcapping=None, is_causal=True)
    # Rotary positions depend on the kind of layer, and are read below.
    plain = {key: value for key, value in config.items() if key not in _ROTARY_KEYS}
    plain["hidden_act"] = activation(config, "hidden_activation", "gelu_pytorch_tanh")
    a = decoder_architecture({**_DEFAULTS, **plain})
    period = size(config, "sliding_window_pattern", 6)
    slides = sliding_layers(config, [(n + 1) % period != 0 for n in range(a.num_layers)])
    bidirectional = config.get("use_bidirectional_attention")  # null means false
    causal = bidirectional is None or not flag(config, "use_bidirectional_attention", False)
    bias = flag(config, "attention_bias", False)
    window = size(config, "sliding_window", 4096) if any(slides) else None
    if window is not None:
        window = window - 1 if causal else window // 2
    return a._replace(
        rotary=tuple(_rotary(config, SLIDING if one else FULL) for one in slides),
        windows=tuple(window if one else None for one in slides),
        causal=causal,
        projection_bias=bias,
        output_bias=bias,
        head_norms=True,
        output_norms=True,
        norm_offset=1.0,
        score_scale=positive(config, "query_pre_attn_scalar", 256.0) ** -0.5,
        embedding_scale=math.sqrt(a.hidden_dim),
    )


def _rotary(config: Mapping[str, Any], kind: str) -> Rotary:
    parameters = config.get("rope_parameters") or {}
    if (
        not isinstance(parameters, dict)
        or parameters.keys() - {FULL, SLIDING}
        or not all(isinstance(of_kind, dict | None) for of_kind in parameters.values())
    ):
        raise ValueError(
            f"config.json: rope_parameters={parameters!r:.99}; it must map {FULL!r} and "
            f"{SLIDING!r} to their parameters"
        )
    of_kind = parameters.get(kind) or {}
    if kind == FULL:
        scaling = config.get("rope_scaling") or {}
        if not isinstance(scaling, dict):
            raise ValueError(f"config.json: rope_scaling={scaling!r:.99}; give an object")
        of_kind = {**of_kind, **scaling}
    return read_rotary(of_kind, base=positive(config, _OLD_BASES[kind], _BASES[kind]))


GEMMA3 = decoder_family(gemma3_architecture)
