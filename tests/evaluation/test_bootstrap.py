"""Bootstrap intervals: draws, ends and coverage."""

import math

import numpy as np
import pytest

from jaxcl.evaluation import bootstrap
from jaxcl.evaluation.bootstrap import bootstrap_interval, resample_counts


def mean_of(values):
    return lambda counts: counts @ values / counts.sum(1)


@pytest.mark.parametrize("block_values", [1, 70, 10**6])
def test_every_resample_draws_as_many_rows_as_there_are(monkeypatch, block_values):
    monkeypatch.setattr(bootstrap, "_BLOCK_VALUES", block_values)
    blocks = list(resample_counts(7, num_resamples=23, seed=0))
    counts = np.concatenate(blocks)
    assert counts.shape == (23, 7)
    assert (counts.sum(1) == 7).all()
    assert counts.min() == 0
    assert counts.max() > 1
    assert max(map(len, blocks)) == {1: 1, 70: 10, 10**6: 23}[block_values]


def test_equal_seeds_give_equal_intervals():
    values = np.random.default_rng(0).normal(size=30)
    interval = bootstrap_interval(mean_of(values), 30)
    assert interval == bootstrap_interval(mean_of(values), 30, seed=0)
    assert interval != bootstrap_interval(mean_of(values), 30, seed=1)


def test_the_interval_of_a_mean_is_that_of_the_normal_approximation():
    values = np.random.default_rng(1).normal(size=400)
    error = values.std() / math.sqrt(400)
    for level, width in {0.95: 1.96, 0.5: 0.674}.items():
        low, high = bootstrap_interval(
            mean_of(values), 400, level=level, num_resamples=4000, seed=2
        )
        assert low == pytest.approx(values.mean() - width * error, abs=0.15 * error)
        assert high == pytest.approx(values.mean() + width * error, abs=0.15 * error)


def test_most_intervals_cover_the_mean_that_the_rows_were_drawn_with():
    rng = np.random.default_rng(3)
    intervals = [
        bootstrap_interval(mean_of(rng.normal(size=60)), 60, num_resamples=200, seed=seed)
        for seed in range(200)
    ]
    covered = np.mean([low < 0 < high for low, high in intervals])
    assert 0.89 < covered < 0.99


def test_undefined_resamples_are_left_out():
    def sometimes(counts):
        return np.where(counts[:, 0] == 0, np.nan, 2.0)

    assert bootstrap_interval(sometimes, 5) == (2.0, 2.0)
    assert all(map(math.isnan, bootstrap_interval(lambda counts: counts[:, 0] * np.nan, 5)))


@pytest.mark.parametrize("sizes", [(0, 10), (10, 0)])
def test_nothing_to_draw_is_an_error(sizes):
    with pytest.raises(ValueError, match="give 1 or more"):
        bootstrap_interval(mean_of(np.ones(10)), sizes[0], num_resamples=sizes[1])
