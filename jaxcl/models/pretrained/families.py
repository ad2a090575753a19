"""The families of pretrained encoders, by the `model_type` of their `config.json`."""

from collections.abc import Mapping

from jaxcl.models.pretrained.bert import BERT
from jaxcl.models.pretrained.description import Family
from jaxcl.models.pretrained.distilbert import DISTILBERT
from jaxcl.models.pretrained.modernbert import MODERNBERT
from jaxcl.models.pretrained.mpnet import MPNET
from jaxcl.models.pretrained.roberta import ROBERTA
from jaxcl.models.pretrained.static_embedding import MODEL2VEC, STATIC_EMBEDDING

__all__ = ["FAMILIES"]

FAMILIES: Mapping[str, Family] = {
    "bert": BERT,
    "distilbert": DISTILBERT,
    "model2vec": MODEL2VEC,
    "modernbert": MODERNBERT,
    "mpnet": MPNET,
    "roberta": ROBERTA,
    "static_embedding": STATIC_EMBEDDING,
    "xlm-roberta": ROBERTA,
}
