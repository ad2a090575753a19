"""The labels of a split's rows: groups, and numbers that rows with the same content share."""

from collections.abc import Sequence

import numpy as np
import scipy.sparse

from jaxcl.data.sources import PairSource
from jaxcl.data.splits import ConcatenatedPairs
from jaxcl.typing import Int

__all__ = ["joined_numbers", "split_labels"]


def split_labels(
    source: PairSource, groups: Int[np.ndarray, " n"], numbers: Sequence[Int[np.ndarray, " n"]]
) -> dict[str, Int[np.ndarray, " n"]]:
    """The labels of all rows of a split, for `Table.labels`.

    Args:
      source: the split.
      groups: each row's group as the source returns it, 0 if it has none. Groups of different
        concatenated data sets become different numbers.
      numbers: for one side or both, a number per row, equal for equal content.

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
    number. None of them is a negative of another.

    Args:
      queries: a number per row, equal for equal queries.
      keys: the same for keys.

    Example:
      >>> joined_numbers(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 2])).tolist()
      [0, 0, 0, 1]
    """
    num_queries = int(queries.max()) + 1
    size = num_queries + int(keys.max()) + 1
    edges = scipy.sparse.coo_array(
        (np.ones(len(queries), np.int8), (queries, num_queries + keys)), shape=(size, size)
    )
    _, part = scipy.sparse.csgraph.connected_components(edges, directed=False)
    return part[queries].astype(np.int32)
