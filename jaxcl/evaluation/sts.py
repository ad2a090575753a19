"""Semantic textual similarity: do the similarities of a model agree with human scores?

Both texts are embedded as queries, with the query prompt, unless the field names show that the
second text is a document. The evaluators of sentence-transformers use the default prompt instead,
so results differ for a model with a prompt for queries.

When not to trust it: a score is the mean similarity of two sentences over annotators, and a model
that predicts it well need not be good at retrieval. Correlations on sets with different ranges of
scores cannot be compared. Intervals treat the pairs as independent; if many pairs share a sentence,
correlations vary more than the intervals suggest.
"""

from collections.abc import Callable

import numpy as np

from jaxcl.data.scored_pairs import ScoredPairs, read_scored_pairs
from jaxcl.evaluation.bootstrap import bootstrap_interval
from jaxcl.evaluation.correlation import pearson_of_resamples, spearman_of_resamples
from jaxcl.evaluation.differences import Difference, bootstrap_difference
from jaxcl.evaluation.pair_similarities import pair_similarities
from jaxcl.evaluation.protocol import Encode
from jaxcl.host.paths import AnyPath
from jaxcl.typing import Float, Int

__all__ = ["StsSet", "open_sts_set"]

_CORRELATIONS = {"spearman": spearman_of_resamples, "pearson": pearson_of_resamples}
_NOISE = 8 * float(np.finfo(np.float32).eps)
"""Differences of similarities below this share of the largest are rounding errors."""


class StsSet:
    """Pairs of texts with scores, an `EvaluationSet`.

    Attributes:
      kind: `"sts"`.
      metrics: `"spearman"` and `"pearson"`.
      pairs: the pairs.
      fingerprint: of the pairs.
      inputs: the sides of the texts.
    """

    kind = "sts"
    unit = "pairs"
    metrics: tuple[str, ...] = tuple(_CORRELATIONS)

    def __init__(self, pairs: ScoredPairs, *, num_resamples: int = 1000, seed: int = 0) -> None:
        """Check the scores of pairs of texts.

        Args:
          pairs: at least two pairs with different scores; a higher score means more similar.
          num_resamples: the number of resamples of the bootstrap intervals.
          seed: the seed of the resamples.

        Raises:
          ValueError: if all scores are equal.
        """
        scores = pairs.scores
        if len(scores) < 2 or scores.min() == scores.max():
            raise ValueError(
                f"{len(scores)} pairs with scores from {scores.min(initial=np.inf):g} to "
                f"{scores.max(initial=-np.inf):g} have no correlation; give pairs with different "
                "scores"
            )
        self.pairs = pairs
        self.fingerprint = pairs.fingerprint
        self.inputs = tuple(dict.fromkeys(pairs.sides))
        self._num_resamples = num_resamples
        self._seed = seed

    @property
    def description(self) -> str:
        """How the file was read."""
        first, second, score = self.pairs.fields
        low, high = self.pairs.scores.min(), self.pairs.scores.max()
        return (
            f"semantic similarity of {len(self.pairs.scores):,} pairs ({first}, {second}), with "
            f"scores ({score}) from {low:g} to {high:g}"
        )

    def evaluate(self, encode: Encode) -> dict[str, float]:
        """Compute the correlation between the model's similarities and the scores.

        Args:
          encode: embeds the texts.

        Returns:
          `spearman` and `pearson` from -1 to 1, the ends of their 95% bootstrap intervals
          (`spearman_low`, `spearman_high` and so on), and `pairs`, the number of pairs.
          Correlations are NaN if all similarities are equal up to rounding.

        Raises:
          ValueError: if an embedding is not finite.
        """
        return self.figures(self.measure(encode))

    def measure(self, encode: Encode) -> Float[np.ndarray, " n"]:
        """Compute the model's similarity of each pair."""
        return pair_similarities(self.pairs, encode)

    def figures(self, similarities: Float[np.ndarray, " n"]) -> dict[str, float]:
        """Compute the metrics of `evaluate` from the similarities of the pairs."""
        figures: dict[str, float] = {}
        for name in _CORRELATIONS:
            statistic = self._statistic(name, similarities)
            (value,) = statistic(np.ones((1, len(similarities)), np.int64))
            low, high = bootstrap_interval(
                statistic, len(similarities), num_resamples=self._num_resamples, seed=self._seed
            )
            figures |= {name: float(value), f"{name}_low": low, f"{name}_high": high}
        return {**figures, "pairs": len(similarities)}

    def differences(
        self, similarities: Float[np.ndarray, " n"], baseline: Float[np.ndarray, " n"]
    ) -> dict[str, Difference]:
        """The difference of each correlation between two models, given their similarities."""
        return {
            name: bootstrap_difference(
                self._statistic(name, similarities),
                self._statistic(name, baseline),
                len(similarities),
                num_resamples=self._num_resamples,
                seed=self._seed,
            )
            for name in _CORRELATIONS
        }

    def _statistic(
        self, name: str, similarities: Float[np.ndarray, " n"]
    ) -> Callable[[Int[np.ndarray, "r n"]], Float[np.ndarray, " r"]]:
        """A correlation in resamples; NaN if all similarities are equal up to rounding."""
        if np.ptp(similarities) <= _NOISE * np.abs(similarities).max():
            return lambda counts: np.full(len(counts), np.nan)
        return lambda counts: _CORRELATIONS[name](similarities, self.pairs.scores, counts)


def open_sts_set(path: AnyPath) -> StsSet:
    """Read a file of pairs with scores.

    Raises:
      ValueError: as for `read_scored_pairs`, or if all scores are equal.
      OSError: if the file cannot be read.
    """
    pairs = read_scored_pairs(path)
    try:
        return StsSet(pairs)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
