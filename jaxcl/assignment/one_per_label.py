"""One row of each label per epoch, such as one caption of each image."""

import operator
from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np

from jaxcl.assignment.uniform import fold_in, permuted, uniform_rows
from jaxcl.ops.arguments import as_integers
from jaxcl.typing import Int

__all__ = ["OnePerLabel"]


class OnePerLabel:
    """The rows of each batch, with one row of each label per epoch: `OnePerLabel(labels, …)(step)`.

    The labels follow each other in random order, as the rows of `uniform_rows` do. A label with c
    rows uses each of them once in c epochs, in random order, and then again in another order.
    The rows depend only on the arguments and the step.

    Args:
      labels: the label of each row; for example, the captions of an image share a label.
      batch_size: rows of a batch, over all devices and hosts.
      seed: determines the order.

    Raises:
      ValueError: if there are no rows, or the batch size is below 1.

    Example:
      >>> rows = OnePerLabel([5, 5, 7], batch_size=2, seed=0)
      >>> rows.num_labels
      2
      >>> two_epochs = np.concatenate([rows(0), rows(1)])
      >>> sorted(two_epochs.tolist())
      [0, 1, 2, 2]
    """

    def __init__(
        self,
        labels: Int[np.ndarray, " n"] | Sequence[int],
        *,
        batch_size: SupportsIndex,
        seed: SupportsIndex,
    ) -> None:
        labels = as_integers("labels", labels)
        self._batch_size, self._seed = operator.index(batch_size), operator.index(seed)
        if self._batch_size < 1 or not labels.size:
            raise ValueError(f"batch_size={batch_size} and rows={labels.size} must be at least 1")
        self._sizes = np.unique(labels, return_counts=True)[1]
        self._first = np.cumsum(self._sizes) - self._sizes
        self._by_label = np.argsort(labels, kind="stable").astype(np.int32)

    @property
    def num_labels(self) -> int:
        """The number of rows of an epoch."""
        return len(self._sizes)

    def __call__(self, step: SupportsIndex) -> Int[np.ndarray, " b"]:
        """The rows of a step's batch."""
        step, count = operator.index(step), self.num_labels
        label = uniform_rows(step, num_rows=count, batch_size=self._batch_size, seed=self._seed)
        position = step * self._batch_size + np.arange(self._batch_size, dtype=np.uint64)
        sizes = self._sizes[label].astype(np.uint64)
        round_, turn = np.divmod(position // np.uint64(count), sizes)
        # A different number for each (label, round), since labels of equal size would otherwise
        # take the same turns.
        number = round_ * np.uint64(count) + label.astype(np.uint64)
        nth = permuted(turn, number, num_rows=sizes, seed=fold_in(self._seed, 1))
        return self._by_label[self._first[label] + nth.astype(np.int64)]
