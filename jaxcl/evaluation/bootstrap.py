"""Confidence intervals from resampled data."""

from collections.abc import Callable, Iterator

import numpy as np

from jaxcl.typing import Float, Int

__all__ = ["bootstrap_interval", "bootstrap_values", "percentile_interval", "resample_counts"]

_BLOCK_VALUES = 2**21
"""The maximum number of values in a block of resamples, so that a block fits in the cache."""


def bootstrap_interval(
    statistic: Callable[[Int[np.ndarray, "r n"]], Float[np.ndarray, " r"]],
    num_rows: int,
    *,
    num_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile bootstrap interval of a statistic of `n` rows.

    A resample draws `n` rows with replacement. The interval covers the middle `level` of the
    statistic over all resamples. It estimates how much the statistic would vary on other rows of
    the same kind. It accounts neither for the training seed nor for rows that depend on each
    other, such as pairs that share a text.

    Args:
      statistic: the count of each row in each resample -> the statistic of each resample, or NaN
        if it is undefined; the interval ignores NaN.
      num_rows: the number of rows.
      num_resamples: the number of resamples; with 1,000, each end of the interval is accurate to
        about a twentieth of its width.
      level: the share of resamples inside the interval.
      seed: the seed of the draws; equal seeds give equal intervals.

    Returns:
      The lower and the upper end; NaN if the statistic is undefined for all resamples.

    Reference: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    """
    values = bootstrap_values(statistic, num_rows, num_resamples=num_resamples, seed=seed)
    return percentile_interval(values, level=level)


def bootstrap_values(
    statistic: Callable[[Int[np.ndarray, "r n"]], Float[np.ndarray, " r"]],
    num_rows: int,
    *,
    num_resamples: int,
    seed: int,
) -> Float[np.ndarray, " _"]:
    """The statistic of all resamples, without NaN; arguments as for `bootstrap_interval`."""
    draws = resample_counts(num_rows, num_resamples=num_resamples, seed=seed)
    values = np.concatenate([np.asarray(statistic(counts), np.float64) for counts in draws])
    return values[~np.isnan(values)]


def percentile_interval(
    values: Float[np.ndarray, " _"], *, level: float = 0.95
) -> tuple[float, float]:
    """The ends of the middle `level` of the values; NaN if there are none."""
    if not values.size:
        return np.nan, np.nan
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def resample_counts(
    num_rows: int, *, num_resamples: int, seed: int
) -> Iterator[Int[np.ndarray, "r n"]]:
    """Draw resamples in blocks, as the number of times that each row is drawn."""
    if num_rows < 1 or num_resamples < 1:
        raise ValueError(f"num_rows={num_rows}, num_resamples={num_resamples}; give 1 or more each")
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK_VALUES // num_rows)
    for first in range(0, num_resamples, block):
        count = min(block, num_resamples - first)
        rows = rng.integers(num_rows, size=(count, num_rows))
        rows += num_rows * np.arange(count)[:, None]
        counts = np.bincount(rows.ravel(), minlength=count * num_rows)
        yield counts.reshape(count, num_rows)
