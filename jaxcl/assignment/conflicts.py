"""Conflicts, that is, rows with equal labels in one batch, and swaps that remove them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxcl.assignment.uniform import fold_in, permuted
from jaxcl.ops.arguments import as_integers
from jaxcl.typing import Bool, Int

__all__ = ["batches_of", "count_conflicts", "remove_conflicts"]

_MAX_ROUNDS = 100
_TRIES = 2**14


def count_conflicts(
    rows: Int[np.ndarray, " _"],
    labels: Int[np.ndarray, " n"],
    *,
    batch_size: int,
    first_position: int = 0,
) -> int:
    """Count the rows that have the same label as an earlier row of their batch.

    Args:
      rows: the rows at consecutive positions.
      labels: the label of each row of the data set.
      batch_size: rows of a batch, over all devices and hosts.
      first_position: the position of the first row, counted from the start of the run.
    """
    # Renumbered, since NumPy would stack int64 and uint64 labels as floats.
    numbers = np.unique(as_integers("labels", labels), return_inverse=True)[1]
    pairs = np.stack([batches_of(len(rows), first_position, batch_size), numbers[rows]], 1)
    return len(rows) - len(np.unique(pairs, axis=0))


def remove_conflicts(
    rows: Int[np.ndarray, " n"],
    keep_apart: Sequence[np.ndarray],
    batch: Int[np.ndarray, " n"],
    *,
    seed: int,
) -> None:
    """Swap rows in place to remove conflicts, for at most 100 rounds.

    In a round, each conflicting row tries a random position, or several if there are few such rows.
    Swaps are evaluated against the batches at the start of the round. No two accepted swaps touch
    the same position or bring the same label into the same batch, so that each still helps. The
    search stops after a round without an accepted swap.
    """
    labels = [np.unique(label, return_inverse=True)[1] for label in keep_apart]
    for number in range(_MAX_ROUNDS):
        contents = [_BatchLabels.of(batch, label[rows]) for label in labels]
        movers = np.flatnonzero(np.any([content.repeated for content in contents], axis=0))
        if not movers.size:
            return
        swaps = _tries(movers, len(rows), seed=fold_in(seed, number))
        swaps = swaps[batch[swaps[:, 0]] != batch[swaps[:, 1]]]
        evaluated = [content.evaluate(swaps) for content in contents]
        changes = np.array([change for change, _ in evaluated])
        good = (changes <= 0).all(0) & (changes.sum(0) < 0)
        used = [swaps[good], *(arrivals[good] for _, arrivals in evaluated)]
        swaps = swaps[good][np.all([_both_first(numbers) for numbers in used], axis=0)]
        if not swaps.size:
            return
        rows[swaps] = rows[swaps[:, ::-1]]


class _BatchLabels(NamedTuple):
    """The labels in each batch.

    Attributes:
      batch: the batch of each position.
      label: the label of the row at each position.
      keys: one number per distinct (batch, label), sorted.
      repeated: whether an earlier position of the batch has the same label.
    """

    batch: Int[np.ndarray, " n"]
    label: Int[np.ndarray, " n"]
    keys: Int[np.ndarray, " _"]
    repeated: Bool[np.ndarray, " n"]

    @classmethod
    def of(cls, batch: Int[np.ndarray, " n"], label: Int[np.ndarray, " n"]) -> "_BatchLabels":
        keys, first = np.unique(_key(batch, label), return_index=True)
        repeated = np.ones(len(batch), bool)
        repeated[first] = False
        return cls(batch, label, keys, repeated)

    def evaluate(
        self, swaps: Int[np.ndarray, "s 2"]
    ) -> tuple[Int[np.ndarray, " s"], Int[np.ndarray, "s 2"]]:
        """The number of conflicts that each swap adds, and the keys that it adds.

        A row that adds no key has a unique negative number instead.
        """
        label = self.label[swaps]
        arrivals = _key(self.batch[swaps[:, ::-1]], label)
        slot = np.minimum(np.searchsorted(self.keys, arrivals), len(self.keys) - 1)
        present = self.keys[slot] == arrivals
        equal = label[:, 0] == label[:, 1]
        change = np.where(equal, 0, present.sum(1) - self.repeated[swaps].sum(1))
        # If the batch already has the label, each swap that brings it adds exactly one conflict.
        # Such swaps need not exclude each other, hence distinct negative numbers instead of keys.
        unique = ~np.arange(arrivals.size).reshape(arrivals.shape)
        return change, np.where(present | equal[:, None], unique, arrivals)


def _key(batch: Int[np.ndarray, "*s"], label: Int[np.ndarray, "*s"]) -> Int[np.ndarray, "*s"]:
    return batch << 32 | label


def _tries(movers: Int[np.ndarray, " _"], num_rows: int, *, seed: int) -> Int[np.ndarray, "s 2"]:
    """Pair each mover with random positions, which repeat only after all have been used."""
    movers = np.resize(movers, max(movers.size, min(16 * num_rows, _TRIES)))
    turn, index = np.divmod(np.arange(movers.size), num_rows)
    positions = permuted(index, turn, num_rows=num_rows, seed=seed).astype(np.int64)
    return np.stack([movers, positions], axis=1)


def _both_first(numbers: Int[np.ndarray, "s 2"]) -> Bool[np.ndarray, " s"]:
    """Whether each swap has the first occurrence of both of its numbers."""
    first = np.zeros(numbers.size, bool)
    first[np.unique(numbers, return_index=True)[1]] = True
    of_first, of_second = first.reshape(numbers.shape).T
    return of_first & of_second


def batches_of(num_rows: int, first_position: int, batch_size: int) -> Int[np.ndarray, " _"]:
    """The batch of each of `num_rows` consecutive positions, counted from the first row's batch."""
    return (first_position % batch_size + np.arange(num_rows)) // batch_size
