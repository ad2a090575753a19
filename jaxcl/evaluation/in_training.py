"""Evaluation sets that a run uses during training, and the metrics that can select its best
checkpoint.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from jaxcl.data.images.image_files import naming_damaged
from jaxcl.data.prepare import RunData
from jaxcl.data.sources import PairSource
from jaxcl.evaluation.class_set import names_rows, open_rows
from jaxcl.evaluation.held_out import quick_metric_names
from jaxcl.evaluation.protocol import Encode, EvaluationSet, check_inputs_of_set, side_of
from jaxcl.evaluation.sets import open_set
from jaxcl.host.paths import as_path
from jaxcl.host.processes import together
from jaxcl.run.encoder import Encoder
from jaxcl.settings.section_reader import did_you_mean
from jaxcl.settings.sections import Settings
from jaxcl.typing import SIDES, Float

__all__ = ["TrainingSets", "check_best_metric", "open_sets", "sets_table"]


class TrainingSets:
    """The evaluation sets of a run.

    Args:
      sets: name -> set.
      modality: side -> the modality of the run.

    Attributes:
      fingerprints: name -> the fingerprint of the set.
      metrics: the names of the metrics, as in `scores`; for all of them, higher is better.
      descriptions: for each set, a line that describes how its data were read, and their sizes.
    """

    def __init__(
        self,
        sets: Mapping[str, EvaluationSet],
        modality: Mapping[str, str] = MappingProxyType(dict.fromkeys(SIDES, "text")),
    ):
        self._sets, self._modality = dict(sets), dict(modality)
        self._latest: tuple[int, dict[str, dict[str, int | float]]] | None = None
        self.fingerprints = {name: one.fingerprint for name, one in sets.items()}
        self.descriptions = [f"{name}: {one.description}" for name, one in sets.items()]
        self.metrics = [f"{name}/{metric}" for name, one in sets.items() for metric in one.metrics]

    def with_rows(self, settings: Settings, sources: Mapping[str, PairSource]) -> "TrainingSets":
        """Add the sets of the run's own rows, which `evaluation.sets` names as `split:ROLE`.

        Raises:
          ValueError: if the rows cannot be classified; the message names the set.
        """
        modality = settings.data.modality._asdict()
        named = settings.evaluation.sets
        of_rows = _training_sets(
            settings,
            {name: one for name, one in named.items() if names_rows(one)},
            lambda name: open_rows(name, sources, modality=modality),
        )
        both = self._sets | of_rows._sets
        return TrainingSets({name: both[name] for name in named}, self._modality)

    def check_unchanged(self, record: Mapping[str, Any]) -> None:
        """Raise a `ValueError` if a set differs from the one that a checkpoint's record names."""
        recorded = record.get("sets", {})
        for name, fingerprint in self.fingerprints.items():
            if recorded.get(name, fingerprint) != fingerprint:
                raise ValueError(
                    f"the evaluation set {name} has changed since step {record.get('step')} of "
                    "this run, so that its earlier metrics cannot be compared with new ones; "
                    "restore it, or give it another name in evaluation.sets"
                )

    def scores(self, step: int, encoder: Encoder) -> dict[str, float]:
        """Evaluate the model of a step on every set; every process must call this.

        Returns:
          A mapping from `NAME/metric` to its value. It includes the sizes on which metrics depend,
          such as the number of documents. Values that are not finite, such as the correlation with
          a constant, are omitted.
        """
        return {
            f"{name}/{metric}": float(value)
            for name, values in self._values(step, encoder).items()
            for metric, value in values.items()
            if math.isfinite(value)
        }

    def summary(self, step: int, encoder: Encoder) -> dict[str, dict[str, Any]]:
        """The values of each set, with its kind and fingerprint; every process must call this."""
        return {
            name: {
                "kind": self._sets[name].kind,
                "fingerprint": self.fingerprints[name],
                "metrics": values,
            }
            for name, values in self._values(step, encoder).items()
        }

    def _values(self, step: int, encoder: Encoder) -> dict[str, dict[str, int | float]]:
        # Cached: the last step is evaluated in the loop and after it, and encoding takes long.
        if self._latest is None or self._latest[0] != step:
            encode = functools.partial(_encode, encoder, self._modality)
            values = {name: _values(name, one, encode) for name, one in self._sets.items()}
            self._latest = step, values
        return self._latest[1]


def _encode(
    encoder: Encoder, modality: Mapping[str, str], inputs: str, values: Sequence[Any]
) -> Float[np.ndarray, "n d"]:
    with naming_damaged(values):
        return encoder.encode(side_of(inputs, modality), values)


def _values(name: str, opened: EvaluationSet, encode: Encode) -> dict[str, int | float]:
    try:
        return dict(opened.evaluate(encode))
    except ValueError as error:
        raise ValueError(f"the evaluation set {name} cannot be evaluated: {error}") from error


def open_sets(settings: Settings) -> TrainingSets:
    """Open and check the sets in `evaluation.sets`, without sets of the run's own rows.

    Raises:
      ValueError: if a path is not an evaluation set; the message names the set.
    """
    paths = {name: path for name, path in settings.evaluation.sets.items() if not names_rows(path)}
    return _training_sets(settings, paths, lambda path: open_set(as_path(path)))


def _training_sets(
    settings: Settings, named: Mapping[str, str], open_one: Callable[[str], EvaluationSet]
) -> TrainingSets:
    modality = settings.data.modality._asdict()

    def opened() -> dict[str, EvaluationSet]:
        sets = {}
        for name, value in named.items():
            try:
                sets[name] = open_one(value)
                check_inputs_of_set(sets[name], modality)
            except (OSError, ValueError) as error:
                raise ValueError(f"evaluation.sets.{name}={value}: {error}") from error
        return sets

    return TrainingSets(together(opened), modality)


def check_best_metric(settings: Settings, sets: TrainingSets, data: RunData) -> None:
    """Raise a `ValueError` if `evaluation.best_metric` is not a metric of the run's evaluations."""
    metric = settings.evaluation.best_metric
    known = [*quick_metric_names(data), *sets.metrics]
    if metric is not None and metric not in known:
        listed = ", ".join(known) or "none: add a validation split or evaluation.sets"
        raise ValueError(
            f"evaluation.best_metric={metric!r} is unknown{did_you_mean(metric, known)}; the "
            f"metrics of this run are {listed}"
        )


def sets_table(summaries: Mapping[str, Mapping[str, Any]]) -> Table:
    """A table of the summaries that `TrainingSets.summary` returns."""
    table = Table("evaluation set", "kind", "metric", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("value", justify="right", no_wrap=True)
    for name, summary in summaries.items():
        for metric, value in summary["metrics"].items():
            text = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
            table.add_row(name, summary["kind"], metric, text)
    return table
