"""Correlations, with ties and resamples, next to SciPy's."""

import math
import warnings

import numpy as np
import pytest
from scipy import stats

from jaxcl.evaluation.bootstrap import resample_counts
from jaxcl.evaluation.correlation import (
    pearson_metric,
    pearson_of_resamples,
    spearman_metric,
    spearman_of_resamples,
)

PAIRS = {
    "pearson": (pearson_metric, pearson_of_resamples, stats.pearsonr),
    "spearman": (spearman_metric, spearman_of_resamples, stats.spearmanr),
}
every_correlation = pytest.mark.parametrize("name", PAIRS)


def lists(seed, *, size=50, ties=True):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=size)
    y = x + rng.normal(size=size)
    return (x.round(), (2 * y).round() / 2) if ties else (x, y)


def test_pearson_is_the_formula():
    x, y = np.array([0.0, 1.0, 2.0]), np.array([0.0, 1.0, 4.0])
    covariance = -1 * (0 - 5 / 3) + 0 + 1 * (4 - 5 / 3)
    squares = 2 * ((5 / 3) ** 2 + (2 / 3) ** 2 + (7 / 3) ** 2)
    assert pearson_metric(x, y) == pytest.approx(covariance / math.sqrt(squares))


def test_spearman_gives_equal_numbers_their_mean_rank():
    x, y = np.array([1.0, 1.0, 2.0]), np.array([5.0, 6.0, 7.0])  # ranks 1.5, 1.5, 3 and 1, 2, 3
    assert spearman_metric(x, y) == pytest.approx((0.5 + 0 + 1) / math.sqrt(1.5 * 2))


@every_correlation
@pytest.mark.parametrize(
    ("size", "ties"), [(2, False), (3, True), (3, False), (50, True), (1001, True), (1001, False)]
)
def test_correlations_are_those_of_scipy(name, size, ties):
    metric, _, reference = PAIRS[name]
    x, y = lists(size + 3, size=size, ties=ties)
    expected = reference(x, y).statistic
    assert abs(expected) > 0.1
    assert metric(x, y) == pytest.approx(expected, abs=1e-12)
    assert metric(x, -y) == pytest.approx(-expected, abs=1e-12)


@every_correlation
def test_a_resample_has_the_correlation_of_its_drawn_rows(name):
    _, of_resamples, reference = PAIRS[name]
    x, y = lists(1)
    (counts,) = resample_counts(len(x), num_resamples=20, seed=0)
    found = of_resamples(x, y, counts)
    for value, row in zip(found, counts, strict=True):
        assert row.max() > 1
        assert value == pytest.approx(reference(x.repeat(row), y.repeat(row)).statistic, abs=1e-12)
    assert np.ptp(found) > 0.05


@every_correlation
@pytest.mark.parametrize("constant", [0.0, 0.1, 3.3, 1e9])
def test_a_constant_has_no_correlation(name, constant):
    metric, of_resamples, _ = PAIRS[name]
    x, y = lists(0, size=7)
    assert math.isnan(metric(np.full(7, constant), y))
    assert math.isnan(metric(y, np.full(7, constant)))
    counts = np.concatenate([7 * np.eye(7, dtype=np.int64), np.ones((1, 7), np.int64)])
    assert np.isnan(of_resamples(x + constant, y, counts)).tolist() == [True] * 7 + [False]


def test_rounding_errors_of_a_mean_are_not_a_correlation():
    x, _ = lists(0, size=49, ties=False)
    counts = 49 * np.eye(49, dtype=np.int64)
    assert np.isnan(pearson_of_resamples(x, x, counts)).all()
    assert np.isfinite(pearson_of_resamples(x, x, counts + 1)).all()


def test_numbers_far_from_zero_keep_their_digits():
    x, y = lists(2, ties=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SciPy's, on nearly constant numbers
        assert pearson_metric(x + 1e6, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-8)
    assert pearson_metric(1e200 * x, 1e-200 * y) == pytest.approx(pearson_metric(x, y))


@every_correlation
def test_an_undefined_correlation_is_an_error(name):
    metric = PAIRS[name][0]
    with pytest.raises(ValueError, match="lists of 0 and 0"):
        metric(np.zeros(0), np.zeros(0))
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="not finite"):
            metric(np.array([1.0, bad]), np.array([1.0, 2.0]))
        with pytest.raises(ValueError, match="not finite"):
            metric(np.array([1.0, 2.0]), np.array([1.0, bad]))
