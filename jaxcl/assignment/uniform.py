"""Every row once per epoch, in an order that is computed rather than stored."""

import operator
from typing import SupportsIndex

import numpy as np

from jaxcl.typing import Int, Integer

__all__ = ["uniform_rows"]

_ROUNDS = 6


def uniform_rows(
    step: SupportsIndex, *, num_rows: SupportsIndex, batch_size: SupportsIndex, seed: SupportsIndex
) -> Int[np.ndarray, " b"]:
    """The rows of one global batch: each row once per epoch, in an order of each epoch's own.

    Epochs follow each other without a gap. Where the batch does not divide the data, a batch
    holds the end of one epoch and the start of the next, and no row is dropped; it may then hold
    a row twice, which the losses' `ids` mask out.

    Args:
      step: which batch, from 0.
      num_rows: rows of the data set.
      batch_size: rows of the batch, over all devices and hosts.
      seed: another seed, another order.

    Returns:
      Row numbers, int32. Memory and time do not depend on `num_rows`.

    Raises:
      ValueError: for sizes below 1, or more rows than int32 can number.

    Example:
      >>> epoch = [uniform_rows(step, num_rows=6, batch_size=2, seed=0) for step in range(3)]
      >>> sorted(np.concatenate(epoch).tolist())
      [0, 1, 2, 3, 4, 5]
    """
    # NumPy's own integers would overflow, or turn the positions into floats.
    step, num_rows, batch_size, seed = map(operator.index, (step, num_rows, batch_size, seed))
    if num_rows < 1 or batch_size < 1:
        raise ValueError(f"num_rows={num_rows} and batch_size={batch_size} must be at least 1")
    if num_rows > 2**31:
        raise ValueError(f"num_rows={num_rows} are more than int32 can number; use at most 2**31")
    position = step * batch_size + np.arange(batch_size, dtype=np.uint64)
    epoch, index = np.divmod(position, np.uint64(num_rows))
    return _permuted(index, epoch, num_rows=num_rows, seed=seed).astype(np.int32)


def _permuted(
    index: Integer[np.ndarray, " b"], epoch: Integer[np.ndarray, " b"], *, num_rows: int, seed: int
) -> Integer[np.ndarray, " b"]:
    """Permutes `range(num_rows)` by a Feistel network, each epoch with its own.

    The network permutes the next power of 4; what lands outside of the rows goes through it again
    (cycle walking), which keeps a permutation and takes under four passes on average.
    """
    half_bits = np.uint64(max(1, (max(num_rows - 1, 1).bit_length() + 1) // 2))
    result = _feistel(index, epoch, half_bits=half_bits, seed=seed)
    while (outside := result >= num_rows).any():
        result[outside] = _feistel(result[outside], epoch[outside], half_bits=half_bits, seed=seed)
    return result


def _feistel(
    index: Integer[np.ndarray, " b"],
    epoch: Integer[np.ndarray, " b"],
    *,
    half_bits: np.uint64,
    seed: int,
) -> Integer[np.ndarray, " b"]:
    low = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = index >> half_bits, index & low
    for round_number in range(_ROUNDS):
        word = (seed * _ROUNDS + round_number) % 2**64
        round_key = _mixed(epoch ^ _mixed(np.array([word], np.uint64)))
        left, right = right, left ^ (_mixed(right ^ round_key) & low)
    return (left << half_bits) | right


def _mixed(words: Integer[np.ndarray, " b"]) -> Integer[np.ndarray, " b"]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
