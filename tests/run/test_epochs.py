"""The number of steps of a run's epochs, and the lines that report it."""

import pytest

from jaxcl.run.epochs import epoch_summary
from jaxcl.settings.read import read_settings, with_steps


def lines_of(epochs, *, num_rows, accumulate=1):
    config = {"epochs": epochs, "global_batch_size": 8}
    config |= {"optimizer": {"accumulate_steps": accumulate}}
    settings = with_steps(read_settings(config), num_rows=num_rows)
    return list(epoch_summary(settings, epochs=epochs, num_rows=num_rows))


@pytest.mark.parametrize(
    ("epochs", "given", "line"),
    [
        (2.0, {"num_rows": 20}, "2 epochs of 20 rows are 5 steps"),
        (1.0, {"num_rows": 8}, "1 epoch of 8 rows is 1 step"),
        (0.5, {"num_rows": 1_600}, "0.5 epochs of 1,600 rows are 100 steps"),
        (2.0, {"num_rows": 56, "accumulate": 7}, "2 epochs of 56 rows are 14 steps"),
    ],
)
def test_epochs_are_reported_as_steps(epochs, given, line):
    assert lines_of(epochs, **given) == [line]


def test_steps_that_are_added_for_a_whole_update_are_reported():
    (line,) = lines_of(2.0, num_rows=60, accumulate=7)
    assert line == (
        "2 epochs of 60 rows are 15 batches, rounded up to 21 steps, which are 2.8 epochs: the "
        "last update also averages optimizer.accumulate_steps=7 batches"
    )


def test_less_than_one_batch_is_one_step_with_a_warning():
    line, warning = lines_of(0.01, num_rows=20)
    assert line == "0.01 epochs of 20 rows are 1 step"
    assert warning == (
        "warning: epochs=0.01 of 20 rows is less than one batch of 8 rows; the run trains 1 step"
    )
    *_, warning = lines_of(0.01, num_rows=20, accumulate=3)
    assert warning.endswith("the run trains 3 steps")
