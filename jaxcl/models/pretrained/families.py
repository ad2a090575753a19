"""The families of pretrained encoders, by the `model_type` of their `config.json`."""

from collections.abc import Mapping

from jaxcl.models.pretrained.bert import BERT
from jaxcl.models.pretrained.clip import CLIP_IMAGE, CLIP_TEXT
from jaxcl.models.pretrained.decoders import LLAMA, MISTRAL, QWEN2, QWEN3
from jaxcl.models.pretrained.description import Family
from jaxcl.models.pretrained.distilbert import DISTILBERT
from jaxcl.models.pretrained.gemma3 import GEMMA3
from jaxcl.models.pretrained.modernbert import MODERNBERT
from jaxcl.models.pretrained.mpnet import MPNET
from jaxcl.models.pretrained.roberta import ROBERTA
from jaxcl.models.pretrained.siglip import SIGLIP_IMAGE, SIGLIP_TEXT
from jaxcl.models.pretrained.static_embedding import MODEL2VEC, STATIC_EMBEDDING
from jaxcl.models.pretrained.vit import DINOV2, VIT

__all__ = ["DECODERS", "FAMILIES", "TWO_TOWERS"]

FAMILIES: Mapping[str, Family] = {
    "bert": BERT,
    "clip_text_model": CLIP_TEXT,
    "clip_vision_model": CLIP_IMAGE,
    "dinov2": DINOV2,
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
    "siglip_text_model": SIGLIP_TEXT,
    "siglip_vision_model": SIGLIP_IMAGE,
    "static_embedding": STATIC_EMBEDDING,
    "vit": VIT,
    "xlm-roberta": ROBERTA,
}

DECODERS = frozenset({"gemma3_text", "llama", "mistral", "qwen2", "qwen3"})
"""The families of decoders, whose tokenizers may have no padding token."""

TWO_TOWERS: Mapping[str, Mapping[str, str]] = {
    "clip": {"text": "clip_text_model", "image": "clip_vision_model"},
    "siglip": {"text": "siglip_text_model", "image": "siglip_vision_model"},
}
"""The `model_type` of a folder with two towers -> the modality of each tower -> its family."""
