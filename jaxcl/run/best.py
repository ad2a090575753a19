"""Select the best evaluation of a run so far, and decide when to stop early.

`Best` summarizes the evaluations of a metric up to a step. A checkpoint records it, so that a
resumed run continues with the summary that it had at that step.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxcl.host.paths import AnyPath
from jaxcl.host.processes import first_of_all
from jaxcl.run.checkpoint_record import CheckpointError, newest_record
from jaxcl.settings.sections import Settings

__all__ = [
    "Best",
    "Selection",
    "best_step",
    "best_step_in",
    "kept_steps",
    "recorded_best",
    "selection_of",
    "updated",
]


class Best(NamedTuple):
    """The best evaluation so far of a metric for which higher is better.

    Attributes:
      metric: name of the metric.
      step: step of the best evaluation; `None` before the first finite value.
      value: the metric at that step.
      reference: the last value that was an improvement by more than `min_delta`.
      waited: number of evaluations since that improvement.
    """

    metric: str
    step: int | None = None
    value: float | None = None
    reference: float | None = None
    waited: int = 0


class Selection(NamedTuple):
    """The rule by which a run selects its best step and stops early.

    Attributes:
      metric: name of the metric; `None` to select nothing.
      patience: number of evaluations without an improvement after which the run stops; `None` to
        train all steps.
      min_delta: only an increase by more than this amount is an improvement.
    """

    metric: str | None = None
    patience: int | None = None
    min_delta: float = 0.0

    def resumed(self, record: Mapping[str, Any], *, present: Collection[int]) -> Best | None:
        """Read the summary in the record of the checkpoint that a run resumes from.

        If the metric has changed, the run begins a new summary. If the best checkpoint is missing,
        the next evaluation becomes the best, but the count of evaluations without an improvement
        continues.

        Args:
          record: the record of the checkpoint; empty for a new run.
          present: the steps of all checkpoints.
        """
        best = recorded_best(record)
        if self.metric is None:
            return None
        if best is None or best.metric != self.metric:
            return Best(self.metric)
        return best if best.step in present else best._replace(step=None, value=None)

    def after(self, best: Best | None, step: int, values: Mapping[str, float]) -> Best | None:
        """Update the summary with one more evaluation.

        All processes use the value of process 0. A missing value is not an improvement.
        """
        if best is None:
            return None
        value = _of_process_0(values.get(best.metric, math.nan))
        return updated(best, step, value, min_delta=self.min_delta)

    def stops(self, best: Best | None) -> bool:
        """Whether a run stops early, given its evaluations so far."""
        return best is not None and self.patience is not None and best.waited >= self.patience


def selection_of(settings: Settings) -> Selection:
    """The selection rule in the settings of a run."""
    evaluation = settings.evaluation
    return Selection(evaluation.best_metric, evaluation.patience, evaluation.min_delta)


def updated(best: Best, step: int, value: float, *, min_delta: float = 0.0) -> Best:
    """Update a summary with one more evaluation.

    If values are equal, the first is the best. A value that is not finite is not an improvement.
    Small increases add up, because a value is compared with the last improvement, not with the last
    evaluation.

    Args:
      best: the summary of the earlier evaluations.
      step: the step of the new evaluation.
      value: the metric at that step.
      min_delta: as in `Selection`.

    Example:
      >>> first = updated(Best("stsb/spearman"), 100, 0.5)
      >>> updated(first, 200, 0.75).step, updated(first, 200, 0.5)[1:]
      (200, (100, 0.5, 0.5, 1))
    """
    if not math.isfinite(value):
        return best._replace(waited=best.waited + 1)
    if best.value is None or value > best.value:
        best = best._replace(step=step, value=value)
    if best.reference is None or value > best.reference + min_delta:
        return best._replace(reference=value, waited=0)
    return best._replace(waited=best.waited + 1)


def _of_process_0(value: float) -> float:
    """The value of process 0, since processes may differ in the last bits but must agree."""
    words = np.array([value], np.float64).view(np.int32)
    return float(np.array(first_of_all(words.tolist()), np.int32).view(np.float64)[0])


def recorded_best(record: Mapping[str, Any]) -> Best | None:
    """The summary in the record of a checkpoint; `None` if the run selects no best step.

    Raises:
      CheckpointError: if this version cannot read the summary.
    """
    summary = record.get("best")
    if summary is None:
        return None
    try:
        return Best(**summary)
    except TypeError as error:
        raise CheckpointError(
            f"its record has best={summary!r}, which this version of jaxcl cannot read"
        ) from error


def best_step(record: Mapping[str, Any]) -> int | None:
    """The step of the best evaluation in a checkpoint's record; `None` without evaluations."""
    best = recorded_best(record)
    return None if best is None else best.step


def best_step_in(directory: AnyPath) -> int | None:
    """The step of the best evaluation in a folder of checkpoints; `None` without evaluations."""
    record = newest_record(directory)
    return None if record is None else best_step(record)


def kept_steps(
    steps: Collection[int], *, newest: int, best_of: Mapping[int, int | None]
) -> set[int]:
    """Select the checkpoints to keep: the newest, and the best one up to each of them.

    If the newest checkpoint is damaged, a run falls back to an earlier one. The best step up to the
    earlier one may be different, and its checkpoint must still exist.

    Args:
      steps: the steps of all checkpoints, including the one that was just saved.
      newest: number of newest checkpoints to keep.
      best_of: maps a step to the step of the best evaluation up to it.

    Example:
      >>> sorted(kept_steps([10, 20, 30, 40], newest=2, best_of={30: 10, 40: 40}))
      [10, 30, 40]
    """
    latest = set(sorted(steps)[-newest:])
    best = {best_of.get(step) for step in latest}
    return latest | {step for step in steps if step in best}
