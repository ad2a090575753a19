"""ModernBERT: pre-norm, rotary positions, a gated MLP, and local attention in most layers."""

from collections.abc import Mapping
from typing import Any

from jaxcl.models.pretrained.blocks import Architecture
from jaxcl.models.pretrained.config_values import (
    FULL,
    SLIDING,
    activation,
    check_supported,
    flag,
    number,
    size,
    sliding_layers,
)
from jaxcl.models.pretrained.tensor_names import Names, transformer_family

__all__ = ["MODERNBERT", "modernbert_architecture"]

DEFAULT_BASES = {FULL: 160_000.0, SLIDING: 10_000.0}
OLD_BASES = {FULL: "global_rope_theta", SLIDING: "local_rope_theta"}
"""The keys of the rotary bases in configs older than `rope_parameters`."""


def modernbert_architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a ModernBERT model's `config.json` describes.

    Reference:
      Warner et al., "Smarter, Better, Faster, Longer: A Modern Bidirectional Encoder for Fast,
      Memory Efficient, and Long Context Finetuning and Inference", 2024.
    """
    check_supported(config, quantization_config=None, rope_scaling=None)
    num_layers = size(config, "num_hidden_layers", 22)
    period = size(config, "global_attn_every_n_layers", 3)
    slides = sliding_layers(config, [n % period != 0 for n in range(num_layers)])
    window = size(config, "local_attention", 128) // 2
    return Architecture(
        vocabulary_size=size(config, "vocab_size", 50368),
        hidden_dim=size(config, "hidden_size", 768),
        num_layers=num_layers,
        num_heads=size(config, "num_attention_heads", 12),
        mlp_dim=size(config, "intermediate_size", 1152),
        activation=activation(config, "hidden_activation"),
        epsilon=number(config, "norm_eps", 1e-5),
        dropout=0.0,  # the config has three rates, all 0 in the published models
        num_positions=size(config, "max_position_embeddings", 8192),
        pre_norm=True,
        norm_bias=flag(config, "norm_bias", False),
        attention_bias=flag(config, "attention_bias", False),
        mlp_bias=flag(config, "mlp_bias", False),
        rotary_bases=tuple(_rotary_base(config, SLIDING if one else FULL) for one in slides),
        windows=tuple(window if one else None for one in slides),
        joint_projections=True,
        gated=True,
    )


def _rotary_base(config: Mapping[str, Any], kind: str) -> float:
    parameters = config.get("rope_parameters") or {}
    if not isinstance(parameters, dict) or not isinstance(parameters.get(kind, {}), dict):
        raise ValueError(
            f"config.json: rope_parameters={parameters!r}; it must map {FULL!r} and {SLIDING!r} to "
            "their parameters"
        )
    of_kind = parameters.get(kind, {})
    check_supported(of_kind, rope_type="default", type="default")
    old = number(config, OLD_BASES[kind], DEFAULT_BASES[kind])
    return number(of_kind, "rope_theta", old)


NAMES = Names(
    tables={"token_table": "embeddings.tok_embeddings"},
    norms={"norm": "embeddings.norm", "final_norm": "final_norm"},
    block="layers.{}.",
    block_norms={"attention_norm": "attn_norm", "mlp_norm": "mlp_norm"},
    block_linear={
        "attention/projections": "attn.Wqkv",
        "attention/output": "attn.Wo",
        "mlp/widen": "mlp.Wi",
        "mlp/narrow": "mlp.Wo",
    },
)

MODERNBERT = transformer_family(("model.",), modernbert_architecture, NAMES)
