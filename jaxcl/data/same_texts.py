"""Numbers by which rows with the same content on either side know each other."""

import numpy as np
import scipy.sparse

from jaxcl.typing import Int

__all__ = ["joined_numbers"]


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
