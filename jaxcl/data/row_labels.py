"""The labels of a split's rows: groups, and a number that rows with equal content share."""

from collections.abc import Sequence

import numpy as np

from jaxcl.data.sources import PairSource
from jaxcl.data.splits import ConcatenatedPairs
from jaxcl.typing import Int, Integer

__all__ = ["equal_rows", "joined_numbers", "split_labels"]


def split_labels(
    source: PairSource, groups: Int[np.ndarray, " n"], numbers: Sequence[Int[np.ndarray, " n"]]
) -> dict[str, Int[np.ndarray, " n"]]:
    """The labels of all rows of a split, for `Table.labels`.

    Args:
      source: the split.
      groups: each row's group as the source returns it; 0 for rows without a group. Equal groups of
        different concatenated data sets become different numbers.
      numbers: for one side or both, a number per row that is equal for equal content.

    Returns:
      `"group"` and `"text"`, int32.
    """
    group = groups.astype(np.int32)
    if isinstance(source, ConcatenatedPairs):
        group = source.distinct_groups(group)
    return {"group": group, "text": joined_numbers(numbers[0], numbers[-1])}


def joined_numbers(
    queries: Int[np.ndarray, " n"], keys: Int[np.ndarray, " n"]
) -> Int[np.ndarray, " n"]:
    """A number that rows share if they are connected by equal queries or equal keys.

    Rows are the edges of a graph from queries to keys; rows of one connected component share a
    number, and components are numbered in order of their first rows. Rows of one component are
    never negatives of each other.

    Args:
      queries: a number per row, at least 0 and equal for equal queries.
      keys: a number per row, at least 0 and equal for equal keys.

    Returns:
      int32 numbers from 0, without gaps.

    Example:
      >>> joined_numbers(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 2])).tolist()
      [0, 0, 0, 1]
    """
    sides = [_first_rows(queries), _first_rows(keys)]
    first = sides[0].copy()  # the first known row of each row's component
    while True:
        previous = first.copy()
        for first_equal in sides:
            _take_least(first, first_equal)
        # Also lower the entry of the previous first row, so that the next line updates all rows
        # that point to it. The number of rounds is therefore logarithmic.
        np.minimum.at(first, previous, first)
        first = first[first]
        if np.array_equal(first, previous):
            break
    numbers = np.cumsum(first == np.arange(len(first), dtype=np.int32), dtype=np.int32) - 1
    return numbers[first]


def equal_rows(digests: Integer[np.ndarray, "n 2"]) -> Int[np.ndarray, " n"]:
    """For each row, the number of the first row with an equal 128-bit digest.

    Takes about 60 bytes of memory per row.

    Example:
      >>> equal_rows(np.array([[7, 1], [7, 0], [7, 1]], np.uint64)).tolist()
      [0, 1, 0]
    """
    # Stable, so that equal digests keep the order of their rows.
    order = np.lexsort((digests[:, 1], digests[:, 0])).astype(np.int32)
    starts = np.zeros(len(order), bool)
    starts[:1] = True
    for word in digests.T:
        ordered = word[order]
        starts[1:] |= ordered[1:] != ordered[:-1]
    first_rows = order[starts]
    first = np.empty(len(order), np.int32)
    first[order] = first_rows[np.cumsum(starts, dtype=np.int32) - 1]
    return first


def _first_rows(numbers: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """For each row, the first row with an equal number."""
    first = np.full(numbers.max(initial=-1) + 1, len(numbers), np.int32)
    np.minimum.at(first, numbers, np.arange(len(numbers), dtype=np.int32))
    return first[numbers]


def _take_least(values: Int[np.ndarray, " n"], first_rows: Int[np.ndarray, " n"]) -> None:
    """Set each row's value to the smallest value among rows with the same first row."""
    np.minimum.at(values, first_rows, values)
    values[:] = values[first_rows]
