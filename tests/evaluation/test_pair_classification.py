"""Pair classification, against an implementation that tries every threshold."""

import numpy as np
import pytest

from jaxcl.evaluation.bootstrap import resample_counts
from jaxcl.evaluation.pair_classification import (
    PairSet,
    best_accuracy,
    best_f1,
    metric_of_resamples,
)
from jaxcl.evaluation.protocol import EvaluationSet
from tests.evaluation.test_sts import model_of, scored_pairs


def average_precision(similarities, labels):
    """The average precision of the original pairs."""
    once = np.ones((1, len(labels)), np.int64)
    return metric_of_resamples("average_precision", similarities, labels, once)[0]


def slow_average_precision(similarities, labels):
    """The area under the steps of recall, with a pass over the pairs for each threshold."""
    area, last_recall = 0.0, 0.0
    for threshold in sorted(set(similarities.tolist()), reverse=True):
        predicted = similarities >= threshold
        recall = (predicted & labels).sum() / labels.sum()
        area += (recall - last_recall) * (predicted & labels).sum() / predicted.sum()
        last_recall = recall
    return area


def f1_at(threshold, similarities, labels):
    predicted = similarities >= threshold
    hits = (predicted & labels).sum()
    return 2 * hits / (predicted.sum() + labels.sum())


def accuracy_at(threshold, similarities, labels):
    return ((similarities >= threshold) == labels).mean()


def some_pairs(seed, *, size=40, ties=True):
    rng = np.random.default_rng(seed)
    labels = rng.random(size) < 0.3
    labels[:2] = [True, False]
    similarities = np.float32(labels * 0.5 + rng.normal(size=size))
    return (similarities.round(1) if ties else similarities), labels


every_case = pytest.mark.parametrize(
    ("size", "ties", "seed"),
    [(2, False, 0), (2, False, 1), (3, True, 2), (40, True, 3), (40, False, 4), (500, True, 5)],
)


def test_average_precision_by_hand():
    similarities, labels = np.array([0.9, 0.8, 0.8, 0.1]), np.array([True, True, False, True])
    # In descending order: 1 of 1, then both tied pairs (2 of 3), then all (3 of 4).
    assert average_precision(similarities, labels) == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)


@every_case
def test_average_precision_is_the_restatement(size, ties, seed):
    similarities, labels = some_pairs(seed, size=size, ties=ties)
    expected = slow_average_precision(similarities, labels)
    assert average_precision(similarities, labels) == pytest.approx(expected)
    order = np.random.default_rng(0).permutation(size)
    assert average_precision(similarities[order], labels[order]) == pytest.approx(expected)


def test_a_resample_has_the_average_precision_of_its_drawn_pairs():
    similarities, labels = some_pairs(6)
    (counts,) = resample_counts(len(labels), num_resamples=20, seed=0)
    counts[0] = ~labels  # no positive pair
    found = metric_of_resamples("average_precision", similarities, labels, counts)
    assert np.isnan(found[0])
    for value, row in zip(found[1:], counts[1:], strict=True):
        drawn = slow_average_precision(similarities.repeat(row), labels.repeat(row))
        assert value == pytest.approx(drawn)
    assert np.ptp(found[1:]) > 0.05


@every_case
@pytest.mark.parametrize(("best", "at"), [(best_f1, f1_at), (best_accuracy, accuracy_at)])
def test_no_threshold_is_better_than_the_best(best, at, size, ties, seed):
    similarities, labels = some_pairs(seed, size=size, ties=ties)
    score, threshold = best(similarities, labels)
    assert at(threshold, similarities, labels) == pytest.approx(score)
    everywhere = [*similarities.tolist(), float(similarities.max()) + 1]
    assert score == pytest.approx(max(at(one, similarities, labels) for one in everywhere))
    num_predicted = (similarities >= threshold).sum()
    stricter = [one for one in everywhere if (similarities >= one).sum() < num_predicted]
    assert all(at(one, similarities, labels) < score for one in stricter)


def test_thresholds_lie_halfway_between_similarities():
    similarities, labels = np.array([0.9, 0.5, 0.5, 0.3]), np.array([True, True, True, False])
    assert best_f1(similarities, labels) == (1.0, pytest.approx(0.4))
    assert best_accuracy(similarities, labels) == (1.0, pytest.approx(0.4))


@pytest.mark.parametrize("reverse", [False, True])
def test_a_tie_is_not_split(reverse):
    # One of the two orders of the tied pairs would give a perfect result.
    labels = np.array([True, True, False, False])[:: -1 if reverse else 1]
    similarities = np.full(4, 0.7, np.float32)
    assert average_precision(similarities, labels) == 2 / 4
    assert best_f1(similarities, labels) == (pytest.approx(2 * 2 / (4 + 2)), pytest.approx(0.7))
    accuracy, threshold = best_accuracy(similarities, labels)
    assert accuracy == 2 / 4
    assert not (similarities >= threshold).any()


def test_every_pair_may_be_called_negative_or_positive():
    wrong = np.array([0.9, 0.2, 0.1])
    assert best_accuracy(wrong, np.array([False, False, True]))[0] == 2 / 3
    assert best_accuracy(wrong, np.array([False, True, True])) == (2 / 3, 0.1)
    assert best_f1(wrong, np.array([False, False, True])) == (2 / (3 + 1), 0.1)


def test_metrics_are_printed_with_the_number_of_pairs():
    similarities, labels = some_pairs(7, size=200)
    pairs = PairSet(scored_pairs(labels))
    found = pairs.evaluate(model_of(similarities))
    precision = slow_average_precision(similarities, labels)
    assert found["average_precision"] == pytest.approx(precision)
    assert found["average_precision_low"] < precision - 0.02
    assert found["average_precision_high"] > precision + 0.02
    assert (found["f1"], found["f1_threshold"]) == best_f1(similarities, labels)
    assert (found["accuracy"], found["accuracy_threshold"]) == best_accuracy(similarities, labels)
    assert (found["pairs"], found["positives"]) == (200, labels.sum())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "the labels of 0 pairs are none;"),
        ([1, 1], "the labels of 2 pairs are 1;"),
        ([0, 0], "the labels of 2 pairs are 0;"),
        ([0, 1, 2], "the labels of 3 pairs are 0, 1, 2;"),
        ([-1, 1], "the labels of 2 pairs are -1, 1;"),
        ([0, 0.5, 1, 1.5, 2, 2.5], "are 0, 0.5, 1, 1.5, 2, …; pair classification needs both"),
    ],
)
def test_other_labels_are_an_error(labels, message):
    with pytest.raises(ValueError, match=message):
        PairSet(scored_pairs(labels))


def test_it_is_an_evaluation_set():
    pairs = PairSet(scored_pairs([1, 0, 0]))
    assert isinstance(pairs, EvaluationSet)
    assert (pairs.kind, pairs.fingerprint) == ("pairs", "some pairs")
    assert pairs.description == (
        "classification of 3 pairs (text1, text2), 1 of them positive; all labels (score) are 0 or "
        "1, so they are labels, not scores"
    )
