"""Correlations of two lists of numbers, for the lists themselves and for resamples of them.

A resample is a row of counts: how often each number is drawn. Its ranks are computed from
cumulative counts, so the numbers are sorted only once.
"""

import numpy as np

from jaxcl.typing import Float, Int

__all__ = ["pearson_metric", "pearson_of_resamples", "spearman_metric", "spearman_of_resamples"]

_ROUNDING = 1e-24
"""Variance below this share of the mean square is rounding error, as float64 has 16 digits."""


def pearson_metric(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> float:
    r"""The correlation of two lists: 1 if one is an increasing linear function of the other.

    $$r = \frac{\sum_i (x_i - \bar x)(y_i - \bar y)}
    {\sqrt{\sum_i (x_i - \bar x)^2 \sum_i (y_i - \bar y)^2}}$$

    Args:
      x, y: finite numbers.

    Returns:
      A number from -1 to 1; NaN if one of the lists is constant.

    Raises:
      ValueError: if the lists differ in length or have no numbers, or a number is not finite.

    Example:
      >>> round(pearson_metric(np.array([0.0, 1.0, 2.0]), np.array([0.0, 1.0, 4.0])), 3)
      0.961
    """
    return float(pearson_of_resamples(x, y, _once(x))[0])


def spearman_metric(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> float:
    """The correlation of ranks: 1 if one list is an increasing function of the other.

    Equal numbers share their mean rank. Arguments, return values and errors are as for
    `pearson_metric`.

    Example:
      >>> spearman_metric(np.array([0.0, 1.0, 2.0]), np.array([0.0, 1.0, 4.0]))
      1.0
    """
    return float(spearman_of_resamples(x, y, _once(x))[0])


def pearson_of_resamples(
    x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], counts: Int[np.ndarray, "r n"]
) -> Float[np.ndarray, " r"]:
    """`pearson_metric` of each resample, which contains row i `counts[:, i]` times."""
    _check(x, y)
    return _weighted(_centred(x), _centred(y), counts)


def spearman_of_resamples(
    x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], counts: Int[np.ndarray, "r n"]
) -> Float[np.ndarray, " r"]:
    """`spearman_metric` of each resample, which contains row i `counts[:, i]` times."""
    _check(x, y)
    return _weighted(_ranks(x, counts), _ranks(y, counts), counts)


def _centred(x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Centre and scale the numbers, so that squares neither lose digits nor overflow."""
    if x.min() == x.max():
        return np.zeros(len(x))
    deviations = x.astype(np.float64) - x.mean(dtype=np.float64)
    return deviations / np.abs(deviations).max()


def _ranks(x: Float[np.ndarray, " n"], counts: Int[np.ndarray, "r n"]) -> np.ndarray:
    """The mean rank of each number in each resample, whether or not it is drawn, [r, n]."""
    _, value = np.unique(x, return_inverse=True)
    order = np.argsort(value, kind="stable")
    starts = np.flatnonzero(np.diff(value[order], prepend=-1))
    of_value = np.add.reduceat(counts[:, order], starts, axis=1)
    ranks = np.cumsum(of_value, axis=1) - (of_value - 1) / 2
    return ranks[:, value]


def _weighted(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> Float[np.ndarray, " r"]:
    total = counts.sum(1)
    x_mean, y_mean = ((counts * one).sum(1, keepdims=True) / total[:, None] for one in (x, y))
    x_squares, y_squares = ((counts * np.square(one)).sum(1) for one in (x, y))
    dx, dy = x - x_mean, y - y_mean
    x_variance, y_variance = ((counts * np.square(one)).sum(1) for one in (dx, dy))
    varies = (x_variance > _ROUNDING * x_squares) & (y_variance > _ROUNDING * y_squares)
    covariance = (counts * dx * dy).sum(1)
    scale = np.sqrt(np.where(varies, x_variance * y_variance, 1))
    return np.where(varies, np.clip(covariance / scale, -1, 1), np.nan)


def _once(x: Float[np.ndarray, " n"]) -> Int[np.ndarray, "1 n"]:
    return np.ones((1, len(x)), np.int64)


def _check(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> None:
    if len(x) != len(y) or not len(x):
        raise ValueError(f"lists of {len(x)} and {len(y)} numbers; give two of equal length")
    # Ranks would hide a NaN.
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("a number is not finite; correlations need finite numbers")
