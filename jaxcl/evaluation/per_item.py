"""Metrics that are means of one value per item, such as per image, with standard errors."""

from collections.abc import Mapping

import numpy as np

from jaxcl.evaluation.differences import Difference, query_difference
from jaxcl.metrics import mean_and_standard_error
from jaxcl.typing import Float, Int

__all__ = ["mean_differences", "mean_figures", "values_of_items"]


def mean_figures(values: Mapping[str, Float[np.ndarray, " n"]]) -> dict[str, float]:
    """The mean of each metric over the items, and its standard error.

    Returns:
      For a metric `"accuracy"`, `"accuracy"` and `"accuracy_standard_error"`.

    Example:
      >>> figures = mean_figures({"accuracy": np.array([1.0, 0.0, 0.0, 1.0])})
      >>> {name: round(value, 3) for name, value in figures.items()}
      {'accuracy': 0.5, 'accuracy_standard_error': 0.289}
    """
    figures = {}
    for name, of_items in values.items():
        figures[name], figures[f"{name}_standard_error"] = mean_and_standard_error(of_items)
    return figures


def mean_differences(
    values: Mapping[str, Float[np.ndarray, " n"]], baseline: Mapping[str, Float[np.ndarray, " n"]]
) -> dict[str, Difference]:
    """The difference of each metric between two models on the same items."""
    return {name: query_difference(of_items, baseline[name]) for name, of_items in values.items()}


def values_of_items(
    values: Float[np.ndarray, " q"], items: Int[np.ndarray, " q"], *, num_items: int
) -> Float[np.ndarray, " n"]:
    r"""Gather values of queries into one value per item, so that errors treat items as independent.

    $$v_g = \bar v + \frac{n}{q} \sum_{i \in g} (v_i - \bar v)$$

    Their mean is the mean over the queries, and its standard error is the cluster-robust one, in
    which queries of one item, such as the captions of an image, may depend on each other.

    Args:
      values: one per query.
      items: the item of each query, in [0, num_items).
      num_items: the number n of items.

    Example:
      >>> values_of_items(np.array([1.0, 1.0, 0.0, 0.0]), np.array([0, 0, 1, 1]), num_items=2)
      array([1., 0.])
    """
    mean = values.mean()
    sums = np.bincount(items, values - mean, num_items)
    return mean + sums * num_items / len(values)
