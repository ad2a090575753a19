"""Cut batches from an order of all rows in which neighbours are hard negatives of each other."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple, SupportsIndex

import numpy as np

from jaxcl.assignment.conflicts import batches_of, remove_conflicts
from jaxcl.assignment.uniform import fold_in, permutation
from jaxcl.ops.arguments import as_integers
from jaxcl.typing import Bool, Int

__all__ = [
    "Assigned",
    "AssignedRows",
    "epoch_batches",
    "epoch_rows",
    "random_to_hard",
    "visited",
]


class Assigned(NamedTuple):
    """An order of all rows, and the step from which it applies.

    Attributes:
      order: a permutation of all row numbers; consecutive rows share a block.
      seen: whether the epoch under way at `step` has already visited each row.
      step: the first step whose batch uses this order.
    """

    order: Int[np.ndarray, " n"]
    seen: Bool[np.ndarray, " n"]
    step: int


class AssignedRows:
    """The rows of each batch from `assigned.step` on: `AssignedRows(assigned, ...)(step)`.

    The epoch under way at `assigned.step` ends with the rows it has not visited yet, in blocks of
    the order restricted to them. `epoch_rows` lays out all later epochs. So each row is visited
    once per epoch, even if the order changes in mid-epoch. The rows depend only on the
    arguments and the step; the last two epochs are cached for speed.

    Args:
      assigned: the order, and the rows visited before it applies.
      batch_size: rows of a batch, over all devices and hosts.
      block_size: rows that stay together; it divides `batch_size`.
      seed: determines the order of the blocks.
      random_fraction: the fraction of blocks to dissolve; or a function of the step, evaluated once
        per epoch, at the epoch's first step with this order.
      keep_apart: label arrays, by row number; rows with an equal label go to different batches.

    Raises:
      ValueError: if the sizes do not divide, `order` is not a permutation, the number of `seen`
        rows is not the number visited before `assigned.step`, or the step is before it.
    """

    def __init__(
        self,
        assigned: Assigned,
        *,
        batch_size: int,
        block_size: int,
        seed: int,
        random_fraction: Callable[[int], float] | float = 0.0,
        keep_apart: Sequence[Int[np.ndarray, " n"]] = (),
    ):
        batch_size, block_size, seed = map(operator.index, (batch_size, block_size, seed))
        order, keep_apart = _checked_order(assigned.order, keep_apart)
        assigned = Assigned(order, np.asarray(assigned.seen, bool), operator.index(assigned.step))
        num_rows = len(order)
        _check_sizes(batch_size, block_size)
        num_visited = assigned.step * batch_size % num_rows
        if assigned.step < 0:
            raise ValueError(f"step={assigned.step}; steps count from 0")
        if assigned.seen.shape != (num_rows,) or assigned.seen.sum() != num_visited:
            raise ValueError(
                f"seen marks {assigned.seen.sum()} of {len(assigned.seen)} rows; before step "
                f"{assigned.step} its epoch has visited {num_visited} of {num_rows}; use `visited`"
            )
        self._assigned = assigned
        self._batch_size = batch_size
        self._random_fraction = random_fraction
        self._lay_out = functools.partial(
            _laid_out,
            batch_size=batch_size,
            block_size=block_size,
            seed=seed,
            keep_apart=keep_apart,
        )
        self._epoch = functools.lru_cache(maxsize=2)(self._rows_of_epoch)

    def __call__(self, step: SupportsIndex) -> Int[np.ndarray, " b"]:
        step = operator.index(step)  # NumPy integers would overflow in the products
        if step < self._assigned.step:
            raise ValueError(
                f"step {step} is before step {self._assigned.step}, the first step of this order; "
                "use the previous order"
            )
        begin, end = step * self._batch_size, (step + 1) * self._batch_size
        num_rows = len(self._assigned.order)
        pieces = []
        for epoch in range(begin // num_rows, -(-end // num_rows)):
            first, rows = self._epoch(epoch)
            pieces.append(rows[max(begin - first, 0) : end - first])
        return np.concatenate(pieces)

    def _rows_of_epoch(self, epoch: int) -> tuple[int, Int[np.ndarray, " _"]]:
        """The rows of an epoch in this order, and the position of the first of them."""
        order, seen, step = self._assigned
        first = max(epoch * len(order), step * self._batch_size)
        fraction = self._random_fraction
        if callable(fraction):
            fraction = fraction(first // self._batch_size)
        remaining = order if first == epoch * len(order) else order[~seen[order]]
        return first, self._lay_out(remaining, first_position=first, random_fraction=fraction)


def epoch_rows(
    order: Int[np.ndarray, " n"],
    *,
    epoch: int,
    batch_size: int,
    block_size: int,
    seed: int,
    random_fraction: float = 0.0,
    keep_apart: Sequence[Int[np.ndarray, " n"]] = (),
) -> Int[np.ndarray, " n"]:
    """List all rows in the order in which an epoch visits them, each once.

    Positions are numbered across epochs and cut into batches, so that a batch may hold the end of
    one epoch and the start of the next. Blocks start at multiples of `block_size`, so that each
    batch holds whole blocks. An epoch that starts between two multiples starts and ends with a
    partial block. The partial blocks are taken from the end of the order: its short block, and its
    last whole block too if the short block cannot fill the first partial block.

    Args:
      order: a permutation of all row numbers; every `block_size` consecutive rows are a block.
      epoch: the epoch, from 0; each epoch shuffles the blocks differently.
      batch_size: rows of a batch, over all devices and hosts.
      block_size: rows that stay together; it divides `batch_size`.
      seed: determines the order of the blocks.
      random_fraction: the fraction of whole blocks whose rows are permuted among themselves. 1
        permutes all rows, including partial blocks.
      keep_apart: label arrays, by row number. If two rows of a batch have an equal label, the later
        one is swapped with a row of another batch, provided that this removes conflicts and adds
        none to any array. With one array and batches of equal size, only labels with more rows
        than there are batches keep conflicts. Several arrays, or the short batches at the ends of
        an epoch, may keep others. The two parts of a batch that spans two epochs are treated as
        separate batches. Each swap takes two rows out of their blocks.

    Returns:
      Row numbers, int32.

    Raises:
      ValueError: if the sizes do not divide, `order` is not a permutation, or the epoch is below 0.

    Example:
      >>> rows = epoch_rows(np.arange(6), epoch=0, batch_size=4, block_size=2, seed=0)
      >>> sorted((rows // 2).tolist()), (rows[::2] // 2 == rows[1::2] // 2).all()
      ([0, 0, 1, 1, 2, 2], np.True_)
    """
    epoch, batch_size, block_size, seed = map(operator.index, (epoch, batch_size, block_size, seed))
    if epoch < 0:
        raise ValueError(f"epoch={epoch}; epochs count from 0")
    order, keep_apart = _checked_order(order, keep_apart)
    _check_sizes(batch_size, block_size)
    return _laid_out(
        order,
        first_position=epoch * len(order),
        batch_size=batch_size,
        block_size=block_size,
        seed=seed,
        random_fraction=random_fraction,
        keep_apart=keep_apart,
    )


def epoch_batches(
    order: Int[np.ndarray, " n"],
    *,
    epoch: int,
    batch_size: int,
    block_size: int,
    seed: int,
    random_fraction: float = 0.0,
    keep_apart: Sequence[Int[np.ndarray, " n"]] = (),
) -> list[Int[np.ndarray, " _"]]:
    """Cut an epoch into batches for a training loop: every row once, in whole blocks.

    Unlike in `epoch_rows`, each epoch starts with a new batch. The last batch is short if
    `batch_size` does not divide the number of rows. It always contains the rows of the last,
    partial block of the order, so a loop that skips the last batch never trains on these rows.

    Args:
      order: as for `epoch_rows`.
      epoch: as for `epoch_rows`.
      batch_size: as for `epoch_rows`.
      block_size: as for `epoch_rows`; use the `block_size` that `assign` was given.
      seed: as for `epoch_rows`.
      random_fraction: as for `epoch_rows`.
      keep_apart: as for `epoch_rows`.

    Returns:
      Row numbers of each batch, int32.

    Raises:
      ValueError: as for `epoch_rows`.

    Example:
      >>> batches = epoch_batches(np.arange(10), epoch=1, batch_size=4, block_size=2, seed=0)
      >>> [len(batch) for batch in batches], sorted(np.concatenate(batches).tolist())
      ([4, 4, 2], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    epoch, batch_size, block_size, seed = map(operator.index, (epoch, batch_size, block_size, seed))
    if epoch < 0:
        raise ValueError(f"epoch={epoch}; epochs count from 0")
    order, keep_apart = _checked_order(order, keep_apart)
    _check_sizes(batch_size, block_size)
    num_batches = -(-len(order) // batch_size)
    rows = _laid_out(
        order,
        first_position=epoch * num_batches * batch_size,
        batch_size=batch_size,
        block_size=block_size,
        seed=seed,
        random_fraction=random_fraction,
        keep_apart=keep_apart,
    )
    return [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]


def visited(
    rows_fn: Callable[[int], Int[np.ndarray, " b"]],
    *,
    before_step: int,
    step: int,
    num_rows: int,
    batch_size: int,
    seen: Bool[np.ndarray, " n"] | None = None,
) -> Bool[np.ndarray, " n"]:
    """Mark the rows that the epoch under way at `step` has already visited, as the next `seen`.

    Args:
      rows_fn: step -> the rows of its batch, from `before_step` on.
      before_step: the first step of `rows_fn`, at most `step`.
      step: the step to stop before.
      num_rows: rows of the data set.
      batch_size: rows of a batch, over all devices and hosts.
      seen: the result of this function for `before_step`. Required if the epoch under way began
        before that step.

    Raises:
      ValueError: if `step` is before `before_step`, or `seen` is missing.
    """
    step, before_step = operator.index(step), operator.index(before_step)
    num_rows, batch_size = operator.index(num_rows), operator.index(batch_size)
    if before_step < 0 or min(num_rows, batch_size) < 1:
        raise ValueError(
            f"before_step={before_step}, num_rows={num_rows}, batch_size={batch_size}; steps count "
            "from 0, and sizes are at least 1"
        )
    if step < before_step:
        raise ValueError(f"step={step} is before before_step={before_step}, where rows_fn begins")
    epoch_begin = step * batch_size // num_rows * num_rows
    begin = max(epoch_begin, before_step * batch_size)
    result = np.zeros(num_rows, bool)
    if begin > epoch_begin:  # `rows_fn` starts in the middle of the epoch
        if seen is None:
            raise ValueError(
                f"before_step={before_step} is in the middle of the epoch of step={step}; pass the "
                "rows `seen` before it"
            )
        result |= seen
    for earlier in range(begin // batch_size, step):
        result[rows_fn(earlier)[max(begin - earlier * batch_size, 0) :]] = True
    return result


def random_to_hard(initial: float, final: float, steps: int) -> Callable[[int], float]:
    """Build a `random_fraction` that moves linearly from `initial` to `final` over `steps` steps.

    Example:
      >>> fraction = random_to_hard(1.0, 0.25, 10)
      >>> fraction(0), fraction(5), fraction(20)
      (1.0, 0.625, 0.25)
    """
    if not (0 <= initial <= 1 and 0 <= final <= 1) or steps < 1:
        raise ValueError(
            f"initial={initial} and final={final} must be from 0 to 1, steps={steps} at least 1"
        )
    return lambda step: initial + (final - initial) * min(max(step / steps, 0.0), 1.0)


def _laid_out(
    order: Int[np.ndarray, " n"],
    *,
    first_position: int,
    batch_size: int,
    block_size: int,
    seed: int,
    random_fraction: float,
    keep_apart: Sequence[np.ndarray],
) -> Int[np.ndarray, " n"]:
    """Lay out the rows of an order from `first_position` on."""
    if not 0 <= random_fraction <= 1:
        raise ValueError(f"random_fraction={random_fraction} must be from 0 to 1")
    rows = _in_blocks(order, first_position, block_size, seed, random_fraction).astype(np.int32)
    if keep_apart:
        batch = batches_of(len(rows), first_position, batch_size)
        remove_conflicts(rows, keep_apart, batch, seed=fold_in(fold_in(seed, 4), first_position))
    return rows


def _in_blocks(
    order: Int[np.ndarray, " n"],
    first_position: int,
    block_size: int,
    seed: int,
    random_fraction: float,
) -> Int[np.ndarray, " n"]:
    def shuffle(size: int, purpose: int) -> Int[np.ndarray, " _"]:
        # Keyed by position, so that the rest of an epoch is not shuffled like the whole epoch.
        return permutation(size, epoch=first_position, seed=fold_in(seed, purpose))

    if random_fraction == 1:
        return order[shuffle(len(order), 0)]
    head = min(-first_position % block_size, len(order))
    num_blocks = (len(order) - head) // block_size
    whole, partial = np.split(order, [num_blocks * block_size])
    blocks = whole.reshape(-1, block_size)[shuffle(num_blocks, 1)]
    dissolved = shuffle(num_blocks, 2)[: round(random_fraction * num_blocks)]
    loose = blocks[dissolved].ravel()
    blocks[dissolved] = loose[shuffle(loose.size, 3)].reshape(-1, block_size)
    return np.concatenate([partial[:head], blocks.ravel(), partial[head:]])


def _check_sizes(batch_size: int, block_size: int) -> None:
    if block_size < 1 or batch_size < 1 or batch_size % block_size:
        raise ValueError(
            f"block_size={block_size} does not divide batch_size={batch_size}; each batch holds "
            "whole blocks"
        )


def _checked_order(
    order: Int[np.ndarray, " n"], keep_apart: Sequence[np.ndarray]
) -> tuple[Int[np.ndarray, " n"], list[Int[np.ndarray, " n"]]]:
    """Check the order and the labels, and convert them to arrays of integers."""
    order = as_integers("order", order)
    labels = [as_integers("keep_apart", label) for label in keep_apart]
    if not np.array_equal(np.sort(order), np.arange(len(order))) or not len(order):
        raise ValueError(f"order is not a permutation of its {len(order)} rows")
    if any(len(label) != len(order) for label in labels):
        lengths = [len(label) for label in labels]
        raise ValueError(f"keep_apart has labels of {lengths} rows; there are {len(order)}")
    return order, labels
