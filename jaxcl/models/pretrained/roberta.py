"""RoBERTa and XLM-R: BERT with positions that start after the padding id."""

from collections.abc import Mapping
from typing import Any

from jaxcl.models.pretrained.bert import BERT_NAMES, bert_architecture
from jaxcl.models.pretrained.blocks import Architecture
from jaxcl.models.pretrained.config_values import size
from jaxcl.models.pretrained.tensor_names import transformer_family

__all__ = ["ROBERTA", "roberta_architecture"]


def roberta_architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a RoBERTa model's `config.json` describes.

    The first token of a text is at position `pad_token_id + 1`, whatever the text's ids.

    Reference:
      Liu et al., "RoBERTa: A Robustly Optimized BERT Pretraining Approach", 2019.
    """
    padding_id = size(config, "pad_token_id", 1, least=0)
    return bert_architecture(config)._replace(first_position=padding_id + 1)


ROBERTA = transformer_family(("roberta.",), roberta_architecture, BERT_NAMES)
