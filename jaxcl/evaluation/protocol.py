"""The type of an evaluation set: what scores the embeddings of a model on a user's own data."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np

from jaxcl.typing import Float

__all__ = ["Encode", "EvaluationSet"]

Encode: TypeAlias = Callable[[str, Sequence[str]], Float[np.ndarray, "n d"]]
"""`(side, texts) -> vectors`, one per text, whose inner products are the model's similarities or
rank texts as they do. The side is `"query"` or `"key"`. With several processes, each calls it with
the same texts and gets all vectors."""


@runtime_checkable
class EvaluationSet(Protocol):
    """Texts with judgements, opened by `jaxcl.evaluation.sets.open_set`.

    Attributes:
      kind: a key of `jaxcl.evaluation.sets.KINDS`, such as `"retrieval"`.
      fingerprint: equal for equal texts and judgements.
      metrics: the names in the result of `evaluate` of the values that are better when they are
        higher, the main one first.
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
          Name of a metric -> value, such as `"ndcg@10"`; and the sizes on which the values depend,
          such as `"documents"`. A value without a meaning, such as the correlation with a constant,
          is NaN.
        """
        ...

    @property
    def description(self) -> str:
        """How the data were read and how many there are, on one line."""
        ...
