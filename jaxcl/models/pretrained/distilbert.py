"""DistilBERT: BERT without token types, with other tensor names."""

from collections.abc import Mapping
from typing import Any

from jaxcl.models.pretrained.blocks import Architecture
from jaxcl.models.pretrained.config_values import activation, check_supported, number, size
from jaxcl.models.pretrained.tensor_names import Names, transformer_family

__all__ = ["DISTILBERT", "distilbert_architecture"]


def distilbert_architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a DistilBERT's `config.json` describes.

    Raises:
      ValueError: for an unsupported value; the message names its key.

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
        epsilon=1e-12,  # no key sets it
        dropout=number(config, "dropout", 0.1),
        num_positions=size(config, "max_position_embeddings", 512),
    )


NAMES = Names(
    tables={
        "token_table": "embeddings.word_embeddings",
        "position_table": "embeddings.position_embeddings",
    },
    norms={"norm": "embeddings.LayerNorm"},
    block="transformer.layer.{}.",
    block_norms={"attention_norm": "sa_layer_norm", "mlp_norm": "output_layer_norm"},
    block_linear={
        "attention/query": "attention.q_lin",
        "attention/key": "attention.k_lin",
        "attention/value": "attention.v_lin",
        "attention/output": "attention.out_lin",
        "mlp/widen": "ffn.lin1",
        "mlp/narrow": "ffn.lin2",
    },
)

DISTILBERT = transformer_family(("distilbert.",), distilbert_architecture, NAMES)
