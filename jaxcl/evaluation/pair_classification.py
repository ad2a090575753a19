"""Pair classification: do a model's similarities separate positive pairs from negative ones?

When not to trust it: thresholds are chosen on the pairs that they are evaluated on, so `f1` and
`accuracy` are the best over all thresholds, and too optimistic on small sets. Average precision
needs no threshold. All three depend on the share of positives, so sets with different shares cannot
be compared.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from jaxcl.data.scored_pairs import read_scored_pairs
from jaxcl.data.text_files import is_text_file
from jaxcl.evaluation.pair_similarities import OfResamples, SimilaritySet, open_pairs
from jaxcl.host.paths import AnyPath
from jaxcl.typing import Bool, Float, Int

__all__ = [
    "PairSet",
    "best_accuracy",
    "best_f1",
    "has_labels",
    "metric_of_resamples",
    "open_pair_set",
]


_ByThreshold = Int[np.ndarray, "r _"]  # numbers of pairs at or above each distinct similarity
_ByResample = Float[np.ndarray, " r"]


class PairSet(SimilaritySet):
    """Pairs of texts with the labels 1 (positive) and 0 (negative), an `EvaluationSet`."""

    kind = "pairs"
    metrics: tuple[str, ...] = ("average_precision", "f1", "accuracy")

    def check(self, scores: Float[np.ndarray, " n"]) -> None:
        """Raise a `ValueError` for labels other than 0 and 1, or if all are equal."""
        labels = np.unique(scores)
        if labels.tolist() != [0, 1]:
            first = ", ".join(f"{label:g}" for label in labels[:5])
            raise ValueError(
                f"the labels of {len(scores)} pairs are {first or 'none'}"
                f"{', …' if len(labels) > 5 else ''}; pair classification needs both 0 and 1, and "
                "no others"
            )

    @property
    def description(self) -> str:
        """How the file was read."""
        first, second, label = self.pairs.fields
        count, positives = len(self.pairs.scores), int(self.pairs.scores.sum())
        return (
            f"classification of {count:,} pairs ({first}, {second}), {positives:,} of them "
            f"positive; all labels ({label}) are 0 or 1, so they are labels, not scores"
        )

    def figures(self, similarities: Float[np.ndarray, " n"]) -> dict[str, float]:
        """Classify the pairs by the similarities of a model.

        Returns:
          `average_precision`, with the ends of its 95% bootstrap interval,
          `average_precision_low` and `average_precision_high`; `f1` and `accuracy` at their best
          thresholds, `f1_threshold` and `accuracy_threshold`, at or above which a pair is predicted
          to be positive; and the numbers of `pairs` and of `positives`.
        """
        labels = self.pairs.scores == 1
        f1, f1_threshold = best_f1(similarities, labels)
        accuracy, accuracy_threshold = best_accuracy(similarities, labels)
        return {
            **self.with_interval("average_precision", similarities),
            "f1": f1,
            "f1_threshold": f1_threshold,
            "accuracy": accuracy,
            "accuracy_threshold": accuracy_threshold,
            "pairs": len(labels),
            "positives": int(labels.sum()),
        }

    def statistic(self, name: str, similarities: Float[np.ndarray, " n"]) -> OfResamples:
        """A metric in resamples, each with the threshold that is best in that resample."""
        return partial(metric_of_resamples, name, similarities, self.pairs.scores == 1)


def has_labels(path: AnyPath) -> bool:
    """Whether a path is a file of pairs whose scores are all 0 or 1.

    Raises:
      ValueError: as for `read_scored_pairs`.
      OSError: if the file cannot be read.
    """
    return is_text_file(path) and bool(np.isin(read_scored_pairs(path).scores, (0, 1)).all())


def open_pair_set(path: AnyPath) -> PairSet:
    """Read a file of pairs with labels; raises the same errors as `open_pairs`."""
    return open_pairs(PairSet, path)


def metric_of_resamples(
    name: str,
    similarities: Float[np.ndarray, " n"],
    labels: Bool[np.ndarray, " n"],
    counts: Int[np.ndarray, "r n"],
) -> Float[np.ndarray, " r"]:
    r"""A metric of each resample, which contains pair i `counts[:, i]` times.

    $$\mathrm{AP} = \sum_t (R_t - R_{t-1}) P_t$$

    over the distinct similarities t in descending order, with precision $P_t$ and recall $R_t$ of
    the pairs whose similarity is at least t. Pairs with equal similarities are thus added together,
    and if all similarities are equal, AP is the share of positives.

    Args:
      name: `"average_precision"`; or `"f1"` or `"accuracy"`, each at the threshold that is best in
        the resample (`best_f1`, `best_accuracy`).
      similarities: finite similarities; higher for pairs that are more likely positive.
      labels: whether each pair is positive.
      counts: the count of each pair in each resample; all 1 for the original pairs.

    Returns:
      Numbers from 0 to 1; NaN for average precision and F1 without a positive pair.

    Example:
      >>> similarities, labels = np.array([0.9, 0.8, 0.7]), np.array([True, False, True])
      >>> counts = np.array([[1, 1, 1], [2, 1, 0]])
      >>> metric_of_resamples("average_precision", similarities, labels, counts).round(3).tolist()
      [0.833, 1.0]
    """
    order, starts = _distinct(similarities)
    positives = np.add.reduceat(counts[:, order] * labels[order], starts, axis=1)
    pairs = np.add.reduceat(counts[:, order], starts, axis=1)
    return _OF_RESAMPLES[name](np.cumsum(positives, axis=1), np.cumsum(pairs, axis=1))


def _average_precision(true_positives: _ByThreshold, predicted: _ByThreshold) -> _ByResample:
    precision = true_positives / np.maximum(predicted, 1)
    total = true_positives[:, -1]
    positives = np.diff(true_positives, axis=1, prepend=0)
    return np.where(total, (positives * precision).sum(1) / np.maximum(total, 1), np.nan)


def _f1(true_positives: _ByThreshold, predicted: _ByThreshold) -> _ByResample:
    total = true_positives[:, -1:]
    f1 = 2 * true_positives / np.maximum(predicted + total, 1)
    return np.where(total[:, 0], f1.max(1), np.nan)


def _accuracy(true_positives: _ByThreshold, predicted: _ByThreshold) -> _ByResample:
    gains = 2 * true_positives - predicted  # compared with calling every pair negative
    negatives = predicted[:, -1] - true_positives[:, -1]
    return (negatives + np.maximum(gains.max(1), 0)) / predicted[:, -1]


_OF_RESAMPLES: dict[str, Callable[[_ByThreshold, _ByThreshold], _ByResample]] = {
    "average_precision": _average_precision,
    "f1": _f1,
    "accuracy": _accuracy,
}


def best_f1(
    similarities: Float[np.ndarray, " n"], labels: Bool[np.ndarray, " n"]
) -> tuple[float, float]:
    """The highest harmonic mean of precision and recall at any threshold.

    Args:
      similarities: the similarity of each pair; all are finite.
      labels: whether each pair is positive; at least one is.

    Returns:
      The F1 score and the highest threshold that reaches it, halfway between two similarities.

    Example:
      >>> best_f1(np.array([0.75, 0.5, 0.25]), np.array([True, True, False]))
      (1.0, 0.375)
    """
    thresholds, true_positives, predicted = _thresholds(similarities, labels)
    return _best(2 * true_positives / (predicted + labels.sum()), thresholds)


def best_accuracy(
    similarities: Float[np.ndarray, " n"], labels: Bool[np.ndarray, " n"]
) -> tuple[float, float]:
    """The highest share of pairs that any threshold classifies correctly.

    Arguments and return values are as for `best_f1`. The highest threshold predicts every pair as
    negative.

    Example:
      >>> best_accuracy(np.array([0.75, 0.5, 0.25]), np.array([True, False, False]))
      (1.0, 0.625)
    """
    thresholds, true_positives, predicted = _thresholds(similarities, labels)
    true_negatives = (~labels).sum() - (predicted - true_positives)
    return _best((true_positives + true_negatives) / len(labels), thresholds)


def _best(scores: np.ndarray, thresholds: np.ndarray) -> tuple[float, float]:
    best = int(scores.argmax())
    return float(scores[best]), float(thresholds[best])


def _distinct(similarities: Float[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
    """The rows by descending similarity, and the start of each distinct similarity among them."""
    order = np.argsort(-similarities, kind="stable")
    starts = np.flatnonzero(np.diff(similarities[order], prepend=np.inf))
    return order, starts


def _thresholds(
    similarities: Float[np.ndarray, " n"], labels: Bool[np.ndarray, " n"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All distinct thresholds, descending, and the true and the predicted positives of each."""
    order, starts = _distinct(similarities)
    ends = np.append(starts, len(labels))
    true_positives = np.insert(np.cumsum(labels[order]), 0, 0)[ends]
    values = similarities[order][starts].astype(np.float64)
    above = np.nextafter(np.float32(values[0]), np.float32(np.inf))
    halfway = (values[:-1] + values[1:]) / 2
    return np.array([above, *halfway, values[-1]]), true_positives, ends
