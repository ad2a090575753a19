"""Graded metrics against arithmetic, expectations over ties, and ir_measures."""

import itertools
import math

import numpy as np
import pytest

from jaxcl.evaluation.graded import (
    CUTOFFS,
    GRADED_METRICS,
    GradedRanks,
    graded_map_metric,
    graded_mrr_metric,
    graded_ndcg_metric,
    graded_precision_metric,
    graded_recall_metric,
    places_of,
)
from jaxcl.metrics import mrr_metric, ndcg_metric, rank_of_key, recall_at_k_metric

CUT = [graded_ndcg_metric, graded_mrr_metric, graded_recall_metric, graded_precision_metric]


def ranks_of(scores, grades):
    """The ranks for scores `[q, n]` and grades `[q, n]`, where 0 is not relevant."""
    parts = []
    for query, (row, of_query) in enumerate(zip(scores, grades, strict=True)):
        documents = np.flatnonzero(of_query > 0)
        better, tied = places_of(row, documents)
        parts.append((np.full(len(documents), query), of_query[documents], better, tied))
    queries, kept, better, tied = (np.concatenate(one) for one in zip(*parts, strict=True))
    return GradedRanks(queries, kept, better.astype(float), tied, len(scores))


def random_grades(rng, num_queries, num_documents):
    grades = rng.integers(1, 4, (num_queries, num_documents))
    grades[rng.random(grades.shape) < 0.7] = 0
    return grades


def values_by_ir_measures(scores, grades):
    """Name of each metric -> its value per query by ir_measures."""
    ir_measures = pytest.importorskip("ir_measures", reason="the package ir_measures is missing")
    families = {
        "ndcg": ir_measures.nDCG,
        "mrr": ir_measures.RR,
        "recall": ir_measures.R,
        "precision": ir_measures.P,
    }
    measures = {
        family @ cutoff: f"{name}@{cutoff}"
        for name, family in families.items()
        for cutoff in CUTOFFS
    }
    measures[ir_measures.AP] = "map"
    by_id = [
        {str(query): {f"d{n}": kind(one) for n, one in enumerate(row)} for query, row in table}
        for kind, table in ((int, enumerate(grades)), (float, enumerate(scores)))
    ]
    values = {name: np.full(len(scores), np.nan) for name in measures.values()}
    for one in ir_measures.iter_calc(list(measures), *by_id):
        values[measures[one.measure]][int(one.query_id)] = one.value
    return values


@pytest.mark.parametrize(
    ("num_queries", "num_documents"), [(1, 1), (5, 3), (30, 99), (30, 101), (20, 250)]
)
def test_every_metric_of_every_query_equals_ir_measures(num_queries, num_documents):
    rng = np.random.default_rng(num_documents)
    grades = random_grades(rng, num_queries, num_documents)
    grades[:, 0] = 1
    if num_queries > 2:
        grades[2] = 0  # a query with only irrelevant labels
    scores = rng.permuted(np.tile(np.arange(num_documents), (num_queries, 1)), axis=1) / 7
    expected = values_by_ir_measures(scores, grades)
    ranks = ranks_of(scores, grades)
    assert set(expected) == set(GRADED_METRICS)
    for name, metric in GRADED_METRICS.items():
        np.testing.assert_allclose(metric(ranks), expected[name], atol=1e-12, err_msg=name)


def test_another_order_would_not_equal_ir_measures():
    rng = np.random.default_rng(0)
    grades, scores = random_grades(rng, 20, 250), rng.random((20, 250))
    expected = values_by_ir_measures(scores, grades)
    ranks = ranks_of(-scores, grades)
    for name, metric in GRADED_METRICS.items():
        assert np.abs(metric(ranks) - expected[name]).max() > 1e-3, name


@pytest.mark.parametrize("seed", range(4))
def test_ties_count_as_the_mean_over_all_orders_of_the_tied_documents(seed):
    rng = np.random.default_rng(seed)
    num_documents = 5
    scores = rng.integers(0, 2 + seed // 2, (1, num_documents)).astype(float)
    grades = random_grades(rng, 1, num_documents)
    grades[0, :2] = 1, 2
    orders = np.array(list(itertools.permutations(range(num_documents))))
    in_order = ranks_of(scores + 1e-3 * orders, np.tile(grades, (len(orders), 1)))
    ranks = ranks_of(scores, grades)
    for name, metric in GRADED_METRICS.items():
        mean = metric(in_order).mean()
        np.testing.assert_allclose(metric(ranks), [mean], rtol=1e-12, err_msg=name)
    for cutoff in (2, 3, 4):
        for metric in CUT:
            mean = metric(in_order, cutoff=cutoff).mean()
            ours = metric(ranks, cutoff=cutoff)
            np.testing.assert_allclose(ours, [mean], rtol=1e-12, err_msg=f"{metric} {cutoff}")


def test_ties_equal_the_mean_of_ir_measures_over_the_orders():
    scores = np.array([[2.0, 1, 1, 1, 0]])
    grades = np.array([[0, 3, 0, 1, 2]])
    orders = [
        np.array([[2.0, *(1 + 0.1 * np.array(order)), 0]])
        for order in itertools.permutations(range(3))
    ]
    by_order = [values_by_ir_measures(order, grades) for order in orders]
    for name, metric in GRADED_METRICS.items():
        mean = np.mean([values[name][0] for values in by_order])
        np.testing.assert_allclose(metric(ranks_of(scores, grades))[0], mean, rtol=1e-12)


def test_metrics_by_hand():
    # The relevant documents have rank 2 (grade 1), rank 3 (grade 2) and no rank (grade 1).
    ranks = GradedRanks(
        queries=np.array([0, 0, 0]),
        grades=np.array([1, 2, 1]),
        better=np.array([1, 2, math.inf]),
        tied=np.array([1, 1, 1]),
        num_queries=2,
    )
    gain = 1 / math.log2(3) + 2 / math.log2(4)
    ideal = 2 / math.log2(2) + 1 / math.log2(3) + 1 / math.log2(4)
    np.testing.assert_allclose(graded_ndcg_metric(ranks, cutoff=10), [gain / ideal, 0], rtol=1e-15)
    assert graded_mrr_metric(ranks, cutoff=10).tolist() == [1 / 2, 0]
    assert graded_mrr_metric(ranks, cutoff=1).tolist() == [0, 0]
    assert graded_recall_metric(ranks, cutoff=2).tolist() == [1 / 3, 0]
    assert graded_recall_metric(ranks, cutoff=10**6).tolist() == [2 / 3, 0]
    assert graded_precision_metric(ranks, cutoff=5).tolist() == [2 / 5, 0]
    assert graded_map_metric(ranks).tolist() == [(1 / 2 + 2 / 3) / 3, 0]


def test_equal_scores_for_all_documents_are_as_good_as_chance():
    num_documents, num_relevant = 50, 5
    grades = np.repeat([[1, 0]], [num_relevant, num_documents - num_relevant], axis=1)
    ranks = ranks_of(np.zeros((1, num_documents)), grades)
    share = num_relevant / num_documents
    np.testing.assert_allclose(graded_precision_metric(ranks, cutoff=10), [share])
    np.testing.assert_allclose(graded_recall_metric(ranks, cutoff=10), [10 / num_documents])
    np.testing.assert_allclose(graded_mrr_metric(ranks, cutoff=1), [share])
    mean_precision = sum(
        (1 + (num_relevant - 1) * (rank - 1) / (num_documents - 1)) / rank
        for rank in range(1, num_documents + 1)
    )
    np.testing.assert_allclose(graded_map_metric(ranks), [mean_precision / num_documents])


def test_one_relevant_document_without_ties_is_scored_as_in_the_library():
    rng = np.random.default_rng(0)
    scores, relevant = rng.random((40, 30)), rng.integers(0, 30, 40)
    ranks = ranks_of(scores, np.eye(30, dtype=int)[relevant])
    of_one = rank_of_key(scores, relevant)
    for cutoff in (1, 10):
        np.testing.assert_allclose(
            graded_ndcg_metric(ranks, cutoff=cutoff), ndcg_metric(of_one, cutoff=cutoff)
        )
        np.testing.assert_allclose(
            graded_mrr_metric(ranks, cutoff=cutoff), mrr_metric(of_one, cutoff=cutoff)
        )
        np.testing.assert_allclose(
            graded_recall_metric(ranks, cutoff=cutoff), recall_at_k_metric(of_one, cutoff=cutoff)
        )


def test_no_labels_give_zeros():
    nothing = np.zeros(0, int)
    ranks = GradedRanks(nothing, nothing, np.zeros(0), nothing, 3)
    for metric in GRADED_METRICS.values():
        assert metric(ranks).tolist() == [0, 0, 0]


@pytest.mark.parametrize("metric", CUT)
def test_a_cutoff_below_1_is_an_error(metric):
    ranks = ranks_of(np.zeros((1, 2)), np.array([[1, 0]]))
    with pytest.raises(ValueError, match="cutoff=0"):
        metric(ranks, cutoff=0)
