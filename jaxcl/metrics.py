"""Ranks and retrieval metrics in NumPy, with one value per query that the caller averages.

Each query has one relevant key, and every metric is a function of its *rank*. `rank_of_key` gives
ties their mid-rank, and rejects scores that are not finite.
"""

import math
import operator
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from jaxcl.typing import Float, Int

__all__ = [
    "PairedInterval",
    "mean_and_standard_error",
    "mid_ranks",
    "mrr_metric",
    "ndcg_metric",
    "paired_difference",
    "paired_interval",
    "rank_of_key",
    "recall_at_k_metric",
]


def rank_of_key(
    scores: Float[np.ndarray, "q n"], relevant: Int[np.ndarray, " q"]
) -> Float[np.ndarray, " q"]:
    """The rank of each query's relevant key among all keys, from 1, with mid-ranks for ties.

    `rank_i = 1 + #{j : s_ij > s_ir} + #{j ≠ r : s_ij = s_ir} / 2`, with `r = relevant_i`.

    The mid-rank is the mean rank over all orders of the tied keys. If ties were ignored, a model
    that gives all keys the same score would get a perfect result.

    Args:
      scores: scores of all keys in the pool, not only of a shortlist; higher is better.
      relevant: column of each query's relevant key, in [0, n).

    Returns:
      Ranks in [1, n], float64, multiples of one half.

    Raises:
      ValueError: if the shapes do not match, a score is NaN or infinite, or an entry of
        `relevant` is not a column of `scores`.
      TypeError: if `relevant` is not an array of integers.

    Example:
      >>> scores = np.array([[0.9, 0.1, 0.5], [0.2, 0.2, 0.7]])
      >>> rank_of_key(scores, np.array([2, 0])).tolist()
      [2.0, 2.5]
    """
    scores, relevant = np.asarray(scores), np.asarray(relevant)
    if scores.ndim != 2 or relevant.shape != scores.shape[:1]:
        raise ValueError(
            f"scores {scores.shape} and relevant {relevant.shape} do not match; give scores [q, n] "
            "and one relevant column per query, [q]"
        )
    _check_finite(scores)
    _check_columns(relevant, num_keys=scores.shape[1])
    own_scores = np.take_along_axis(scores, relevant[:, None], axis=1)
    num_better = np.count_nonzero(scores > own_scores, axis=1)
    num_tied_others = np.count_nonzero(scores == own_scores, axis=1) - 1
    return 1.0 + num_better + num_tied_others / 2


def mid_ranks(scores: Float[np.ndarray, "q n"]) -> Float[np.ndarray, "q n"]:
    """The rank of every key in its row, from 1, with mid-ranks for ties.

    `rank_ij = 1 + #{l : s_il > s_ij} + #{l ≠ j : s_il = s_ij} / 2`.

    If you only need the ranks of relevant keys, `rank_of_key` computes them without sorting.

    Args:
      scores: scores of all keys in the pool; higher is better.

    Returns:
      Ranks in [1, n], float64; every row sums to n (n + 1) / 2.

    Raises:
      ValueError: if `scores` is not a matrix, or a score is NaN or infinite.

    Example:
      >>> mid_ranks(np.array([[0.9, 0.1, 0.9, 0.5]])).tolist()
      [[1.5, 4.0, 1.5, 3.0]]
    """
    scores = np.asarray(scores)
    if scores.ndim != 2:
        raise ValueError(f"scores have the shape {scores.shape}; give one row per query, [q, n]")
    _check_finite(scores)
    ranks = np.empty(scores.shape)
    # Looping over rows needs the memory of one row, and is as fast as all rows at once.
    for row, out in zip(scores, ranks, strict=True):
        _, tie, sizes = np.unique(row, return_inverse=True, return_counts=True)
        # Count from the lowest score, since unsigned scores cannot be negated.
        out[:] = row.size + 1 - (np.cumsum(sizes) - (sizes - 1) / 2)[tie]
    return ranks


def mrr_metric(ranks: Float[np.ndarray, " q"], *, cutoff: int = 10) -> Float[np.ndarray, " q"]:
    """The reciprocal rank of each query; its mean over queries is MRR@cutoff.

    `rr_i = 1 / rank_i` if `rank_i <= cutoff`, else 0.

    Args:
      ranks: the result of `rank_of_key`, at least 1. Mid-ranks are used directly: 1.5 gives 2/3.
      cutoff: the last rank with a value above 0; 10 as in the MS MARCO passage task.

    Returns:
      Values in [0, 1].

    Raises:
      ValueError: if `cutoff` is below 1, or a rank is below 1 or not finite.
      TypeError: if `cutoff` is not an integer.

    Example:
      >>> mrr_metric(np.array([1.0, 4.0, 11.0])).tolist()
      [1.0, 0.25, 0.0]
    """
    ranks = _checked(ranks)
    return _up_to(cutoff, ranks, 1 / ranks)


def ndcg_metric(ranks: Float[np.ndarray, " q"], *, cutoff: int = 10) -> Float[np.ndarray, " q"]:
    """Normalised discounted cumulative gain with one relevant key.

    `ndcg_i = 1 / log2(1 + rank_i)` if `rank_i <= cutoff`, else 0. The ideal order has the key at
    rank 1 and a gain of 1, so no normalisation is necessary.

    Arguments, return values and errors are as for `mrr_metric`.

    Example:
      >>> ndcg_metric(np.array([1.0, 3.0, 11.0])).tolist()
      [1.0, 0.5, 0.0]

    Reference:
      Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR techniques", TOIS 2002.
    """
    ranks = _checked(ranks)
    return _up_to(cutoff, ranks, 1 / np.log2(1 + ranks))


def recall_at_k_metric(ranks: Float[np.ndarray, " q"], *, cutoff: int) -> Float[np.ndarray, " q"]:
    """Whether the relevant key is among the first `cutoff` keys, as 1 or 0.

    `recall_i = [rank_i <= cutoff]`. Keys that tie across the cutoff all have the same mid-rank, so
    either all of them are retrieved or none.

    Args:
      ranks: the result of `rank_of_key`, at least 1.
      cutoff: number of retrieved keys. It has no default, since recall means little without it.

    Returns:
      0.0 or 1.0 per query.

    Raises:
      ValueError: if `cutoff` is below 1, or a rank is below 1 or not finite.
      TypeError: if `cutoff` is not an integer.

    Example:
      >>> recall_at_k_metric(np.array([1.0, 10.0, 10.5]), cutoff=10).tolist()
      [1.0, 1.0, 0.0]
    """
    ranks = _checked(ranks)
    return _up_to(cutoff, ranks, np.ones_like(ranks))


def mean_and_standard_error(values: Float[np.ndarray, " q"]) -> tuple[float, float]:
    """The mean over queries, and its standard error.

    `se = sqrt(Σ (v_i - mean)² / (q - 1)) / sqrt(q)`.

    The standard error covers only the sampling of queries. It ignores the training seed and
    correlations between queries, such as functions from one file, which make the true error larger.

    Args:
      values: one value per query, from any metric of this module.

    Returns:
      `(mean, standard error)`, in the unit of `values`. The standard error of a single query is
      NaN.

    Raises:
      ValueError: if there are no values.

    Example:
      >>> mean, error = mean_and_standard_error(np.array([1.0, 0.0, 0.0, 1.0]))
      >>> round(mean, 3), round(error, 3)
      (0.5, 0.289)
    """
    values = np.asarray(values, np.float64)
    if values.size == 0:
        raise ValueError("the mean of no queries is undefined; evaluate at least one query")
    if values.size == 1:
        return float(values[0]), math.nan
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(values.size))


def paired_difference(
    values: Float[np.ndarray, " q"], baseline: Float[np.ndarray, " q"]
) -> tuple[float, float]:
    """The mean of `values - baseline` over the same queries, and its standard error.

    Most systems find the same queries hard, so the difference is far more precise than either mean.
    Do not use the standard errors of the two means to assess it.

    Args:
      values: one value per query.
      baseline: another system's values for the same queries, in the same order.

    Returns:
      `(mean difference, standard error)`; positive if `values` are higher.

    Raises:
      ValueError: if the lengths differ or are 0.

    Example:
      >>> mean, error = paired_difference(np.array([0.9, 0.5]), np.array([0.7, 0.5]))
      >>> round(mean, 3), round(error, 3)
      (0.1, 0.1)
    """
    values, baseline = np.asarray(values, np.float64), np.asarray(baseline, np.float64)
    if values.shape != baseline.shape:
        raise ValueError(
            f"values for {values.size} queries and a baseline for {baseline.size} cannot be "
            "paired; give both for the same queries, in the same order"
        )
    return mean_and_standard_error(values - baseline)


class PairedInterval(NamedTuple):
    """A mean paired difference with standard errors and an interval; NaN if data are too few.

    Attributes:
      difference: the mean over seeds and queries.
      error_over_queries: the standard error over queries, after averaging over seeds; NaN with one
        query.
      error_over_seeds: the standard error over seeds, after averaging over queries; NaN with one
        seed.
      low: the lower end of the interval.
      high: the upper end of the interval.
    """

    difference: float
    error_over_queries: float
    error_over_seeds: float
    low: float
    high: float


def paired_interval(
    values: Float[np.ndarray, "seeds q"],
    baseline: Float[np.ndarray, "seeds q"],
    *,
    level: float = 0.95,
) -> PairedInterval:
    """The confidence interval of a mean paired difference over both seeds and queries.

    The differences `d_sq` follow a crossed model with random effects: `d_sq = μ + a_s + b_q + e_sq`
    with an effect `a` of the seed, `b` of the query, and a residual `e`. With `S` seeds and `Q`
    queries,

    `E_q² = Σ_q (d_·q - d_··)² / (Q - 1) / Q`, with the expectation `σ_b²/Q + σ_e²/(S Q)`,
    `E_s² = Σ_s (d_s· - d_··)² / (S - 1) / S`, with the expectation `σ_a²/S + σ_e²/(S Q)`,
    `R² = Σ_sq (d_sq - d_s· - d_·q + d_··)² / ((S - 1) (Q - 1) S Q)`, with the expectation
    `σ_e²/(S Q)`.

    Both squared errors contain the residual, so the variance of the mean is
    `V = E_q² + E_s² - R²`, but at least `E_q²` and `E_s²`. The ends of the interval are
    `d_·· ± t sqrt(V)`, where `t` is the mean of the quantiles of Student's t with Q - 1 and S - 1
    degrees of freedom, weighted by `E_q²` and `E_s²`. With one seed they are `d_·· ± t_{Q-1} E_q`,
    which covers only the choice of queries.

    In simulations with 2 to 10 seeds and 30 or 200 queries, 93 to 99% of the intervals contain the
    true difference, whichever of the three effects is largest. Two seeds give wide intervals, since
    Student's t with one degree of freedom has the quantile 12.7.

    Args:
      values: one value per seed and query.
      baseline: another system's values for the same seeds and queries in the same order.
      level: the confidence level.

    Returns:
      A difference that is positive if `values` are higher, with its errors and interval. With a
      single query, the ends of the interval are NaN.

    Raises:
      ValueError: if the shapes differ, there are no values, or `level` is not between 0 and 1.

    Example:
      >>> interval = paired_interval(np.array([[0.9, 0.5, 0.4]]), np.array([[0.7, 0.5, 0.3]]))
      >>> [round(number, 3) for number in interval]
      [0.1, 0.058, nan, -0.148, 0.348]

    Reference:
      Searle, Casella and McCulloch, "Variance Components", 1992, chapter 4, for the expectations;
      Cochran and Cox, "Experimental Designs", 2nd edition 1957, for the weighted quantile.
    """
    values, baseline = np.asarray(values, np.float64), np.asarray(baseline, np.float64)
    if values.shape != baseline.shape or values.ndim != 2 or not values.size:
        raise ValueError(
            f"values {values.shape} and a baseline {baseline.shape} cannot be paired; give both "
            "for the same seeds and queries, [seeds, q]"
        )
    if not 0 < level < 1:
        raise ValueError(f"level={level} must be between 0 and 1")
    differences = values - baseline
    num_seeds, num_queries = differences.shape
    difference, over_queries = mean_and_standard_error(differences.mean(0))
    _, over_seeds = mean_and_standard_error(differences.mean(1))
    if num_queries == 1:
        return PairedInterval(difference, math.nan, over_seeds, math.nan, math.nan)
    half = _t_quantile(num_queries - 1, level) * over_queries
    if num_seeds > 1:
        half = _half_width(differences, over_queries**2, over_seeds**2, level)
    return PairedInterval(
        difference, over_queries, over_seeds, difference - half, difference + half
    )


def _half_width(
    differences: Float[np.ndarray, "seeds q"], of_queries: float, of_seeds: float, level: float
) -> float:
    """The half-width of the interval, from the squared errors over queries and over seeds."""
    num_seeds, num_queries = differences.shape
    residuals = differences - differences.mean(0) - differences.mean(1, keepdims=True)
    residuals += differences.mean()
    degrees = (num_seeds - 1) * (num_queries - 1)
    residual = (residuals**2).sum() / degrees / differences.size
    variance = max(of_queries + of_seeds - residual, of_queries, of_seeds)
    if variance == 0:
        return 0.0
    quantiles = [_t_quantile(count - 1, level) for count in (num_queries, num_seeds)]
    return math.sqrt(variance) * float(np.average(quantiles, weights=[of_queries, of_seeds]))


def _t_quantile(degrees: int, level: float) -> float:
    """The number `t` for which a share `level` of Student's t distribution is in [-t, t]."""
    return float(stdtrit(degrees, (1 + level) / 2))


def _up_to(
    cutoff: int, ranks: Float[np.ndarray, " q"], gains: Float[np.ndarray, " q"]
) -> Float[np.ndarray, " q"]:
    if operator.index(cutoff) < 1:
        raise ValueError(f"cutoff={cutoff} must be at least 1")
    return np.where(ranks <= cutoff, gains, 0.0)


def _checked(ranks: Float[np.ndarray, " q"]) -> Float[np.ndarray, " q"]:
    """Check ranks, and convert them to float64."""
    ranks = np.asarray(ranks, np.float64)
    # NaN fails this comparison too.
    if not np.all((ranks >= 1) & (ranks < np.inf)):
        raise ValueError(
            f"ranks from {ranks.min()} to {ranks.max()} must be finite and at least 1; compute "
            "them with rank_of_key"
        )
    return ranks


def _check_finite(scores: Float[np.ndarray, "q n"]) -> None:
    # Comparisons with NaN are false, so a NaN would get rank 1 and a perfect metric.
    invalid = ~np.isfinite(scores)
    if invalid.any():
        query, key = np.argwhere(invalid)[0]
        raise ValueError(
            f"{np.count_nonzero(invalid)} of {scores.size} scores are not finite; the first is "
            f"{scores[query, key]} at query {query}, key {key}; check for overflow, and for zero "
            "embeddings divided by their norm"
        )


def _check_columns(relevant: Int[np.ndarray, " q"], *, num_keys: int) -> None:
    if not np.issubdtype(relevant.dtype, np.integer):
        raise TypeError(f"relevant has the type {relevant.dtype}; give column numbers as integers")
    # A negative column would silently index from the end.
    outside = np.flatnonzero((relevant < 0) | (relevant >= num_keys))
    if outside.size:
        raise ValueError(
            f"relevant[{outside[0]}]={relevant[outside[0]]} is not a column of {num_keys} keys; "
            f"give columns from 0 to {num_keys - 1}"
        )
