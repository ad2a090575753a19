"""The families of pretrained encoders, by the `model_type` of their `config.json`."""

from collections.abc import Mapping

from jaxcl.models.pretrained.bert import BERT
from jaxcl.models.pretrained.decoders import LLAMA, MISTRAL, QWEN2, QWEN3
from jaxcl.models.pretrained.description import Family
from jaxcl.models.pretrained.distilbert import DISTILBERT
from jaxcl.models.pretrained.gemma3 import GEMMA3
from jaxcl.models.pretrained.modernbert import MODERNBERT
from jaxcl.models.pretrained.mpnet import MPNET
from jaxcl.models.pretrained.roberta import ROBERTA
from jaxcl.models.pretrained.static_embedding import MODEL2VEC, STATIC_EMBEDDING

__all__ = ["DECODERS", "FAMILIES"]

FAMILIES: Mapping[str, Family] = {
    "bert": BERT,
    "distilbert": DISTILBERT,
    "gemma3_text": GEMMA3,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "model2vec": MODEL2VEC,
    "modernbert": MODERNBERT,
    "mpnet": MPNET,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "roberta": ROBERTA,
    "static_embedding": STATIC_EMBEDDING,
    "xlm-roberta": ROBERTA,
}

DECODERS = frozenset({"gemma3_text", "llama", "mistral", "qwen2", "qwen3"})
"""The families of decoders, whose tokenizers may have no padding token."""
