"""Scores of pairs of a query and a key, computed on the host."""

from collections.abc import Callable

import numpy as np

from jaxcl.typing import Float, Integer

__all__ = ["PairScores", "lowest_scores", "pair_similarities", "scores_of"]

PairScores = Callable[
    [Integer[np.ndarray, " q"], Integer[np.ndarray, "q n"]], Float[np.ndarray, "q n"]
]
"""`(query numbers, rows of keys for each query) -> scores`; NaN for pairs without a score."""

_GATHERED = 2**24
"""The maximum number of elements of key vectors to gather at a time: 64 MiB."""


def lowest_scores(
    scores: Float[np.ndarray, "q p"],
    rows: Integer[np.ndarray, "q p"],
    numbers: Integer[np.ndarray, " q"],
) -> Float[np.ndarray, " q"]:
    """The score of each query's least similar positive; NaN without a positive."""
    unknown = np.isnan(scores) & (rows >= 0)
    if unknown.any():
        query, column = np.argwhere(unknown)[0]
        raise ValueError(
            f"there is no score for query {numbers[query]} and its positive in row "
            f"{rows[query, column]}; score the positives of all queries"
        )
    lowest = np.where(rows >= 0, scores, np.inf).min(1, initial=np.inf)
    return np.where((rows >= 0).any(1), lowest, np.nan).astype(np.float32)


def pair_similarities(
    queries: Float[np.ndarray, "q d"],
    keys: Float[np.ndarray, "k d"],
    query_numbers: Integer[np.ndarray, " _"],
    key_rows: Integer[np.ndarray, " _"],
) -> Float[np.ndarray, " _"]:
    """The inner products of pairs of a query and a key, gathering some of the vectors at a time."""
    scores = np.empty(len(key_rows), np.float32)
    step = max(_GATHERED // keys.shape[1], 1)
    for first in range(0, len(key_rows), step):
        here = slice(first, first + step)
        scores[here] = np.einsum("nd,nd->n", queries[query_numbers[here]], keys[key_rows[here]])
    return scores


def scores_of(
    queries: Float[np.ndarray, "q d"],
    keys: Float[np.ndarray, "k d"],
    rows: Integer[np.ndarray, "q n"],
) -> Float[np.ndarray, "q n"]:
    """The similarities of each query to the keys in its `rows`; −∞ for negative row numbers."""
    scores = np.full(rows.shape, -np.inf, np.float32)
    numbers, places = np.nonzero(rows >= 0)
    scores[numbers, places] = pair_similarities(queries, keys, numbers, rows[numbers, places])
    return scores
