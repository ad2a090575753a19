"""The checks of the evaluation settings."""

import re

from jaxcl.settings.check_names import check_names
from jaxcl.settings.derived import (
    DIRECTIONS,
    has_only_texts,
    ranking_directions,
    ranking_methods,
)
from jaxcl.settings.sections import Settings

__all__ = ["check_evaluation_settings", "check_weights"]

_METHODS = ("bm25", "dense", "hybrid", "pixels")
_WEIGHTS = ("trained", "average")
_METRIC_PREFIXES = (
    *("assignment", "bank", "machine", "mined", "negatives", "test", "time", "train"),
    "validation",
)
_SET_NAME = re.compile(r"[A-Za-z0-9_-]+")


def check_evaluation_settings(settings: Settings) -> None:
    """Raise a `ValueError` for unknown methods, or evaluation sets that cannot be used."""
    _check_rankings(settings)
    check_weights(settings, "evaluation.weights", settings.evaluation.weights)
    _check_sets(settings)


def _check_rankings(settings: Settings) -> None:
    """Check how held-out rows are ranked."""
    methods, directions = ranking_methods(settings), ranking_directions(settings)
    for field, names, known in (
        ("evaluation.methods", methods, _METHODS),
        ("evaluation.directions", directions, DIRECTIONS),
    ):
        check_names(field, names, known)
        if not names:
            raise ValueError(f"{field}=(); name one or more of {', '.join(known)}")
    modality = settings.data.modality._asdict()
    if not has_only_texts(settings.data) and {"bm25", "hybrid"} & set(methods):
        raise ValueError(
            f"evaluation.methods: bm25 and hybrid compare texts, and data.modality is {modality}; "
            "use ('dense',), and 'pixels' as a baseline for images"
        )
    if "pixels" in methods and "image" not in modality.values():
        raise ValueError(
            f"evaluation.methods: pixels compares images, and data.modality is {modality}; leave "
            "it out"
        )
    if settings.run.sheets and "image" not in modality.values():
        raise ValueError(
            f"run.sheets=True shows images, and data.modality is {modality}; set it to None"
        )


def check_weights(settings: Settings, setting: str, weights: str) -> None:
    """Raise a `ValueError` for weights that a run does not have.

    Args:
      settings: the settings of the run.
      setting: the setting or argument that names the weights, for messages.
      weights: the value of that setting or argument.
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
