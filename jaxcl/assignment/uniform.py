"""A random order of all rows for each epoch, computed rather than stored."""

import operator
from typing import SupportsIndex

import numpy as np

from jaxcl.typing import Int, Integer

__all__ = ["fold_in", "permutation", "permuted", "uniform_rows"]

_ROUNDS = 6


def uniform_rows(
    step: SupportsIndex, *, num_rows: SupportsIndex, batch_size: SupportsIndex, seed: SupportsIndex
) -> Int[np.ndarray, " b"]:
    """The rows of one global batch: each row once per epoch, each epoch in a new order.

    Epochs follow each other without a gap. If the batch size does not divide the data, a batch may
    hold the end of one epoch and the start of the next, so that no row is dropped. Such a batch may
    contain a row twice; the losses' `ids` mask the duplicate.

    Args:
      step: the number of the batch, from 0.
      num_rows: rows of the data set.
      batch_size: rows of the batch, over all devices and hosts.
      seed: determines the order.

    Returns:
      Row numbers, int32. Memory and time do not depend on `num_rows`.

    Raises:
      ValueError: if a size is below 1, there are more rows than int32 can number, or the step is
        below 0.

    Example:
      >>> epoch = [uniform_rows(step, num_rows=6, batch_size=2, seed=0) for step in range(3)]
      >>> sorted(np.concatenate(epoch).tolist())
      [0, 1, 2, 3, 4, 5]
    """
    # Python integers, since NumPy's would overflow in the product, and the sum of a signed one and
    # a uint64 would be a float.
    step, num_rows, batch_size, seed = map(operator.index, (step, num_rows, batch_size, seed))
    if num_rows < 1 or batch_size < 1:
        raise ValueError(f"num_rows={num_rows} and batch_size={batch_size} must be at least 1")
    if num_rows > 2**31:
        raise ValueError(f"num_rows={num_rows} does not fit in int32; use at most 2**31 rows")
    if step < 0 or (step + 1) * batch_size > 2**64:
        raise ValueError(f"step={step}; steps count from 0, up to 2**64 rows in total")
    position = step * batch_size + np.arange(batch_size, dtype=np.uint64)
    epoch, index = np.divmod(position, np.uint64(num_rows))
    return permuted(index, epoch, num_rows=num_rows, seed=seed).astype(np.int32)


def permutation(num_rows: int, *, epoch: int, seed: int) -> Int[np.ndarray, " n"]:
    """Permute `range(num_rows)` for one epoch."""
    index, number = np.arange(num_rows, dtype=np.uint64), np.array(epoch % 2**64, np.uint64)
    return permuted(index, number, num_rows=num_rows, seed=seed).astype(np.int64)


def permuted(
    index: Integer[np.ndarray, " b"],
    epoch: Integer[np.ndarray, " b"] | Integer[np.ndarray, ""],
    *,
    num_rows: int | Integer[np.ndarray, " b"],
    seed: int,
) -> Integer[np.ndarray, " b"]:
    """Look up positions of a random permutation of `range(num_rows)`, different for each epoch.

    A Feistel network permutes the numbers below the next power of 4. Results outside the rows go
    through it again (cycle walking), which yields a permutation of the rows and takes fewer than
    four passes on average.

    Args:
      index: the positions to look up.
      epoch: one epoch for all positions, or one for each.
      num_rows: one number for all positions, or one for each; it exceeds each index.
      seed: determines the permutations.

    Returns:
      The numbers at these positions, uint64.
    """
    # Multiples of the number of rounds, so that no two seeds share a word.
    words = np.array([(seed * _ROUNDS + i) % 2**64 for i in range(_ROUNDS)], np.uint64)
    keys = _mixed(epoch.astype(np.uint64) ^ _mixed(words)[:, None])
    keys = np.broadcast_to(keys, (_ROUNDS, len(index)))  # no copy if there is one epoch for all
    limit = np.broadcast_to(np.asarray(num_rows, np.uint64), index.shape)
    # The bit length of the last row; float64 represents row numbers exactly.
    _, bits = np.frexp(np.maximum(limit, 2) - 1.0)
    half_bits = ((bits + 1) // 2).astype(np.uint64)
    result = _feistel(index.astype(np.uint64), keys, half_bits)
    while (outside := np.flatnonzero(result >= limit)).size:
        result[outside] = _feistel(result[outside], keys[:, outside], half_bits[outside])
    return result


def fold_in(seed: int, number: int) -> int:
    """Derive a seed for each number, like `jax.random.fold_in` for keys."""
    word = _mixed(np.array([seed % 2**64], np.uint64)) ^ np.uint64(number % 2**64)
    return int(_mixed(word)[0])


def _feistel(
    index: Integer[np.ndarray, " b"],
    round_keys: Integer[np.ndarray, "r b"],
    half_bits: Integer[np.ndarray, " b"],
) -> Integer[np.ndarray, " b"]:
    low = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = index >> half_bits, index & low
    for round_key in round_keys:
        # Invertible for any mixing function: `right` is kept, and XOR is its own inverse.
        left, right = right, left ^ (_mixed(right ^ round_key) & low)
    return (left << half_bits) | right


def _mixed(words: Integer[np.ndarray, "*s"]) -> Integer[np.ndarray, "*s"]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
