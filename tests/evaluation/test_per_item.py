"""Values per item, whose standard errors allow for several queries per item."""

import numpy as np
import pytest

from jaxcl.evaluation.per_item import mean_differences, mean_figures, values_of_items


def test_values_of_items_have_the_mean_of_the_queries():
    rng = np.random.default_rng(0)
    items = np.concatenate([np.arange(9), rng.integers(9, size=30)])
    values = rng.random(39)
    found = values_of_items(values, items, num_items=9)
    assert found.mean() == pytest.approx(values.mean())
    once = values_of_items(values, np.arange(39), num_items=39)
    np.testing.assert_allclose(once, values)


def test_repeated_queries_do_not_lower_the_error():
    values = np.random.default_rng(0).random(20)
    alone = mean_figures({"x": values})
    items = np.repeat(np.arange(20), 5)
    repeated = mean_figures({"x": values_of_items(values.repeat(5), items, num_items=20)})
    assert repeated == pytest.approx(alone)
    naive = mean_figures({"x": values.repeat(5)})["x_standard_error"]
    assert naive < alone["x_standard_error"] / 2


def test_differences_are_paired_by_item():
    values = np.random.default_rng(0).random(20)
    found = mean_differences({"x": values + 0.25}, {"x": values})["x"]
    assert found.difference == pytest.approx(0.25)
    assert found.standard_error == pytest.approx(0, abs=1e-12)
