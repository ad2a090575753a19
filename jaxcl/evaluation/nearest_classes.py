"""k-nearest-neighbour classification: which classes do the neighbours of an embedding have?

It needs no training, so it measures the embeddings alone. When not to trust it: neighbours may be
alike in something other than their class, such as the background or the font, and a class with many
training rows is more often among the neighbours.
"""

from collections.abc import Sequence

import numpy as np

from jaxcl.evaluation.linear_probe import check_labels
from jaxcl.evaluation.retrieval import dense_scores
from jaxcl.run.vector_search import best_rows
from jaxcl.typing import Float, Int

__all__ = ["neighbour_votes"]

_TILE_SCORES = 2**24
"""Scores in memory at a time, 64 MiB in float32."""


def neighbour_votes(
    queries: Float[np.ndarray, "q d"],
    keys: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    *,
    num_classes: int,
    neighbours: Sequence[int] = (20, 200),
    temperature: float = 0.07,
    tile: int | None = None,
) -> dict[int, Float[np.ndarray, "q classes"]]:
    r"""Compute weighted votes for the classes of each query's nearest labelled rows.

    $$v_{ic} = \sum_{j \in N_k(i),\ y_j = c} \exp\big((\cos(q_i, x_j) - 1) / \tau\big)$$

    over the `k` rows with the highest cosines; with equal cosines, the row with the lower number is
    nearer. Subtracting 1 only scales all votes of a query.

    Args:
      queries: unit vectors to classify.
      keys: unit vectors of the labelled rows.
      labels: the class of each labelled row, in [0, num_classes).
      num_classes: number of classes.
      neighbours: values of `k`; if there are fewer labelled rows, all of them vote.
      temperature: τ; a lower temperature gives more weight to the nearest rows.
      tile: number of queries to score at a time; the result does not depend on it.

    Returns:
      k -> the votes.

    Raises:
      ValueError: if there are no labelled rows, or a label or option is out of range.

    Example:
      >>> keys = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
      >>> votes = neighbour_votes(
      ...     keys[:1], keys, np.array([0, 1, 1]), num_classes=2, neighbours=[1, 3], temperature=1.0
      ... )
      >>> {k: of_k.round(3).tolist() for k, of_k in votes.items()}
      {1: [[1.0, 0.0]], 3: [[1.0, 1.187]]}

    Reference: Wu, Xiong, Yu and Lin, "Unsupervised Feature Learning via Non-parametric Instance
      Discrimination", CVPR 2018, section 3.4, where k is 200.
    """
    check_labels(labels, num_classes)
    if not neighbours or min(neighbours) < 1 or not temperature > 0:
        raise ValueError(
            f"neighbours={tuple(neighbours)} and temperature={temperature}; give at least one "
            "neighbour and a positive temperature"
        )
    tile = tile or max(1, _TILE_SCORES // len(keys))
    votes = {k: np.zeros((len(queries), num_classes)) for k in neighbours}
    for first in range(0, len(queries), tile):
        for query, scores in enumerate(dense_scores(queries[first : first + tile], keys), first):
            nearest = best_rows(scores, max(neighbours))
            weights = np.exp((scores[nearest].astype(np.float64) - 1) / temperature)
            for k, of_k in votes.items():
                of_k[query] = np.bincount(labels[nearest[:k]], weights[:k], num_classes)
    return votes
