"""The best evaluation and early stopping, as functions of the evaluations so far."""

import functools
import json
import math
import random

import pytest

from jaxcl.run.best import Best, Selection, best_step, kept_steps, recorded_best, updated
from jaxcl.run.checkpoint_record import CheckpointError

METRIC = "stsb/spearman"


def summary(*values: float, every: int = 10, min_delta: float = 0.0) -> Best:
    """The summary of evaluations at steps 10, 20, …"""
    evaluations = enumerate(values, start=1)
    return functools.reduce(
        lambda best, one: updated(best, every * one[0], one[1], min_delta=min_delta),
        evaluations,
        Best(METRIC),
    )


def test_the_highest_value_is_the_best():
    assert summary(0.1, 0.3, 0.2) == Best(METRIC, 20, 0.3, 0.3, 1)
    assert summary(-0.4, -0.2, -0.3).step == 20


def test_the_first_of_equal_values_is_the_best_and_the_others_are_not_improvements():
    assert summary(0.3, 0.3, 0.3) == Best(METRIC, 10, 0.3, 0.3, 2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_never_the_best(value):
    assert summary(value) == Best(METRIC, waited=1)
    assert summary(value, 0.2, value) == Best(METRIC, 20, 0.2, 0.2, 1)


def test_an_increase_up_to_min_delta_is_the_best_but_no_improvement():
    best = summary(0.5, 0.75, min_delta=0.25)
    assert best == Best(METRIC, 20, 0.75, 0.5, 1)
    assert summary(0.5, 0.8, min_delta=0.25) == Best(METRIC, 20, 0.8, 0.8, 0)


def test_small_increases_add_up_to_an_improvement():
    waits = [
        summary(*values, min_delta=0.25).waited
        for values in ([0.5], [0.5, 0.625], [0.5, 0.625, 0.75], [0.5, 0.625, 0.75, 0.875])
    ]
    assert waits == [0, 1, 2, 0]  # 0.875 > 0.5 + 0.25


@pytest.mark.parametrize(("patience", "stops"), [(1, True), (2, True), (3, False), (None, False)])
def test_a_run_stops_after_its_patience_without_improvement(patience, stops):
    assert Selection(METRIC, patience).stops(summary(0.3, 0.2, 0.1)) is stops


def test_a_run_without_a_metric_never_stops():
    assert not Selection(None).stops(None)


def test_an_improvement_starts_the_wait_again():
    steps = []
    best = Best(METRIC)
    for step, value in enumerate([0.1, 0.0, 0.2, 0.1, 0.1, 0.1]):
        best = updated(best, step, value)
        if Selection(METRIC, 2).stops(best):
            steps.append(step)
    assert steps == [4, 5]


def test_a_recorded_summary_continues_as_if_it_had_not_been_recorded():
    values = [random.Random(0).choice([0.1, 0.2, 0.3, math.nan]) for _ in range(30)]
    for split in range(len(values)):
        record = json.loads(json.dumps({"best": summary(*values[:split])._asdict()}))
        best = recorded_best(record)
        for number, value in enumerate(values[split:], start=split + 1):
            best = updated(best, 10 * number, value)
        assert best == summary(*values)


def test_a_record_without_a_summary_names_no_step():
    assert recorded_best({"settings": {}}) is None
    assert best_step({}) is None
    assert best_step({"best": Best(METRIC)._asdict()}) is None
    assert best_step({"best": summary(0.1)._asdict()}) == 10


@pytest.mark.parametrize("stored", [5, "best", {"stage": 3}, [1, 2]])
def test_a_summary_of_another_form_is_an_error(stored):
    with pytest.raises(CheckpointError, match="this version of jaxcl cannot read"):
        recorded_best({"best": stored})


def test_the_newest_and_the_best_of_each_of_them_stay():
    steps = [10, 20, 30, 40, 50]
    assert kept_steps(steps, newest=2, best_of={}) == {40, 50}
    assert kept_steps(steps, newest=2, best_of={40: 10, 50: 10}) == {10, 40, 50}
    # A fall-back to 40 needs step 20, although 50 is better.
    assert kept_steps(steps, newest=2, best_of={10: 10, 40: 20, 50: 50}) == {20, 40, 50}
    assert kept_steps(steps, newest=9, best_of={}) == set(steps)


def test_a_best_step_that_is_gone_is_not_kept():
    assert kept_steps([40, 50], newest=2, best_of={50: 10}) == {40, 50}
    assert kept_steps([40, 50], newest=2, best_of={40: None}) == {40, 50}


def test_a_run_resumes_with_the_recorded_summary():
    best = summary(0.3, 0.2)
    record = {"best": best._asdict()}
    assert Selection(METRIC).resumed(record, present=[10, 20]) == best
    assert Selection(METRIC).resumed({}, present=[]) == Best(METRIC)
    assert Selection(None).resumed(record, present=[10, 20]) is None


def test_another_metric_begins_a_new_summary():
    record = {"best": summary(0.3, 0.2)._asdict()}
    assert Selection("other").resumed(record, present=[10, 20]) == Best("other")


def test_a_lost_best_checkpoint_is_replaced_without_resetting_patience():
    record = {"best": summary(0.3, 0.2)._asdict()}
    resumed = Selection(METRIC).resumed(record, present=[20])
    assert resumed == Best(METRIC, None, None, 0.3, 1)
    assert updated(resumed, 30, 0.1) == Best(METRIC, 30, 0.1, 0.3, 2)


def test_a_selection_reads_its_own_metric_to_the_last_bit():
    selection = Selection(METRIC, min_delta=0.05)
    best = selection.after(Best(METRIC), 10, {METRIC: 0.1 + 0.2, "other": 1.0})
    assert best == Best(METRIC, 10, 0.1 + 0.2, 0.1 + 0.2, 0)
    assert selection.after(best, 20, {METRIC: 0.34}).waited == 1
    assert selection.after(best, 20, {METRIC: math.nan}).waited == 1
    assert selection.after(best, 20, {"other": 1.0}).waited == 1
    assert Selection().after(None, 10, {"other": 1.0}) is None
