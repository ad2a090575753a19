"""DistilBERT: BERT without token types, with other tensor names."""

from collections.abc import Mapping
from typing import Any

from jaxcl.models.pretrained.bert import BERT_NAMES, BERT_TABLES
from jaxcl.models.pretrained.blocks import Architecture
from jaxcl.models.pretrained.config_values import activation, check_supported, number, size
from jaxcl.models.pretrained.tensor_names import attention_names, mlp_names, transformer_family

__all__ = ["DISTILBERT", "distilbert_architecture"]


def distilbert_architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a DistilBERT model's `config.json` describes.

    Reference:
      Sanh et al., "DistilBERT, a distilled version of BERT", 2019.
    """
    check_supported(config, quantization_config=None)
    return Architecture(
        vocabulary_size=size(config, "vocab_size", 30522),
        hidden_dim=size(config, "dim", 768),
        num_layers=size(config, "n_layers", 6),
        num_heads=size(config, "n_heads", 12),
        mlp_dim=size(config, "hidden_dim", 3072),
        activation=activation(config, "activation"),
        epsilon=1e-12,  # no key of the config sets it
        dropout=number(config, "dropout", 0.1),
        num_positions=size(config, "max_position_embeddings", 512),
    )


NAMES = BERT_NAMES._replace(
    tables=BERT_TABLES,
    block="transformer.layer.{}.",
    block_norms={"attention_norm": "sa_layer_norm", "mlp_norm": "output_layer_norm"},
    block_linear=attention_names("attention.", "q_lin", "k_lin", "v_lin", "out_lin")
    | mlp_names("ffn.lin1", "ffn.lin2"),
)

DISTILBERT = transformer_family(("distilbert.",), distilbert_architecture, NAMES)
