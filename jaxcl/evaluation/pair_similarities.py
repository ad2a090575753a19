"""The similarities that a model gives to pairs of texts, and sets of such pairs."""

from collections.abc import Callable
from typing import TypeAlias, TypeVar

import numpy as np

from jaxcl.data.scored_pairs import ScoredPairs, read_scored_pairs
from jaxcl.evaluation.bootstrap import bootstrap_interval
from jaxcl.evaluation.differences import Difference, bootstrap_difference
from jaxcl.evaluation.protocol import Encode
from jaxcl.host.paths import AnyPath
from jaxcl.typing import Float, Int

__all__ = ["OfResamples", "SimilaritySet", "open_pairs", "pair_similarities"]

OfResamples: TypeAlias = Callable[[Int[np.ndarray, "r n"]], Float[np.ndarray, " r"]]
"""`counts -> values`: a metric in each resample, which contains pair i `counts[:, i]` times."""

S = TypeVar("S", bound="SimilaritySet")


class SimilaritySet:
    """Pairs of texts with scores, whose metrics depend on a model's similarities.

    A subclass defines `description`, `figures` and `statistic`, and is an `EvaluationSet`.

    Attributes:
      metrics: the names of the metrics, the main one first.
      pairs: the pairs.
      fingerprint: a digest of the pairs.
      inputs: the sides on which the texts are embedded.
    """

    unit = "pairs"
    metrics: tuple[str, ...]

    def __init__(self, pairs: ScoredPairs, *, num_resamples: int = 1000, seed: int = 0) -> None:
        """Check the scores of the pairs.

        Args:
          pairs: at least two pairs with different scores.
          num_resamples: the number of resamples of the bootstrap intervals.
          seed: the seed of the resamples.

        Raises:
          ValueError: for scores that the set does not accept.
        """
        self.check(pairs.scores)
        self.pairs = pairs
        self.fingerprint = pairs.fingerprint
        self.inputs = tuple(dict.fromkeys(pairs.sides))
        self._resamples = {"num_resamples": num_resamples, "seed": seed}

    def check(self, scores: Float[np.ndarray, " n"]) -> None:
        """Raise a `ValueError` for scores that the set does not accept."""
        raise NotImplementedError

    def statistic(self, name: str, similarities: Float[np.ndarray, " n"]) -> OfResamples:
        """A metric as a function of the resamples of the pairs."""
        raise NotImplementedError

    def figures(self, similarities: Float[np.ndarray, " n"]) -> dict[str, float]:
        """Compute the metrics from the similarities of the pairs."""
        raise NotImplementedError

    def evaluate(self, encode: Encode) -> dict[str, float]:
        """Compute a model's `figures`; raises a `ValueError` for an embedding that is not finite.

        Args:
          encode: embeds the texts.
        """
        return self.figures(self.measure(encode))

    def measure(self, encode: Encode) -> Float[np.ndarray, " n"]:
        """Compute the model's similarity of each pair."""
        return pair_similarities(self.pairs, encode)

    def with_interval(self, name: str, similarities: Float[np.ndarray, " n"]) -> dict[str, float]:
        """A metric, and the ends of its 95% bootstrap interval."""
        statistic = self.statistic(name, similarities)
        (value,) = statistic(np.ones((1, len(similarities)), np.int64))
        low, high = bootstrap_interval(statistic, len(similarities), **self._resamples)
        return {name: float(value), f"{name}_low": low, f"{name}_high": high}

    def differences(
        self, similarities: Float[np.ndarray, " n"], baseline: Float[np.ndarray, " n"]
    ) -> dict[str, Difference]:
        """The difference of each metric between two models, given their similarities."""
        return {
            name: bootstrap_difference(
                self.statistic(name, similarities),
                self.statistic(name, baseline),
                len(similarities),
                **self._resamples,
            )
            for name in self.metrics
        }


def open_pairs(kind: type[S], path: AnyPath) -> S:
    """Read a file of pairs with scores.

    Raises:
      ValueError: as for `read_scored_pairs`, or for scores that the set does not accept.
      OSError: if the file cannot be read.
    """
    pairs = read_scored_pairs(path)
    try:
        return kind(pairs)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def pair_similarities(pairs: ScoredPairs, encode: Encode) -> Float[np.ndarray, " n"]:
    """Compute the inner product of the embeddings of each pair.

    Args:
      pairs: the pairs of texts, with the side that embeds each of the two.
      encode: embeds the texts.

    Returns:
      Similarities in float32, summed in float64, so that equal pairs have equal similarities.

    Raises:
      ValueError: if an embedding is not finite.
    """
    first_side, second_side = pairs.sides
    if first_side == second_side:
        # In one call, so that a text that occurs in both columns is embedded once.
        vectors = encode(first_side, [*pairs.first, *pairs.second])
        first, second = vectors[: len(pairs.first)], vectors[len(pairs.first) :]
    else:
        first, second = encode(first_side, pairs.first), encode(second_side, pairs.second)
    similarities = np.einsum("nd,nd->n", first, second, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(similarities))
    if bad.size:
        raise ValueError(
            f"{bad.size} of {len(similarities)} pairs have a similarity that is not finite, first "
            f"pair {bad[0] + 1}; look for NaN in the model's parameters"
        )
    return similarities.astype(np.float32)
