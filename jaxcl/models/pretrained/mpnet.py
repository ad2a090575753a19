"""MPNet: BERT without token types, with relative positions in addition to the absolute ones."""

from collections.abc import Mapping
from typing import Any

from jaxcl.models.pretrained.blocks import NUM_BUCKETS, Architecture
from jaxcl.models.pretrained.config_values import activation, check_supported, number, size
from jaxcl.models.pretrained.tensor_names import Names, transformer_family

__all__ = ["MPNET", "mpnet_architecture"]


def mpnet_architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture that an MPNet's `config.json` describes.

    The first token of a text is at position 2, because MPNet takes 1 as the padding id and ignores
    `pad_token_id`.

    Raises:
      ValueError: for an unsupported value; the message names its key.

    Reference:
      Song et al., "MPNet: Masked and Permuted Pre-training for Language Understanding", NeurIPS
      2020.
    """
    check_supported(config, quantization_config=None, relative_attention_num_buckets=NUM_BUCKETS)
    return Architecture(
        vocabulary_size=size(config, "vocab_size", 30527),
        hidden_dim=size(config, "hidden_size", 768),
        num_layers=size(config, "num_hidden_layers", 12),
        num_heads=size(config, "num_attention_heads", 12),
        mlp_dim=size(config, "intermediate_size", 3072),
        activation=activation(config, "hidden_act"),
        epsilon=number(config, "layer_norm_eps", 1e-12),
        dropout=number(config, "hidden_dropout_prob", 0.1),
        num_positions=size(config, "max_position_embeddings", 512),
        first_position=2,
        relative_positions=True,
    )


NAMES = Names(
    tables={
        "token_table": "embeddings.word_embeddings",
        "position_table": "embeddings.position_embeddings",
        "bucket_table": "encoder.relative_attention_bias",
    },
    norms={"norm": "embeddings.LayerNorm"},
    block="encoder.layer.{}.",
    block_norms={"attention_norm": "attention.LayerNorm", "mlp_norm": "output.LayerNorm"},
    block_linear={
        "attention/query": "attention.attn.q",
        "attention/key": "attention.attn.k",
        "attention/value": "attention.attn.v",
        "attention/output": "attention.attn.o",
        "mlp/widen": "intermediate.dense",
        "mlp/narrow": "output.dense",
    },
)

MPNET = transformer_family(("mpnet.",), mpnet_architecture, NAMES)
