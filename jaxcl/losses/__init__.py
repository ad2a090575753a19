"""Contrastive losses: embeddings in, one value per query out, in nats."""

from collections.abc import Mapping

from jaxcl.losses.distillation import (
    DistillationOptions,
    EmbeddingDistillationOptions,
    distillation_loss,
    embedding_distillation_loss,
    margin_mse_loss,
)
from jaxcl.losses.matryoshka import matryoshka
from jaxcl.losses.negative_metrics import NegativeMetrics, measure_negatives
from jaxcl.losses.protocol import Loss, LossFn, Masks, NoOptions
from jaxcl.losses.running_estimate import (
    EstimateOptions,
    estimate_memory,
    remembered_estimate_loss,
    running_estimate_loss,
)
from jaxcl.losses.scored import cosent_loss
from jaxcl.losses.sigmoid import SigmoidOptions, sigmoid_pair_loss
from jaxcl.losses.softmax import (
    DirectionOptions,
    HardOptions,
    InfonceOptions,
    decoupled_infonce_loss,
    hard_infonce_loss,
    infonce_loss,
    nt_xent_loss,
)
from jaxcl.losses.supervised import supervised_infonce_loss
from jaxcl.negatives.sets import ExplicitNegatives, OwnNegatives, SharedNegatives

__all__ = [
    "LOSSES",
    "ExplicitNegatives",
    "Loss",
    "LossFn",
    "Masks",
    "NegativeMetrics",
    "OwnNegatives",
    "SharedNegatives",
    "cosent_loss",
    "decoupled_infonce_loss",
    "distillation_loss",
    "embedding_distillation_loss",
    "hard_infonce_loss",
    "infonce_loss",
    "margin_mse_loss",
    "matryoshka",
    "measure_negatives",
    "nt_xent_loss",
    "running_estimate_loss",
    "sigmoid_pair_loss",
    "supervised_infonce_loss",
]

_FROM_TEACHER = Loss(
    distillation_loss,
    DistillationOptions,
    masks=("valid",),
    negatives=(ExplicitNegatives,),
    columns={"teacher_scores": "teacher_scores"},
    exchanges=False,
)

LOSSES: Mapping[str, Loss] = {
    "cosent": Loss(
        cosent_loss,
        NoOptions,
        masks=("valid",),
        negatives=(),
        columns={"scores": "score"},
        multiplies=False,
    ),
    "decoupled": Loss(decoupled_infonce_loss, DirectionOptions),
    "distillation": _FROM_TEACHER,
    "embedding_distillation": Loss(
        embedding_distillation_loss,
        EmbeddingDistillationOptions,
        masks=("valid",),
        negatives=(),
        columns={"teacher_vectors": "guides"},
        has_temperature=False,
        exchanges=False,
    ),
    "hard": Loss(hard_infonce_loss, HardOptions),
    "infonce": Loss(infonce_loss, InfonceOptions),
    "margin_mse": _FROM_TEACHER._replace(function=margin_mse_loss),
    "nt_xent": Loss(nt_xent_loss, NoOptions),
    "running_estimate": Loss(
        remembered_estimate_loss,
        EstimateOptions,
        init_memory=estimate_memory,
        bounds_temperature=True,
    ),
    "sigmoid": Loss(sigmoid_pair_loss, SigmoidOptions, has_bias=True),
    "supervised": Loss(
        supervised_infonce_loss,
        DirectionOptions,
        masks=("ids", "valid"),
        columns={"labels": "group"},
    ),
}
"""Losses by `config.loss.name`, with their declarations."""
