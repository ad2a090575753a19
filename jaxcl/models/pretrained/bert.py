"""BERT, and encoders with its architecture: MiniLM, BGE, E5, GTE."""

from collections.abc import Mapping
from typing import Any

from jaxcl.models.pretrained.blocks import Architecture
from jaxcl.models.pretrained.config_values import activation, check_supported, number, size
from jaxcl.models.pretrained.tensor_names import (
    Names,
    attention_names,
    mlp_names,
    transformer_family,
)

__all__ = ["BERT", "BERT_NAMES", "BERT_TABLES", "bert_architecture"]


def bert_architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a BERT model's `config.json` describes.

    Reference:
      Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language
      Understanding", NAACL 2019.
    """
    check_supported(
        config,
        position_embedding_type="absolute",
        is_decoder=False,
        add_cross_attention=False,
        quantization_config=None,
    )
    return Architecture(
        vocabulary_size=size(config, "vocab_size", 30522),
        hidden_dim=size(config, "hidden_size", 768),
        num_layers=size(config, "num_hidden_layers", 12),
        num_heads=size(config, "num_attention_heads", 12),
        mlp_dim=size(config, "intermediate_size", 3072),
        activation=activation(config, "hidden_act"),
        epsilon=number(config, "layer_norm_eps", 1e-12),
        dropout=number(config, "hidden_dropout_prob", 0.1),
        num_positions=size(config, "max_position_embeddings", 512),
        token_types=size(config, "type_vocab_size", 2),
    )


BERT_TABLES = {
    "token_table": "embeddings.word_embeddings",
    "position_table": "embeddings.position_embeddings",
}
BERT_NAMES = Names(
    tables={**BERT_TABLES, "type_table": "embeddings.token_type_embeddings"},
    norms={"norm": "embeddings.LayerNorm"},
    block="encoder.layer.{}.",
    block_norms={"attention_norm": "attention.output.LayerNorm", "mlp_norm": "output.LayerNorm"},
    block_linear=attention_names(
        "attention.", "self.query", "self.key", "self.value", "output.dense"
    )
    | mlp_names("intermediate.dense", "output.dense"),
)

BERT = transformer_family(("bert.",), bert_architecture, BERT_NAMES)
