"""One row of each label per epoch, all rows of a label in turn, from the step alone."""

import numpy as np
import pytest

from jaxcl.assignment import OnePerLabel, uniform_rows

LABELS = np.repeat([4, 9, 1, 7, 30], [1, 2, 3, 5, 1])[np.random.default_rng(0).permutation(12)]


def stream(labels, num_positions, *, batch_size, seed=0):
    """The first rows of a run, read batch by batch."""
    rows = OnePerLabel(labels, batch_size=batch_size, seed=seed)
    return np.concatenate([rows(step) for step in range(-(-num_positions // batch_size))])[
        :num_positions
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 5, 7, 64])
def test_each_epoch_has_one_row_of_each_label(batch_size):
    rows = stream(LABELS, 5 * 30, batch_size=batch_size).reshape(30, 5)
    for epoch in rows:
        assert sorted(LABELS[epoch]) == [1, 4, 7, 9, 30]


def test_the_rows_of_a_label_take_turns():
    rows = stream(LABELS, 5 * 30, batch_size=4).reshape(30, 5)
    for label, size in ((9, 2), (1, 3), (7, 5)):
        turns = np.array([epoch[LABELS[epoch] == label][0] for epoch in rows]).reshape(-1, size)
        for one in turns:
            assert sorted(one) == np.flatnonzero(label == LABELS).tolist()
        assert len({tuple(one) for one in turns}) > 1  # in another order each time


def test_labels_of_equal_size_do_not_take_the_same_turns():
    labels = np.repeat(np.arange(200), 2)
    first = np.sort(stream(labels, 200, batch_size=200)) % 2
    assert 70 < first.sum() < 130


@pytest.mark.parametrize("batch_size", [1, 4, 11])
def test_the_batch_size_cuts_the_order_and_does_not_change_it(batch_size):
    wanted = stream(LABELS, 40, batch_size=40)
    np.testing.assert_array_equal(stream(LABELS, 40, batch_size=batch_size), wanted)
    other = stream(LABELS, 40, batch_size=batch_size, seed=1)
    assert not np.array_equal(other, wanted)


def test_distinct_labels_are_uniform_rows():
    rows = OnePerLabel(np.arange(10), batch_size=4, seed=3)
    for step in (0, 1, 7):
        wanted = uniform_rows(step, num_rows=10, batch_size=4, seed=3)
        np.testing.assert_array_equal(rows(step), wanted)


def test_rows_are_int32_and_large_steps_are_allowed():
    rows = OnePerLabel(LABELS, batch_size=4, seed=0)
    assert rows(2**50).dtype == np.int32
    assert rows.num_labels == 5


@pytest.mark.parametrize(("labels", "batch_size"), [([], 2), ([1], 0)])
def test_sizes_below_one_are_errors(labels, batch_size):
    with pytest.raises(ValueError, match="must be at least 1"):
        OnePerLabel(np.array(labels, np.int32), batch_size=batch_size, seed=0)
