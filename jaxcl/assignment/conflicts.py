"""Conflicts: rows of an equal label in one batch, and swaps that remove them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxcl.assignment.uniform import fold_in, permuted
from jaxcl.ops.arguments import as_integers
from jaxcl.typing import Bool, Int

__all__ = ["batches_of", "count_conflicts", "keep_apart"]

_MAX_ROUNDS = 100
_TRIES = 2**14


def count_conflicts(
    rows: Int[np.ndarray, " _"],
    labels: Int[np.ndarray, " n"],
    *,
    batch_size: int,
    first_position: int = 0,
) -> int:
    """The number of rows whose label an earlier row of their batch already has.

    Args:
      rows: the rows at consecutive positions.
      labels: of each row of the data set.
      batch_size: rows of a batch, over all devices and hosts.
      first_position: the position of the first of `rows`, counted from the start of the run.
    """
    # Numbered, since NumPy joins int64 and uint64 as floats.
    numbers = np.unique(as_integers("labels", labels), return_inverse=True)[1]
    pairs = np.stack([batches_of(len(rows), first_position, batch_size), numbers[rows]], 1)
    return len(rows) - len(np.unique(pairs, axis=0))


def keep_apart(
    rows: Int[np.ndarray, " n"],
    apart: Sequence[np.ndarray],
    batch: Int[np.ndarray, " n"],
    *,
    seed: int,
) -> None:
    """Swap rows in place until a round finds no swap that helps, at most 100 rounds.

    In a round, each row with a conflict tries a random place, or several if there are few such
    rows. Swaps are evaluated against the batches at the start of the round. No two accepted ones
    touch the same place or bring the same label into the same batch, so that each still helps.
    """
    labels = [np.unique(label, return_inverse=True)[1] for label in apart]
    for number in range(_MAX_ROUNDS):
        held = [_Held.of(batch, label[rows]) for label in labels]
        movers = np.flatnonzero(np.any([one.repeated for one in held], axis=0))
        if not movers.size:
            return
        swaps = _tries(movers, len(rows), seed=fold_in(seed, number))
        swaps = swaps[batch[swaps[:, 0]] != batch[swaps[:, 1]]]
        judged = [one.judge(swaps) for one in held]
        changes = np.array([change for change, _ in judged])
        good = (changes <= 0).all(0) & (changes.sum(0) < 0)
        taken = [swaps[good], *(arrivals[good] for _, arrivals in judged)]
        swaps = swaps[good][np.all([_each_once(numbers) for numbers in taken], axis=0)]
        if not swaps.size:
            return
        rows[swaps] = rows[swaps[:, ::-1]]


class _Held(NamedTuple):
    """The labels that each batch holds.

    Attributes:
      batch: the batch of each place.
      label: the label of the row in each place.
      keys: a number for each pair of a batch and a label in it, sorted.
      repeated: whether an earlier place of the batch has the same label.
    """

    batch: Int[np.ndarray, " n"]
    label: Int[np.ndarray, " n"]
    keys: Int[np.ndarray, " _"]
    repeated: Bool[np.ndarray, " n"]

    @classmethod
    def of(cls, batch: Int[np.ndarray, " n"], label: Int[np.ndarray, " n"]) -> "_Held":
        keys, first = np.unique(_key(batch, label), return_index=True)
        repeated = np.ones(len(batch), bool)
        repeated[first] = False
        return cls(batch, label, keys, repeated)

    def judge(
        self, swaps: Int[np.ndarray, "s 2"]
    ) -> tuple[Int[np.ndarray, " s"], Int[np.ndarray, "s 2"]]:
        """The number of conflicts that each swap adds, and the keys; unique numbers for no key."""
        label = self.label[swaps]
        arrivals = _key(self.batch[swaps[:, ::-1]], label)
        slot = np.minimum(np.searchsorted(self.keys, arrivals), len(self.keys) - 1)
        there = self.keys[slot] == arrivals
        equal = label[:, 0] == label[:, 1]
        change = np.where(equal, 0, there.sum(1) - self.repeated[swaps].sum(1))
        # A label that the batch holds already is one more conflict, however many swaps bring it.
        # Such swaps need not exclude each other: negative numbers, unlike all keys and distinct.
        unlike = ~np.arange(arrivals.size).reshape(arrivals.shape)
        return change, np.where(there | equal[:, None], unlike, arrivals)


def _key(batch: Int[np.ndarray, "*s"], label: Int[np.ndarray, "*s"]) -> Int[np.ndarray, "*s"]:
    return batch << 32 | label


def _tries(movers: Int[np.ndarray, " _"], num_places: int, *, seed: int) -> Int[np.ndarray, "s 2"]:
    """Each mover with random places, which repeat only after all places have been used."""
    movers = np.resize(movers, max(movers.size, min(16 * num_places, _TRIES)))
    turn, index = np.divmod(np.arange(movers.size), num_places)
    places = permuted(index, turn, num_rows=num_places, seed=seed).astype(np.int64)
    return np.stack([movers, places], axis=1)


def _each_once(numbers: Int[np.ndarray, "s 2"]) -> Bool[np.ndarray, " s"]:
    """Whether both numbers of a swap occur in it for the first time."""
    first = np.zeros(numbers.size, bool)
    first[np.unique(numbers, return_index=True)[1]] = True
    ones, others = first.reshape(numbers.shape).T
    return ones & others


def batches_of(num_rows: int, first_position: int, batch_size: int) -> Int[np.ndarray, " _"]:
    """The batch of each of some consecutive positions, counted from that of the first."""
    return (first_position % batch_size + np.arange(num_rows)) // batch_size
