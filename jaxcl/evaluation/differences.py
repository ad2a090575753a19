"""Paired differences between two models on the same data, with intervals.

Both models are evaluated on the same queries or pairs of texts, and the difference is computed for
each query or pair. The same queries tend to be hard for both models, so the difference is far more
precise than either metric.

When not to trust it: intervals cover the choice of queries or pairs. They cover neither the
training seed (`jaxcl.compare` does) nor queries that depend on each other, such as several queries
for one document. If many metrics are compared, some differ by chance.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from jaxcl.evaluation.bootstrap import bootstrap_values, percentile_interval
from jaxcl.metrics import paired_interval
from jaxcl.typing import Float, Int

__all__ = [
    "Difference",
    "bootstrap_difference",
    "difference_record",
    "differences_table",
    "query_difference",
]

_Statistic = Callable[[Int[np.ndarray, "r n"]], Float[np.ndarray, " r"]]


class Difference(NamedTuple):
    """A metric of a model and of a baseline; values that the data do not determine are NaN.

    Attributes:
      value: the metric of the model.
      baseline: the metric of the baseline.
      difference: `value - baseline`.
      standard_error: the standard error of the difference.
      low: the lower end of the 95% interval of the difference.
      high: the upper end of the interval.
    """

    value: float
    baseline: float
    difference: float
    standard_error: float
    low: float
    high: float


def query_difference(
    values: Float[np.ndarray, " q"], baseline: Float[np.ndarray, " q"]
) -> Difference:
    """The difference of a metric that is a mean over queries, with an interval by Student's t.

    Args:
      values: the metric of the model for each query.
      baseline: the metric of the baseline for the same queries, in the same order.

    Example:
      >>> difference = query_difference(np.array([0.9, 0.5, 0.4]), np.array([0.7, 0.5, 0.3]))
      >>> [round(number, 3) for number in difference]
      [0.6, 0.5, 0.1, 0.058, -0.148, 0.348]
    """
    interval = paired_interval(values[None], baseline[None])
    means = (float(values.mean()), float(baseline.mean()))
    return Difference(
        *means, interval.difference, interval.error_over_queries, interval.low, interval.high
    )


def bootstrap_difference(
    statistic: _Statistic,
    baseline: _Statistic,
    num_rows: int,
    *,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Difference:
    """The difference of a metric that is not a mean, such as a correlation, with an interval.

    Both models use the same resamples. The interval is computed as in `bootstrap_interval`.

    Args:
      statistic: the count of each row in each resample -> the model's metric in each resample.
      baseline: the same function for the baseline.
      num_rows: the number of rows.
      num_resamples: the number of resamples.
      seed: the seed of the resamples.
    """
    once = np.ones((1, num_rows), np.int64)
    value, other = float(statistic(once)[0]), float(baseline(once)[0])
    values = bootstrap_values(
        lambda counts: statistic(counts) - baseline(counts),
        num_rows,
        num_resamples=num_resamples,
        seed=seed,
    )
    if math.isnan(value - other):
        values = values[:0]
    error = float(values.std(ddof=1)) if len(values) > 1 else math.nan
    return Difference(value, other, value - other, error, *percentile_interval(values))


def difference_record(difference: Difference) -> dict[str, Any]:
    """A difference in JSON types, with `None` for NaN."""
    interval = [difference.low, difference.high]
    error = difference.standard_error
    return {
        "difference": None if math.isnan(difference.difference) else difference.difference,
        "standard_error": None if math.isnan(error) else error,
        "interval": None if math.isnan(sum(interval)) else interval,
    }


def differences_table(
    differences: Mapping[tuple[str, str], Difference], *, over: str, title: str | None = None
) -> Table:
    """A table with a row for each difference.

    Args:
      differences: (method, metric) -> the difference; if all methods are empty strings, the table
        has no column for them.
      over: the units that errors are computed over, `"queries"` or `"pairs"`.
      title: the title of the table.
    """
    with_methods = any(method for method, _ in differences)
    table = Table(title=title, box=SIMPLE_HEAD, padding=0, pad_edge=False, title_justify="left")
    for heading in ["method", "metric"] if with_methods else ["metric"]:
        table.add_column(heading)
    for heading in ("model", "against", "difference", f"± over {over}", "95% interval"):
        table.add_column(heading, justify="right", no_wrap=True)
    for (method, metric), one in differences.items():
        names = [method, metric] if with_methods else [metric]
        means = [_number(one.value), _number(one.baseline)]
        error, signed = _number(one.standard_error), _number(one.difference, sign="+")
        ends = [_number(end, sign="+") for end in (one.low, one.high)]
        interval = "not available" if math.isnan(one.low + one.high) else " to ".join(ends)
        table.add_row(*names, *means, signed, error, interval)
    return table


def _number(value: float, *, sign: str = "") -> str:
    return "n/a" if math.isnan(value) else f"{value:{sign}.4f}"
