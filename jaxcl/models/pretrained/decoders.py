"""Mistral, Llama, Qwen2 and Qwen3: decoders with rotary positions and grouped heads."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxcl.models.pretrained.config_values import (
    SLIDING,
    activation,
    check_supported,
    flag,
    number,
    positive,
    size,
    sliding_layers,
)
from jaxcl.models.pretrained.decoder_blocks import Decoder, DecoderArchitecture
from jaxcl.models.pretrained.description import Family, Tensor
from jaxcl.models.pretrained.rotary import Rotary, read_rotary
from jaxcl.models.pretrained.tensor_names import family_of, linear_tensors, norm_tensors

__all__ = [
    "LLAMA",
    "MISTRAL",
    "QWEN2",
    "QWEN3",
    "decoder_architecture",
    "decoder_family",
    "llama_architecture",
    "mistral_architecture",
    "qwen2_architecture",
    "qwen3_architecture",
]

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "sliding_window": 4096,
}
"""The values that replace keys missing from a `config.json`."""
_QWEN2: Mapping[str, Any] = {
    **_DEFAULTS,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}


def mistral_architecture(config: Mapping[str, Any]) -> DecoderArchitecture:
    """The architecture that a Mistral model's `config.json` describes.

    All layers have the same window. Without the key `sliding_window`, it is 4,096 tokens; null
    means full attention.

    Reference:
      Jiang et al., "Mistral 7B", 2023.
    """
    check_supported(config, layer_types=None)
    own = {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}
    config = {**_DEFAULTS, **own, **config}
    a = decoder_architecture(config)
    return _with_windows(a, config, [config["sliding_window"] is not None] * a.num_layers)


def llama_architecture(config: Mapping[str, Any]) -> DecoderArchitecture:
    """The architecture that a Llama model's `config.json` describes.

    Reference:
      Grattafiori et al., "The Llama 3 Herd of Models", 2024.
    """
    check_supported(config, layer_types=None)
    bias = flag(config, "attention_bias", False)
    own = {"intermediate_size": 11008, "max_position_embeddings": 2048}
    return decoder_architecture({**_DEFAULTS, **own, **config})._replace(
        projection_bias=bias, output_bias=bias, mlp_bias=flag(config, "mlp_bias", False)
    )


def qwen2_architecture(config: Mapping[str, Any]) -> DecoderArchitecture:
    """The architecture that a Qwen2 model's `config.json` describes.

    Only queries, keys and values have biases. Windows need `use_sliding_window`; by default, the
    layers from number `max_window_layers` on then have a window.

    Reference:
      Yang et al., "Qwen2 Technical Report", 2024.
    """
    return _qwen_architecture({**_QWEN2, **config})._replace(projection_bias=True)


def qwen3_architecture(config: Mapping[str, Any]) -> DecoderArchitecture:
    """The architecture that a Qwen3 model's `config.json` describes, with the windows of Qwen2.

    Heads have a width of 128 by default, whatever the width of the hidden states.

    Reference:
      Yang et al., "Qwen3 Technical Report", 2025.
    """
    bias = flag(config, "attention_bias", False)
    return _qwen_architecture({**_QWEN2, "head_dim": 128, **config})._replace(
        projection_bias=bias, output_bias=bias, head_norms=True
    )


def _qwen_architecture(config: Mapping[str, Any]) -> DecoderArchitecture:
    a = decoder_architecture(config)
    first = size(config, "max_window_layers", 28, least=0)
    allowed = flag(config, "use_sliding_window", False) and config["sliding_window"] is not None
    slides = sliding_layers(config, [allowed and n >= first for n in range(a.num_layers)])
    if any(slides) and not allowed:
        raise ValueError(
            f"config.json: layer_types lists {SLIDING!r}, but without use_sliding_window and "
            "sliding_window there is no window"
        )
    return _with_windows(a, config, slides)


def decoder_architecture(config: Mapping[str, Any]) -> DecoderArchitecture:
    """The architecture that a `config.json` describes, without biases, windows or head norms.

    Args:
      config: the content of a `config.json`, with the family's defaults for missing sizes.

    Raises:
      ValueError: for an unsupported value; the message names its key.
    """
    check_supported(
        config,
        quantization_config=None,
        partial_rotary_factor=1.0,
        original_max_position_embeddings=None,
    )
    num_layers = size(config, "num_hidden_layers")
    hidden_dim = size(config, "hidden_size")
    num_heads = size(config, "num_attention_heads")
    head_dim = _size_or(config, "head_dim", hidden_dim // num_heads)
    return DecoderArchitecture(
        vocabulary_size=size(config, "vocab_size"),
        hidden_dim=hidden_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_key_heads=_size_or(config, "num_key_value_heads", num_heads),
        head_dim=head_dim,
        mlp_dim=size(config, "intermediate_size"),
        activation=activation(config, "hidden_act"),
        epsilon=number(config, "rms_norm_eps", 1e-6),
        max_tokens=size(config, "max_position_embeddings"),
        rotary=(_rotary(config),) * num_layers,
        windows=(None,) * num_layers,
        causal=flag(config, "is_causal", True),
        projection_bias=False,
        output_bias=False,
        mlp_bias=False,
        head_norms=False,
        score_scale=head_dim**-0.5,
    )


def _size_or(config: Mapping[str, Any], key: str, default: int) -> int:
    """Read a size, with a default for a missing key and for null."""
    value = config.get(key)
    return size({key: default if value is None else value}, key)


def _rotary(config: Mapping[str, Any]) -> Rotary:
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(parameters, dict):
        raise ValueError(
            f"config.json: rope_parameters={parameters!r:.99}; it must map names to values"
        )
    return read_rotary(parameters, base=positive(config, "rope_theta", 10_000.0))


def _with_windows(
    a: DecoderArchitecture, config: Mapping[str, Any], slides: Sequence[bool]
) -> DecoderArchitecture:
    """Add the windows of the sliding layers.

    A causal window has `sliding_window` tokens, including the token itself. A bidirectional window
    reaches `sliding_window` tokens to either side.
    """
    if not any(slides):
        return a
    window = size(config, "sliding_window")
    furthest = window - 1 if a.causal else window
    return a._replace(windows=tuple(furthest if one else None for one in slides))


def decoder_family(architecture: Callable[[Mapping[str, Any]], DecoderArchitecture]) -> Family:
    """A family of decoders; `architecture` maps a `config.json` to the decoder's architecture."""
    return family_of(("model.",), architecture, Decoder, _tensors)


def _tensors(a: DecoderArchitecture) -> dict[str, Tensor]:
    """Map the path of each parameter to its tensor."""
    tensors = {"token_table": Tensor("embed_tokens.weight")}
    tensors |= norm_tensors("final_norm", "norm", bias=False)
    for layer in range(a.num_layers):
        at, block = f"blocks/{layer}/", f"layers.{layer}."
        for path, name in _norms(a).items():
            tensors |= norm_tensors(at + path, block + name, bias=False)
        for path, (name, bias) in _linear(a).items():
            tensors |= linear_tensors(at + path, block + name, bias=bias)
    return tensors


def _norms(a: DecoderArchitecture) -> dict[str, str]:
    """Path of a norm in a block -> its name in the files."""
    names = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if a.output_norms:
        names |= {
            "attention_output_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_output_norm": "post_feedforward_layernorm",
        }
    if a.head_norms:
        names |= {
            "attention/query_norm": "self_attn.q_norm",
            "attention/key_norm": "self_attn.k_norm",
        }
    return names


def _linear(a: DecoderArchitecture) -> dict[str, tuple[str, bool]]:
    """Path of a linear layer in a block -> its name in the files, and whether it has a bias."""
    return {
        "attention/query": ("self_attn.q_proj", a.projection_bias),
        "attention/key": ("self_attn.k_proj", a.projection_bias),
        "attention/value": ("self_attn.v_proj", a.projection_bias),
        "attention/output": ("self_attn.o_proj", a.output_bias),
        "mlp/gate": ("mlp.gate_proj", a.mlp_bias),
        "mlp/widen": ("mlp.up_proj", a.mlp_bias),
        "mlp/narrow": ("mlp.down_proj", a.mlp_bias),
    }


MISTRAL = decoder_family(mistral_architecture)
LLAMA = decoder_family(llama_architecture)
QWEN2 = decoder_family(qwen2_architecture)
QWEN3 = decoder_family(qwen3_architecture)
