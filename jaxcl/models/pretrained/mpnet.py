"""MPNet: BERT without token types, with relative positions in addition to the absolute ones."""

from collections.abc import Mapping
from typing import Any

from jaxcl.models.pretrained.bert import BERT_NAMES, BERT_TABLES, bert_architecture
from jaxcl.models.pretrained.blocks import NUM_BUCKETS, Architecture
from jaxcl.models.pretrained.config_values import check_supported
from jaxcl.models.pretrained.tensor_names import attention_names, transformer_family

__all__ = ["MPNET", "mpnet_architecture"]


def mpnet_architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture that an MPNet's `config.json` describes.

    The first token of a text is at position 2, because MPNet uses 1 as the padding id and ignores
    `pad_token_id`.

    Reference:
      Song et al., "MPNet: Masked and Permuted Pre-training for Language Understanding", NeurIPS
      2020.
    """
    check_supported(config, relative_attention_num_buckets=NUM_BUCKETS)
    return bert_architecture({"vocab_size": 30527} | dict(config))._replace(
        first_position=2, token_types=0, relative_positions=True
    )


NAMES = BERT_NAMES._replace(
    tables={**BERT_TABLES, "bucket_table": "encoder.relative_attention_bias"},
    block_norms={"attention_norm": "attention.LayerNorm", "mlp_norm": "output.LayerNorm"},
    block_linear={**BERT_NAMES.block_linear, **attention_names("attention.attn.", *"qkvo")},
)

MPNET = transformer_family(("mpnet.",), mpnet_architecture, NAMES)
