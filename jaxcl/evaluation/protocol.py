"""The type of an evaluation set, which scores a model's embeddings on a user's own data."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np

from jaxcl.evaluation.differences import Difference
from jaxcl.typing import Float

__all__ = ["Encode", "EvaluationSet", "SimilaritySet"]

Encode: TypeAlias = Callable[[str, Sequence[str]], Float[np.ndarray, "n d"]]
"""`(side, texts) -> vectors`, one per text. Their inner products are the model's similarities, or
order texts in the same way. The side is `"query"` or `"key"`. With several processes, each must
call it with the same texts, and gets all vectors."""


@runtime_checkable
class EvaluationSet(Protocol):
    """Texts with labels or scores, opened by `jaxcl.evaluation.sets.open_set`.

    Attributes:
      kind: a key of `jaxcl.evaluation.sets.KINDS`, such as `"retrieval"`.
      fingerprint: equal for equal texts and labels.
      metrics: the names of the metrics in the result of `evaluate`, the main one first; all are
        better when they are higher.
    """

    kind: str
    fingerprint: str
    metrics: tuple[str, ...]

    def evaluate(self, encode: Encode) -> Mapping[str, float]:
        """Score the embeddings of a model.

        With several processes, each must call this, and gets the same values.

        Args:
          encode: embeds the texts.

        Returns:
          Name -> value, for metrics such as `"ndcg@10"` and for the sizes that they depend on, such
          as `"documents"`. An undefined value, such as the correlation with a constant, is NaN.
        """
        ...

    @property
    def description(self) -> str:
        """A one-line description of how the data were read, with their sizes."""
        ...


@runtime_checkable
class SimilaritySet(EvaluationSet, Protocol):
    """A set of pairs of texts, whose metrics depend only on the similarity of each pair.

    Two models can be compared on it.
    """

    def similarities(self, encode: Encode) -> Float[np.ndarray, " n"]:
        """The similarities that a model gives to the pairs."""
        ...

    def figures(self, similarities: Float[np.ndarray, " n"]) -> Mapping[str, float]:
        """Compute the metrics of `evaluate` from the similarities of the pairs."""
        ...

    def differences(
        self, similarities: Float[np.ndarray, " n"], baseline: Float[np.ndarray, " n"]
    ) -> Mapping[str, Difference]:
        """Name of a metric -> its difference between two models, given their similarities."""
        ...
