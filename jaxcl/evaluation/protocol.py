"""The type of an evaluation set, which scores a model's embeddings on a user's own data."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from jaxcl.evaluation.differences import Difference
from jaxcl.typing import SIDES, Float

__all__ = ["ComparableSet", "Encode", "EvaluationSet", "check_inputs_of_set", "side_of"]

Encode: TypeAlias = Callable[[str, Sequence[Any]], Float[np.ndarray, "n d"]]
"""`(inputs, values) -> vectors`, one per value. Inner products of the vectors are the model's
similarities, or rank values in the same order. For texts, `inputs` is the side, `"query"` or
`"key"`. For other values, or a set that works with either side, it is a modality, such as
`"image"`: the first side with this modality embeds the values. With several processes, each process
must make the call with the same values, and gets all vectors."""


@runtime_checkable
class EvaluationSet(Protocol):
    """Texts or images with labels or scores, opened by `jaxcl.evaluation.sets.open_set`.

    Attributes:
      kind: a key of `jaxcl.evaluation.sets.KINDS`, such as `"retrieval"`.
      fingerprint: a digest that is equal for equal content and labels.
      metrics: the names of the metrics in the result of `evaluate`, the main one first; for all of
        them, higher is better.
      inputs: the first arguments with which the set calls `encode`, such as `("image", "text")`.
    """

    kind: str
    fingerprint: str
    metrics: tuple[str, ...]
    inputs: tuple[str, ...]

    def evaluate(self, encode: Encode) -> Mapping[str, float]:
        """Score the embeddings of a model.

        With several processes, each process must call this method, and gets the same values.

        Args:
          encode: embeds the values.

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
class ComparableSet(EvaluationSet, Protocol):
    """A set on which two models can be compared.

    Attributes:
      unit: what is measured, and paired between two models, such as `"pairs"` or `"images"`.
    """

    unit: str

    def measure(self, encode: Encode) -> Any:
        """Compute the inputs of the metrics for a model, such as the similarity of each pair."""
        ...

    def figures(self, measured: Any) -> Mapping[str, float]:
        """Compute the result of `evaluate` from what `measure` returned."""
        ...

    def differences(self, measured: Any, baseline: Any) -> Mapping[str, Difference]:
        """Map each metric to its difference between two models, from the results of `measure`."""
        ...


def side_of(inputs: str, modality: Mapping[str, str]) -> str:
    """The side of a model that embeds some inputs.

    Args:
      inputs: a side, or a modality.
      modality: side -> the modality of the model.

    Raises:
      ValueError: if no side has the modality.

    Example:
      >>> side_of("text", {"query": "image", "key": "text"})
      'key'
    """
    if inputs in SIDES:
        return inputs
    for side in SIDES:
        if modality[side] == inputs:
            return side
    raise ValueError(
        f"no side of the model embeds the modality {inputs!r}: its queries are "
        f"{modality['query']!r}, its keys {modality['key']!r}"
    )


def check_inputs_of_set(data_set: EvaluationSet, modality: Mapping[str, str]) -> None:
    """Raise a `ValueError` if a model cannot embed the values of a set.

    Args:
      data_set: the set; it calls `encode` with a side only for texts.
      modality: side -> the modality of the model.
    """
    for inputs in data_set.inputs:
        side = side_of(inputs, modality)
        if inputs in SIDES and modality[side] != "text":
            raise ValueError(
                f"a set of the kind {data_set.kind!r} has texts of side {inputs}, but the model's "
                f"side {inputs} has the modality {modality[side]!r}"
            )
