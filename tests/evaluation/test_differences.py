"""Paired differences between two models: their values, intervals, coverage and tables."""

import io
import math

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from jaxcl.data.scored_pairs import ScoredPairs
from jaxcl.evaluation.differences import (
    Difference,
    bootstrap_difference,
    difference_record,
    differences_table,
    query_difference,
)
from jaxcl.evaluation.evaluate_set import check_methods
from jaxcl.evaluation.pair_classification import (
    PairSet,
    best_accuracy,
    best_f1,
    metric_of_resamples,
)
from jaxcl.evaluation.protocol import ComparableSet
from jaxcl.evaluation.sts import StsSet


def scored_pairs(scores):
    texts = [str(row) for row in range(len(scores))]
    fields = ("text1", "text2", "score")
    return ScoredPairs(texts, texts, np.float64(scores), fields, ("query", "query"), "some")


def mean_of(values):
    return lambda counts: counts @ values / counts.sum(1)


def text_of(table):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_a_difference_over_queries_is_that_of_a_paired_t_test():
    rng = np.random.default_rng(0)
    baseline = rng.random(30)
    values = baseline + 0.05 + 0.1 * rng.normal(size=30)
    found = query_difference(values, baseline)
    test = stats.ttest_rel(values, baseline)
    assert (found.value, found.baseline) == (values.mean(), baseline.mean())
    assert found.difference == pytest.approx(values.mean() - baseline.mean())
    assert found.standard_error == pytest.approx(found.difference / test.statistic)
    ends = test.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high))


def test_one_query_has_a_difference_and_no_interval():
    found = query_difference(np.array([0.5]), np.array([0.25]))
    assert difference_record(found) == {
        "difference": 0.25,
        "standard_error": None,
        "interval": None,
    }
    assert "not available" in text_of(differences_table({("", "map"): found}, over="queries"))


def test_a_bootstrap_of_means_gives_the_errors_of_paired_means():
    rng = np.random.default_rng(1)
    baseline = rng.normal(size=300)
    values = baseline + 0.1 + 0.2 * rng.normal(size=300)
    found = bootstrap_difference(mean_of(values), mean_of(baseline), 300, num_resamples=4000)
    expected = query_difference(values, baseline)
    assert found[:3] == pytest.approx(expected[:3])
    assert found.standard_error == pytest.approx(expected.standard_error, rel=0.1)
    error = expected.standard_error
    assert found[4:] == pytest.approx(expected[4:], abs=0.2 * error)
    # Negative control: unpaired errors would be several times as large.
    assert found.standard_error < values.std() / math.sqrt(300) / 3


def test_a_model_does_not_differ_from_itself():
    rng = np.random.default_rng(2)
    scores, similarities = rng.normal(size=40), np.float32(rng.normal(size=40))
    for data_set in (StsSet(scored_pairs(scores)), PairSet(scored_pairs(scores > 0))):
        differences = data_set.differences(similarities, similarities)
        assert list(differences) == list(data_set.metrics)
        for name, one in differences.items():
            assert one[2:] == (0, 0, 0, 0)
            assert one.value == one.baseline == data_set.figures(similarities)[name]


@pytest.mark.parametrize("kind", [StsSet, PairSet])
def test_differences_on_pairs_are_those_of_the_figures_and_pair_the_resamples(kind):
    rng = np.random.default_rng(3)
    scores = rng.normal(size=200)
    data_set = kind(scored_pairs(scores > 0 if kind is PairSet else scores))
    good = np.float32(scores + 0.5 * rng.normal(size=200))
    bad = np.float32(good + rng.normal(size=200))
    found = data_set.differences(good, bad)
    figures = [data_set.figures(one) for one in (good, bad)]
    for name in data_set.metrics:
        one = found[name]
        assert (one.value, one.baseline) == pytest.approx([one[name] for one in figures])
        assert one.difference == one.value - one.baseline > 0
        assert one.low < one.difference < one.high
        turned = data_set.differences(bad, good)[name]
        assert turned[2:] == pytest.approx(
            (-one.difference, one.standard_error, -one.high, -one.low)
        )
    main = data_set.metrics[0]
    low, high = figures[0][f"{main}_low"], figures[0][f"{main}_high"]
    width, alone = found[main].high - found[main].low, high - low
    other = figures[1][f"{main}_high"] - figures[1][f"{main}_low"]
    assert width < math.hypot(alone, other)  # of two independent intervals


def test_intervals_of_spearman_differences_cover_the_true_one():
    rng = np.random.default_rng(4)
    covered = []
    for seed in range(150):
        scores = rng.normal(size=60)
        ours, theirs = (np.float32(scores + 0.7 * rng.normal(size=60)) for _ in range(2))
        data_set = StsSet(scored_pairs(scores), num_resamples=200, seed=seed)
        one = data_set.differences(ours, theirs)["spearman"]
        covered.append(one.low <= 0 <= one.high)  # equally good models
    assert 0.88 < np.mean(covered) <= 0.99


def test_a_model_with_constant_similarities_has_no_difference():
    scores = np.arange(10.0)
    found = StsSet(scored_pairs(scores)).differences(np.float32(scores), np.ones(10, np.float32))
    assert found["spearman"].value == pytest.approx(1)
    assert np.isnan(found["spearman"][1:]).all()
    assert set(difference_record(found["spearman"]).values()) == {None}


@pytest.mark.parametrize(("name", "best"), [("f1", best_f1), ("accuracy", best_accuracy)])
def test_the_best_threshold_of_a_resample_is_that_of_the_repeated_pairs(name, best):
    rng = np.random.default_rng(5)
    similarities = np.float32(rng.integers(0, 6, 12) / 4)
    labels = rng.random(12) < 0.4
    counts = rng.integers(0, 3, (50, 12))
    counts[0] = 1
    counts[1] = labels  # positive pairs alone
    found = metric_of_resamples(name, similarities, labels, counts)
    for count, value in zip(counts, found, strict=True):
        repeated = np.repeat(np.arange(12), count)
        assert value == pytest.approx(best(similarities[repeated], labels[repeated])[0])
    negative = metric_of_resamples(name, similarities, labels, np.int64([~labels]))
    assert (negative[0] == 1) if best is best_accuracy else np.isnan(negative[0])
    precision = metric_of_resamples("average_precision", similarities, labels, counts)
    assert precision.shape == found.shape


def test_the_table_fits_a_terminal_and_names_what_it_shows():
    one = Difference(0.8344, 0.7911, 0.0433, 0.0181, 0.0078, 0.0788)
    rows = {("dense", "ndcg@10"): one, ("hybrid", "recall@100"): one._replace(low=math.nan)}
    text = text_of(differences_table(rows, over="queries", title="validation, plain"))
    title, heading, _, first, second = [line for line in text.splitlines() if line.strip()]
    assert title.strip() == "validation, plain"
    for name in ("method", "metric", "model", "against", "difference", "± over queries"):
        assert name in heading
    assert "95% interval" in heading
    assert first.split() == [
        *("dense", "ndcg@10", "0.8344", "0.7911", "+0.0433", "0.0181"),
        *("+0.0078", "to", "+0.0788"),
    ]
    assert second.rstrip().endswith("not available")
    assert "…" not in text
    assert "method" not in text_of(differences_table({("", "spearman"): one}, over="pairs"))


def test_only_sets_that_can_compare_models_do():
    class Own:
        kind, fingerprint, metrics, description = "own", "", ("score",), "own texts"
        inputs = ("query",)

        def evaluate(self, encode):
            return {"score": 1.0}

    assert isinstance(StsSet(scored_pairs([1, 2])), ComparableSet)
    check_methods(Own(), None)
    with pytest.raises(ValueError, match="cannot be compared on a set of the kind 'own'"):
        check_methods(Own(), None, compares=True)
