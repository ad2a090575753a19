"""The checks of the evaluation settings."""

import re

from jaxcl.settings.check_names import check_names
from jaxcl.settings.sections import Settings

__all__ = ["check_evaluation_settings", "check_weights"]

_METHODS = ("bm25", "dense", "hybrid")
_WEIGHTS = ("trained", "average")
_METRIC_PREFIXES = (
    *("assignment", "bank", "machine", "mined", "negatives", "test", "time", "train"),
    "validation",
)
_SET_NAME = re.compile(r"[A-Za-z0-9_-]+")


def check_evaluation_settings(settings: Settings) -> None:
    """Raise a `ValueError` for unknown methods, or evaluation sets that cannot be used."""
    methods = settings.evaluation.methods
    check_names("evaluation.methods", methods, _METHODS)
    if not methods:
        raise ValueError(f"evaluation.methods=(); name one or more of {', '.join(_METHODS)}")
    check_weights(settings, "evaluation.weights", settings.evaluation.weights)
    _check_sets(settings)


def check_weights(settings: Settings, setting: str, weights: str) -> None:
    """Raise a `ValueError` for weights that a run does not have.

    Args:
      settings: the settings of the run.
      setting: the setting or argument that names the weights, for messages.
      weights: its value.
    """
    if weights not in _WEIGHTS:
        raise ValueError(f"{setting}={weights!r} is unknown; use one of {', '.join(_WEIGHTS)}")
    if weights == "average" and settings.optimizer.average_decay is None:
        raise ValueError(
            f"{setting}='average' needs a moving average of the weights, which a run keeps with "
            "optimizer.average_decay, such as 0.999"
        )


def _check_sets(settings: Settings) -> None:
    evaluation = settings.evaluation
    for name in evaluation.sets:
        if not _SET_NAME.fullmatch(name) or name in _METRIC_PREFIXES:
            raise ValueError(
                f"evaluation.sets has the name {name!r}; use letters, digits, - and _, and none of "
                f"{', '.join(_METRIC_PREFIXES)}, which begin the names of other metrics"
            )
    if evaluation.patience is not None and evaluation.best_metric is None:
        raise ValueError(
            f"evaluation.patience={evaluation.patience} counts evaluations of "
            "evaluation.best_metric, which is None; name a metric, such as "
            "'validation/dense/mrr@10'"
        )
