"""Contrastive losses: embeddings in, one value per query out, in nats."""

from jaxcl.losses.distillation import distillation_loss
from jaxcl.losses.matryoshka import matryoshka
from jaxcl.losses.negative_metrics import NegativeMetrics, measure_negatives
from jaxcl.losses.running_estimate import running_estimate_loss
from jaxcl.losses.sigmoid import sigmoid_pair_loss
from jaxcl.losses.softmax import decoupled_infonce_loss, hard_infonce_loss, infonce_loss
from jaxcl.losses.supervised import supervised_infonce_loss

__all__ = [
    "NegativeMetrics",
    "decoupled_infonce_loss",
    "distillation_loss",
    "hard_infonce_loss",
    "infonce_loss",
    "matryoshka",
    "measure_negatives",
    "running_estimate_loss",
    "sigmoid_pair_loss",
    "supervised_infonce_loss",
]
