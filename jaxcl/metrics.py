"""Ranks and retrieval metrics, in NumPy: one value per query, the caller averages.

A query has one relevant key. Its *rank* is what every metric here is a function of, so the care
is in `rank_of_key`: ties share a mid-rank, and a score that is not finite is an error.
"""

import math
import operator

import numpy as np

from jaxcl.typing import Float, Int

__all__ = [
    "mean_and_standard_error",
    "mid_ranks",
    "mrr_metric",
    "ndcg_metric",
    "paired_difference",
    "rank_of_key",
    "recall_at_k_metric",
]


def rank_of_key(
    scores: Float[np.ndarray, "q n"], relevant: Int[np.ndarray, " q"]
) -> Float[np.ndarray, " q"]:
    """Rank of each query's relevant key among all keys, 1 the best, ties at mid-rank.

    `rank_i = 1 + #{j : s_ij > s_ir} + #{j ≠ r : s_ij = s_ir} / 2`, with `r = relevant_i`.

    The mid-rank is the mean over all orders of the tied keys. Counting strictly greater scores
    alone would give a model that scores every key alike a perfect result.

    Args:
        scores: higher is better; every key of the pool, not a shortlist.
        relevant: column of each query's relevant key, in [0, n).

    Returns:
        Ranks in [1, n], float64, multiples of one half.

    Raises:
        ValueError: if the shapes disagree, a score is NaN or infinite, or an entry of `relevant`
            is no column of `scores`.
        TypeError: if `relevant` holds no integers.

    Example:
        >>> scores = np.array([[0.9, 0.1, 0.5], [0.2, 0.2, 0.7]])
        >>> rank_of_key(scores, np.array([2, 0])).tolist()
        [2.0, 2.5]
    """
    scores, relevant = np.asarray(scores), np.asarray(relevant)
    if scores.ndim != 2 or relevant.shape != scores.shape[:1]:
        raise ValueError(
            f"scores of shape {scores.shape} and relevant of shape {relevant.shape} do not fit; "
            "give scores [q, n] and one relevant column per query, [q]."
        )
    _check_finite(scores)
    _check_columns(relevant, num_keys=scores.shape[1])
    own = np.take_along_axis(scores, relevant[:, None], axis=1)
    num_better = np.count_nonzero(scores > own, axis=1)
    num_tied_others = np.count_nonzero(scores == own, axis=1) - 1
    return 1.0 + num_better + num_tied_others / 2


def mid_ranks(scores: Float[np.ndarray, "q n"]) -> Float[np.ndarray, "q n"]:
    """Rank of every key in its row, 1 the best, ties at mid-rank.

    `rank_ij = 1 + #{l : s_il > s_ij} + #{l ≠ j : s_il = s_ij} / 2`.

    Where only the relevant keys' ranks are wanted, `rank_of_key` gives the same without sorting.

    Args:
        scores: higher is better.

    Returns:
        Ranks in [1, n], float64; every row sums to n (n + 1) / 2.

    Raises:
        ValueError: if `scores` is no matrix, or a score is NaN or infinite.

    Example:
        >>> mid_ranks(np.array([[0.9, 0.1, 0.9, 0.5]])).tolist()
        [[1.5, 4.0, 1.5, 3.0]]
    """
    scores = np.asarray(scores)
    if scores.ndim != 2:
        raise ValueError(f"scores have shape {scores.shape}; give one row per query, [q, n].")
    _check_finite(scores)
    ranks = np.empty(scores.shape)
    # Row by row: the working memory stays at one row, and it is no slower than all at once.
    for row, out in zip(scores, ranks, strict=True):
        _, tie, sizes = np.unique(row, return_inverse=True, return_counts=True)
        # Counted from the lowest score up, since unsigned scores cannot be negated.
        out[:] = row.size + 1 - (np.cumsum(sizes) - (sizes - 1) / 2)[tie]
    return ranks


def mrr_metric(ranks: Float[np.ndarray, " q"], *, cutoff: int = 10) -> Float[np.ndarray, " q"]:
    """Reciprocal rank; its mean over queries is MRR@cutoff.

    `rr_i = 1 / rank_i` if `rank_i <= cutoff`, else 0.

    Args:
        ranks: from `rank_of_key`, at least 1. A mid-rank is used as it is: 1.5 gives 2/3.
        cutoff: last rank that counts; 10 as in the MS MARCO passage task.

    Returns:
        Values in [0, 1], no unit.

    Raises:
        ValueError: if `cutoff` is not a positive whole number, or a rank is below 1 or not finite.

    Example:
        >>> mrr_metric(np.array([1.0, 4.0, 11.0])).tolist()
        [1.0, 0.25, 0.0]
    """
    ranks = _checked(ranks)
    return _up_to(cutoff, ranks, 1 / ranks)


def ndcg_metric(ranks: Float[np.ndarray, " q"], *, cutoff: int = 10) -> Float[np.ndarray, " q"]:
    """Normalised discounted cumulative gain with one relevant key.

    `ndcg_i = 1 / log2(1 + rank_i)` if `rank_i <= cutoff`, else 0. The ideal order has the key at
    rank 1 and a gain of 1, so that nothing is left to divide by.

    Arguments, values and errors as for `mrr_metric`.

    Example:
        >>> ndcg_metric(np.array([1.0, 3.0, 11.0])).tolist()
        [1.0, 0.5, 0.0]

    Reference:
        Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR techniques", TOIS 2002.
    """
    ranks = _checked(ranks)
    return _up_to(cutoff, ranks, 1 / np.log2(1 + ranks))


def recall_at_k_metric(ranks: Float[np.ndarray, " q"], *, cutoff: int) -> Float[np.ndarray, " q"]:
    """1 where the relevant key is among the first `cutoff`, else 0.

    `recall_i = [rank_i <= cutoff]`. A tie that straddles the cutoff counts as all or nothing, by
    its mid-rank.

    Args:
        ranks: from `rank_of_key`, at least 1.
        cutoff: how many keys are shown; no default, because recall means little without it.

    Returns:
        0.0 or 1.0 per query.

    Raises:
        ValueError: if `cutoff` is not a positive whole number, or a rank is below 1 or not finite.

    Example:
        >>> recall_at_k_metric(np.array([1.0, 10.0, 10.5]), cutoff=10).tolist()
        [1.0, 1.0, 0.0]
    """
    ranks = _checked(ranks)
    return _up_to(cutoff, ranks, np.ones_like(ranks))


def mean_and_standard_error(values: Float[np.ndarray, " q"]) -> tuple[float, float]:
    """Mean over queries, and how far it would move on another draw of as many queries.

    `se = sqrt(Σ (v_i - mean)² / (q - 1)) / sqrt(q)`.

    It covers the choice of queries alone: neither the training seed, nor queries that come in
    families (functions of one file), which make the true error larger.

    Args:
        values: one per query, from any metric here.

    Returns:
        `(mean, standard error)` in the unit of `values`. One query has no spread to estimate
        from: its standard error is NaN.

    Raises:
        ValueError: if there are no values.

    Example:
        >>> mean, error = mean_and_standard_error(np.array([1.0, 0.0, 0.0, 1.0]))
        >>> round(mean, 3), round(error, 3)
        (0.5, 0.289)
    """
    values = np.asarray(values, np.float64)
    if values.size == 0:
        raise ValueError("The mean of no queries is undefined; evaluate at least one query.")
    if values.size == 1:
        return float(values[0]), math.nan
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(values.size))


def paired_difference(
    values: Float[np.ndarray, " q"], baseline: Float[np.ndarray, " q"]
) -> tuple[float, float]:
    """Mean of `values - baseline` over the same queries, with its standard error.

    Two systems agree on which queries are hard, so their difference is known far better than
    either mean: never judge it by the two separate standard errors.

    Args:
        values: one per query.
        baseline: the other system's, for the same queries in the same order.

    Returns:
        `(mean difference, standard error)`, positive where `values` are higher.

    Raises:
        ValueError: if the two differ in length, or are empty.

    Example:
        >>> mean, error = paired_difference(np.array([0.9, 0.5]), np.array([0.7, 0.5]))
        >>> round(mean, 3), round(error, 3)
        (0.1, 0.1)
    """
    values, baseline = np.asarray(values, np.float64), np.asarray(baseline, np.float64)
    if values.shape != baseline.shape:
        raise ValueError(
            f"values for {values.size} queries and a baseline for {baseline.size} cannot be "
            "paired; give both for the same queries in the same order."
        )
    return mean_and_standard_error(values - baseline)


def _up_to(
    cutoff: int, ranks: Float[np.ndarray, " q"], gains: Float[np.ndarray, " q"]
) -> Float[np.ndarray, " q"]:
    if operator.index(cutoff) < 1:
        raise ValueError(f"cutoff={cutoff} shows no key at all; use a cutoff of 1 or more.")
    return np.where(ranks <= cutoff, gains, 0.0)


def _checked(ranks: Float[np.ndarray, " q"]) -> Float[np.ndarray, " q"]:
    """The ranks in float64, if they are ranks: NaN fails the comparison too."""
    ranks = np.asarray(ranks, np.float64)
    if not np.all((ranks >= 1) & (ranks < np.inf)):
        raise ValueError(
            f"ranks go down to {ranks.min()}, but the best rank is 1 and every rank is finite; "
            "make ranks with rank_of_key."
        )
    return ranks


def _check_finite(scores: Float[np.ndarray, "q n"]) -> None:
    # A NaN compares as not greater: it would read as rank 1, and the metric as perfect.
    bad = ~np.isfinite(scores)
    if bad.any():
        query, key = np.argwhere(bad)[0]
        raise ValueError(
            f"{np.count_nonzero(bad)} of {scores.size} scores are not finite; the first is "
            f"{scores[query, key]} at query {query}, key {key}. Ranks want finite scores: look "
            "for embeddings of zero length divided by their norm, or for overflow."
        )


def _check_columns(relevant: Int[np.ndarray, " q"], *, num_keys: int) -> None:
    if not np.issubdtype(relevant.dtype, np.integer):
        raise TypeError(f"relevant has the type {relevant.dtype}; give column numbers as integers")
    # A negative column would silently count from the end.
    outside = np.flatnonzero((relevant < 0) | (relevant >= num_keys))
    if outside.size:
        raise ValueError(
            f"relevant[{outside[0]}]={relevant[outside[0]]} is no column of {num_keys} keys; "
            f"give columns from 0 to {num_keys - 1}."
        )
