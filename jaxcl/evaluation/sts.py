"""Semantic textual similarity: do the similarities of a model agree with human scores?

Both texts are embedded as queries, with the query prompt, unless the field names show that the
second text is a document. The evaluators of sentence-transformers use the default prompt instead,
so results differ for a model with a prompt for queries.

When not to trust it: a score is the mean similarity of two sentences over annotators, and a model
that predicts it well need not be good at retrieval. Correlations on sets with different ranges of
scores cannot be compared. Intervals treat the pairs as independent; if many pairs share a sentence,
correlations vary more than the intervals suggest.
"""

import numpy as np

from jaxcl.evaluation.correlation import pearson_of_resamples, spearman_of_resamples
from jaxcl.evaluation.pair_similarities import OfResamples, SimilaritySet, open_pairs
from jaxcl.host.paths import AnyPath
from jaxcl.typing import Float

__all__ = ["StsSet", "open_sts_set"]

_CORRELATIONS = {"spearman": spearman_of_resamples, "pearson": pearson_of_resamples}
_NOISE = 8 * float(np.finfo(np.float32).eps)
"""Differences of similarities below this share of the largest similarity are rounding errors."""


class StsSet(SimilaritySet):
    """Pairs of texts with scores, an `EvaluationSet`; a higher score means more similar."""

    kind = "sts"
    metrics: tuple[str, ...] = tuple(_CORRELATIONS)

    def check(self, scores: Float[np.ndarray, " n"]) -> None:
        """Raise a `ValueError` if all scores are equal."""
        if len(scores) < 2 or scores.min() == scores.max():
            raise ValueError(
                f"{len(scores)} pairs with scores from {scores.min(initial=np.inf):g} to "
                f"{scores.max(initial=-np.inf):g} have no correlation; give pairs with different "
                "scores"
            )

    @property
    def description(self) -> str:
        """How the file was read."""
        first, second, score = self.pairs.fields
        low, high = self.pairs.scores.min(), self.pairs.scores.max()
        return (
            f"semantic similarity of {len(self.pairs.scores):,} pairs ({first}, {second}), with "
            f"scores ({score}) from {low:g} to {high:g}"
        )

    def figures(self, similarities: Float[np.ndarray, " n"]) -> dict[str, float]:
        """Compute the correlations between the model's similarities and the scores.

        Returns:
          `spearman` and `pearson` from -1 to 1, the ends of their 95% bootstrap intervals
          (`spearman_low`, `spearman_high` and so on), and `pairs`, the number of pairs.
          Correlations are NaN if all similarities are equal up to rounding.
        """
        figures: dict[str, float] = {}
        for name in self.metrics:
            figures |= self.with_interval(name, similarities)
        return {**figures, "pairs": len(similarities)}

    def statistic(self, name: str, similarities: Float[np.ndarray, " n"]) -> OfResamples:
        """A correlation in resamples; NaN if all similarities are equal up to rounding."""
        if np.ptp(similarities) <= _NOISE * np.abs(similarities).max():
            return lambda counts: np.full(len(counts), np.nan)
        return lambda counts: _CORRELATIONS[name](similarities, self.pairs.scores, counts)


def open_sts_set(path: AnyPath) -> StsSet:
    """Read a file of pairs with scores; raises the same errors as `open_pairs`."""
    return open_pairs(StsSet, path)
