"""Sentence embeddings, evaluated on semantic textual similarity (STS).

    python -m jaxcl.train --config configs/sentence_embedding.py:simcse \\
        --config.model.pretrained=FOLDER --config.data.name=sentences.jsonl \\
        --config.evaluation.sets.sts=sts-dev.csv --config.evaluation.best_metric=sts/spearman

FOLDER is a pretrained text encoder, such as BERT base. The variants train on different data:

- `simcse`: texts, in a column `text`; the two sides of a pair are one text with different dropout.
- `pairs`: pairs of texts, optionally with negatives, such as entailments and contradictions.
- `scored`: pairs of texts with a score of their similarity in a column `score`, for CoSENT.

The columns of pairs are recognised by common names, such as `sentence1` and `sentence2`. The
evaluation set is a file of other pairs with scores. No rows of `data.name` are held out, because
with SimCSE, ranking the keys is trivial: each text is its own key.
`configs/sentence_embedding.py:simcse_smoke` and likewise `pairs_smoke` and `scored_smoke` are
shrunk to seconds, without a pretrained encoder.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jaxcl.configs import base

_SMOKE = "_smoke"


def get_config(variant: str = "simcse") -> ConfigDict:
    """The settings of a variant, for the size of BERT base."""
    kind = variant.removesuffix(_SMOKE)
    if kind not in VARIANTS:
        known = ", ".join([*VARIANTS, *(kind + _SMOKE for kind in VARIANTS)])
        raise ValueError(f"variant {variant!r} is unknown; use one of {known}")
    config = base.get_config()
    config.data.splits = ConfigDict({"train": "train"})
    config.data.max_tokens = ConfigDict({"query": 64, "key": 64})
    config.model.name = "pretrained"
    config.loss.masks = ("row", "text")  # equal texts are not negatives
    config.loss.temperature = ConfigDict({"initial": 0.05, "minimum": 0.05, "maximum": 0.05})
    config.optimizer.warmup_steps = placeholder(int)  # a tenth of the steps
    config.steps = 1_000
    config.grad_cache.chunk_size = 64
    config.evaluation.methods = ("dense",)
    VARIANTS[kind](config)
    config.evaluation.batch_size = config.global_batch_size
    if variant != kind:
        _shrink(config)
    return config


def _simcse(config: ConfigDict) -> None:
    """Unsupervised SimCSE (Gao et al., 2021), with the hyperparameters for BERT base.

    The paper trains one epoch of a million sentences, which takes 15,625 steps.
    """
    config.data.query_field = config.data.key_field = "text"
    config.data.max_tokens = ConfigDict({"query": 32, "key": 32})
    config.loss.options.directions = ("query_to_key",)
    config.global_batch_size = 64
    config.optimizer.learning_rate = 3e-5


def _pairs(config: ConfigDict) -> None:
    """Supervised SimCSE: entailed sentences are positives, contradictions are negatives."""
    config.loss.options.directions = ("query_to_key",)
    config.global_batch_size = 512
    config.optimizer.learning_rate = 5e-5


def _scored(config: ConfigDict) -> None:
    """CoSENT, with the scale 20 of sentence-transformers."""
    config.data.score_field = "score"
    config.loss.name = "cosent"
    config.global_batch_size = 64
    config.optimizer.learning_rate = 2e-5
    config.optimizer.weight_decay = 0.01


VARIANTS = {"simcse": _simcse, "pairs": _pairs, "scored": _scored}


def _shrink(config: ConfigDict) -> None:
    """A small transformer from random weights, for a few steps."""
    config.steps = 20
    config.global_batch_size = config.evaluation.batch_size = 16
    config.data.vocabulary_size = 500
    config.data.max_tokens = ConfigDict({"query": 12, "key": 12})
    config.model.name = "transformer"
    config.model.dim = 32
    config.model.options.update(
        {"max_tokens": 12, "hidden_dim": 32, "num_layers": 1, "num_heads": 2, "mlp_dim": 64}
        | {"dropout": 0.1}
    )
    config.grad_cache.chunk_size = placeholder(int)
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 2
    config.run.evaluate_every = config.run.checkpoint_every = 10
