"""Ranks and metrics against arithmetic and ir_measures, with ties and nonfinite scores."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from jaxcl.metrics import (
    mean_and_standard_error,
    mid_ranks,
    mrr_metric,
    ndcg_metric,
    paired_difference,
    paired_interval,
    rank_of_key,
    recall_at_k_metric,
)

METRICS = [mrr_metric, ndcg_metric, recall_at_k_metric]


def optimistic_rank(scores, relevant):
    """A wrong `rank_of_key`, for negative controls: strictly greater scores, and no check."""
    own = scores[np.arange(len(scores)), relevant][:, None]
    return (scores > own).sum(axis=1) + 1.0


def scores_with_ties(rng, num_queries, num_keys):
    return rng.integers(0, 5, (num_queries, num_keys)) / 4


def test_the_rank_counts_better_keys_and_half_of_the_tied_ones():
    scores = np.array([[0.9, 0.5, 0.5, 0.5, 0.1]])
    for key, rank in enumerate([1, 1 + 1 + 2 / 2, 1 + 1 + 2 / 2, 1 + 1 + 2 / 2, 1 + 4]):
        assert rank_of_key(scores, np.array([key])).tolist() == [rank]


def test_the_mid_rank_is_the_mean_over_all_orders_of_the_ties():
    rng = np.random.default_rng(0)
    scores, relevant = scores_with_ties(rng, 50, 7), rng.integers(0, 7, 50)
    better = optimistic_rank(scores, relevant)
    worst = (scores >= scores[np.arange(50), relevant][:, None]).sum(axis=1)
    assert rank_of_key(scores, relevant).tolist() == ((better + worst) / 2).tolist()
    assert (better < worst).any()


def test_constant_scores_rank_in_the_middle_of_the_pool():
    num_keys = 100
    ranks = rank_of_key(np.zeros((3, num_keys)), np.array([0, 50, 99]))
    assert ranks.tolist() == [(1 + num_keys) / 2] * 3
    assert optimistic_rank(np.zeros((3, num_keys)), [0, 50, 99]).tolist() == [1, 1, 1]


@pytest.mark.parametrize("num_keys", [1, 2, 7, 64])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_mid_ranks_of_all_keys_agree_with_the_rank_of_one(num_keys, dtype):
    rng = np.random.default_rng(num_keys)
    scores = scores_with_ties(rng, 20, num_keys).astype(dtype)
    every = mid_ranks(scores)
    for key in range(num_keys):
        assert every[:, key].tolist() == rank_of_key(scores, np.full(20, key)).tolist()
    assert every.sum(axis=1).tolist() == [num_keys * (num_keys + 1) / 2] * 20


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint64, np.int64, np.float16, bool])
def test_ranks_are_those_of_the_same_scores_in_float64(dtype):
    scores = np.array([[0, 1, 127, 3, 1], [0, 0, 0, 0, 0]]).astype(dtype)
    assert mid_ranks(scores).tolist() == mid_ranks(scores.astype(np.float64)).tolist()
    assert mid_ranks(scores.tolist()).tolist() == mid_ranks(scores).tolist()
    relevant = np.array([3, 1])
    exact = rank_of_key(scores.astype(np.float64), relevant)
    assert rank_of_key(scores, relevant.astype(np.uint8)).tolist() == exact.tolist()
    assert rank_of_key(scores.tolist(), relevant.tolist()).tolist() == exact.tolist()


@pytest.mark.usefixtures("unchecked_annotations")
def test_ranks_tell_integers_apart_that_float64_does_not():
    assert mid_ranks(np.array([[2**53, 2**53 + 1]])).tolist() == [[2, 1]]


@pytest.mark.usefixtures("unchecked_annotations")
def test_ranks_take_bfloat16_scores():
    assert mid_ranks(jnp.array([[0.5, 2, 1, 2]], jnp.bfloat16)).tolist() == [[4, 1.5, 3, 1.5]]


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize("metric", METRICS)
def test_a_metric_of_integer_ranks_is_that_of_the_same_floats(metric):
    ranks = np.array([1, 255], np.uint8)
    floats = metric(ranks.astype(np.float64), cutoff=300)
    assert metric(ranks, cutoff=300).tolist() == floats.tolist()
    assert metric(ranks.tolist(), cutoff=300).tolist() == floats.tolist()


@pytest.mark.usefixtures("unchecked_annotations")
def test_means_and_differences_are_computed_in_float64():
    values = np.array([60_000, 60_000, 0], np.float16)  # their sum and squares overflow float16
    mean, error = mean_and_standard_error(values)
    assert mean == 40_000
    np.testing.assert_allclose(error, math.sqrt((2 * 20_000**2 + 40_000**2) / 2 / 3))
    unsigned, baseline = np.array([0, 1], np.uint8), np.array([1, 1], np.uint8)
    assert paired_difference(unsigned, baseline)[0] == -1 / 2
    assert paired_difference(unsigned.tolist(), baseline.tolist())[0] == -1 / 2


@pytest.mark.usefixtures("unchecked_annotations")
def test_columns_that_are_not_integers_are_refused():
    with pytest.raises(TypeError, match="float64"):
        rank_of_key(np.zeros((2, 3)), np.array([0.0, 1.0]))


def test_a_positive_and_a_negative_zero_tie():
    assert mid_ranks(np.array([[0.0, -0.0]])).tolist() == [[1.5, 1.5]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_an_error_that_says_where(bad):
    scores = np.zeros((4, 5))
    scores[2, 3] = scores[3, 0] = bad
    for ranking in (mid_ranks, lambda scores: rank_of_key(scores, np.arange(4))):
        with pytest.raises(ValueError, match=r"2 of 20 scores .* query 2, key 3"):
            ranking(scores)


def test_without_the_error_nan_scores_would_read_as_perfect():
    scores, relevant = np.full((4, 5), math.nan), np.arange(4)
    assert mrr_metric(optimistic_rank(scores, relevant)).mean() == 1.0
    with pytest.raises(ValueError, match="20 of 20 scores"):
        rank_of_key(scores, relevant)


@pytest.mark.parametrize("column", [-1, 5])
def test_a_relevant_key_outside_the_pool_is_an_error(column):
    with pytest.raises(ValueError, match=rf"relevant\[1\]={column} is not a column of 5 keys"):
        rank_of_key(np.zeros((2, 5)), np.array([0, column]))


def test_relevant_of_another_length_is_an_error():
    with pytest.raises((ValueError, TypeCheckError)):
        rank_of_key(np.zeros((2, 5)), np.array([0]))


def test_metrics_by_hand():
    ranks = np.array([1.0, 1.5, 2.0, 10.0, 10.5, 11.0])
    assert mrr_metric(ranks).tolist() == [1, 1 / 1.5, 1 / 2, 1 / 10, 0, 0]
    gains = [1 / math.log2(1 + rank) for rank in ranks[:4]]
    np.testing.assert_allclose(ndcg_metric(ranks), [*gains, 0, 0], rtol=1e-15)
    assert recall_at_k_metric(ranks, cutoff=1).tolist() == [1, 0, 0, 0, 0, 0]
    assert recall_at_k_metric(ranks, cutoff=10).tolist() == [1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("metric", METRICS)
def test_a_metric_gives_one_value_per_query_between_0_and_1_and_never_rises_with_the_rank(metric):
    values = metric(np.arange(1, 30) / 2 + 0.5, cutoff=10)
    assert values.shape == (29,)
    assert values[0] == 1
    assert values[-1] == 0
    assert (np.diff(values) <= 0).all()


@pytest.mark.parametrize("metric", METRICS)
def test_invalid_ranks_and_cutoffs_are_errors(metric):
    for bad in (0.0, 0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match="rank_of_key"):
            metric(np.array([1.0, bad]), cutoff=10)
    with pytest.raises(ValueError, match="cutoff=0"):
        metric(np.array([1.0]), cutoff=0)


@pytest.mark.parametrize(
    ("num_queries", "num_keys"), [(1, 1), (3, 4), (9, 10), (40, 11), (60, 250)]
)
def test_metrics_agree_with_ir_measures(num_queries, num_keys):
    ir_measures = pytest.importorskip("ir_measures")
    RR, R, nDCG = ir_measures.RR, ir_measures.R, ir_measures.nDCG
    rng = np.random.default_rng(num_keys)
    # Permutations, because ir_measures breaks ties differently.
    scores = np.stack([rng.permutation(num_keys) for _ in range(num_queries)]) / num_keys
    relevant = rng.integers(0, num_keys, num_queries)
    ranks = rank_of_key(scores, relevant)
    ours = {
        RR @ 10: mrr_metric(ranks, cutoff=10),
        nDCG @ 10: ndcg_metric(ranks, cutoff=10),
        R @ 1: recall_at_k_metric(ranks, cutoff=1),
        R @ 10: recall_at_k_metric(ranks, cutoff=10),
        R @ 100: recall_at_k_metric(ranks, cutoff=100),
    }
    truth = {str(query): {str(key): 1} for query, key in enumerate(relevant)}
    run = {
        str(query): {str(key): float(score) for key, score in enumerate(row)}
        for query, row in enumerate(scores)
    }
    seen = set()
    for value in ir_measures.iter_calc(list(ours), truth, run):
        assert abs(value.value - ours[value.measure][int(value.query_id)]) < 1e-12, value
        seen.add((value.measure, value.query_id))
    assert len(seen) == len(ours) * num_queries


def test_mean_and_standard_error_by_hand():
    mean, error = mean_and_standard_error(np.array([1.0, 0.0, 0.5]))
    assert mean == (1 + 0 + 0.5) / 3
    variance = (0.5**2 + 0.5**2 + 0**2) / (3 - 1)
    assert math.isclose(error, math.sqrt(variance) / math.sqrt(3), rel_tol=1e-15)


def test_the_standard_error_is_the_spread_of_means_over_draws():
    rng = np.random.default_rng(0)
    draws = rng.random((2000, 50))
    errors = [mean_and_standard_error(draw)[1] for draw in draws]
    # 2,000 draws give a standard deviation to within 1 / sqrt(2 · 2,000), 1.6%; three times that.
    assert math.isclose(np.mean(errors), draws.mean(axis=1).std(), rel_tol=0.05)


def test_one_value_has_no_standard_error_and_none_has_no_mean():
    mean, error = mean_and_standard_error(np.array([0.25]))
    assert mean == 0.25
    assert math.isnan(error)
    with pytest.raises(ValueError, match="at least one query"):
        mean_and_standard_error(np.array([]))


def test_the_paired_difference_is_signed_and_ignores_shared_variance():
    rng = np.random.default_rng(0)
    baseline = rng.random(100)
    gain = np.where(np.arange(100) % 2 == 0, 0.2, 0.0)
    mean, error = paired_difference(baseline + gain, baseline)
    assert math.isclose(mean, 0.1, rel_tol=1e-12)
    assert math.isclose(error, math.sqrt(100 * 0.1**2 / 99) / math.sqrt(100), rel_tol=1e-12)
    assert paired_difference(baseline, baseline + gain)[0] == -mean


def test_values_of_other_queries_cannot_be_paired():
    with pytest.raises((ValueError, TypeCheckError)):
        paired_difference(np.ones(3), np.ones(2))


def quantile(degrees):
    """Of Student's t, which 2.5% of the distribution exceed, from a printed table."""
    return {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645}[degrees]


def test_an_interval_over_seeds_and_queries_by_hand():
    values = np.array([[0.4, 0.2, 0.6], [0.8, 0.4, 0.3]])
    baseline = np.array([[0.1, 0.1, 0.4], [0.2, 0.3, 0.2]])
    found = paired_interval(values, baseline)
    # Differences: 0.3, 0.1, 0.2 with seed 0, and 0.6, 0.1, 0.1 with seed 1.
    of_query, of_seed = [0.45, 0.1, 0.15], [0.6 / 3, 0.8 / 3]
    mean = (0.6 + 0.8) / 6
    queries = sum((one - mean) ** 2 for one in of_query) / 2 / 3
    seeds = sum((one - mean) ** 2 for one in of_seed) / 1 / 2
    rows = [[0.3, 0.1, 0.2], [0.6, 0.1, 0.1]]
    residuals = [
        (one - of_seed[s] - of_query[q] + mean) ** 2
        for s, row in enumerate(rows)
        for q, one in enumerate(row)
    ]
    variance = queries + seeds - sum(residuals) / (1 * 2) / (2 * 3)
    assert variance < queries  # so that the larger of the two errors counts
    t = (quantile(2) * queries + quantile(1) * seeds) / (queries + seeds)
    half = t * math.sqrt(queries)
    assert found.difference == pytest.approx(mean)
    assert found.error_over_queries == pytest.approx(math.sqrt(queries))
    assert found.error_over_seeds == pytest.approx(math.sqrt(seeds))
    assert found[3:] == pytest.approx((mean - half, mean + half), rel=1e-5)


def test_the_variance_is_that_of_queries_and_seeds_less_the_residual():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(5, 1)) + rng.normal(size=(1, 4)) + rng.normal(size=(5, 4)) / 10
    found = paired_interval(values, np.zeros((5, 4)))
    queries, seeds = found.error_over_queries**2, found.error_over_seeds**2
    centred = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    variance = queries + seeds - (centred**2).sum() / (4 * 3) / (5 * 4)
    assert variance > max(queries, seeds)
    t = (quantile(3) * queries + quantile(4) * seeds) / (queries + seeds)
    assert found.high - found.difference == pytest.approx(t * math.sqrt(variance), rel=1e-5)


def test_one_seed_has_an_interval_over_queries_and_one_query_has_none():
    values, baseline = np.array([[0.9, 0.5, 0.4]]), np.array([[0.7, 0.5, 0.3]])
    found = paired_interval(values, baseline)
    mean, error = paired_difference(values[0], baseline[0])
    assert found[:2] == (mean, error)
    assert math.isnan(found.error_over_seeds)
    half = quantile(2) * error
    assert found[3:] == pytest.approx((mean - half, mean + half), rel=1e-5)
    found = paired_interval(values.T, baseline.T)
    assert found.error_over_seeds == pytest.approx(error)
    assert np.isnan([found.error_over_queries, found.low, found.high]).all()


def test_equal_systems_differ_by_nothing():
    values = np.random.default_rng(0).random((3, 20))
    assert paired_interval(values, values) == (0, 0, 0, 0, 0)


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_the_interval_contains_the_difference_of_95_percent_of_experiments(num_seeds):
    """Where seeds and queries both matter; an interval over queries alone fails."""
    rng = np.random.default_rng(num_seeds)
    num_queries, true = 80, 0.3
    both = queries_only = 0
    for _ in range(1000):
        of_seeds = 0.15 * math.sqrt(num_seeds) * rng.normal(size=(num_seeds, 1))
        differences = true + of_seeds + rng.normal(size=num_queries)
        differences += rng.normal(size=differences.shape)
        found = paired_interval(differences, np.zeros_like(differences))
        both += found.low <= true <= found.high
        alone = paired_interval(differences.mean(0)[None], np.zeros((1, num_queries)))
        queries_only += alone.low <= true <= alone.high
    assert 0.93 < both / 1000 < 0.99
    assert queries_only / 1000 < 0.85


def test_one_seed_covers_the_choice_of_queries():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        found = paired_interval(0.3 + rng.normal(size=(1, 12)), np.zeros((1, 12)))
        covered += found.low <= 0.3 <= found.high
    assert 0.935 < covered / 1000 < 0.965  # a normal quantile would give 0.925


def test_values_that_cannot_be_paired_by_seed_and_query_are_an_error():
    with pytest.raises((ValueError, TypeCheckError), match=r"cannot be paired|baseline"):
        paired_interval(np.zeros((2, 3)), np.zeros((3, 3)))
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_interval(np.zeros((0, 3)), np.zeros((0, 3)))
    with pytest.raises(ValueError, match=r"level=1\.0 must be between 0 and 1"):
        paired_interval(np.zeros((2, 3)), np.zeros((2, 3)), level=1.0)
