"""Uniform assignment: every row once per epoch, in a random order, from the step alone."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest

from jaxcl.assignment import uniform_rows


def epochs(num_epochs: int, *, num_rows: int, seed: int = 0) -> np.ndarray:
    """The order of each epoch, one per line, read as a single batch."""
    size = num_epochs * num_rows
    return uniform_rows(0, num_rows=num_rows, batch_size=size, seed=seed).reshape(-1, num_rows)


def stream(num_positions: int, *, num_rows: int, batch_size: int, seed: int = 0) -> np.ndarray:
    """The first rows of a run, read batch by batch."""
    steps = range(-(-num_positions // batch_size))
    batches = [
        uniform_rows(step, num_rows=num_rows, batch_size=batch_size, seed=seed) for step in steps
    ]
    return np.concatenate(batches)[:num_positions]


# Powers of 4, the sizes of the network's domain, ± 1; 4⁸ + 1 has the longest cycle walks.
@pytest.mark.parametrize("num_rows", [*range(1, 41), 63, 64, 65, 255, 256, 257, 1000, 4097, 65_537])
def test_each_epoch_holds_every_row_once(num_rows):
    for order in epochs(3, num_rows=num_rows):
        np.testing.assert_array_equal(np.sort(order), np.arange(num_rows))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 8, 25, 64])
def test_no_row_is_lost_over_three_epochs_whose_batches_do_not_divide_them(batch_size):
    num_rows = 26
    seen = stream(3 * num_rows, num_rows=num_rows, batch_size=batch_size)
    for order in seen.reshape(3, num_rows):
        np.testing.assert_array_equal(np.sort(order), np.arange(num_rows))


def test_a_batch_holds_the_end_of_one_epoch_and_the_start_of_the_next():
    first, second = epochs(2, num_rows=10)
    batch = uniform_rows(2, num_rows=10, batch_size=4, seed=0)
    np.testing.assert_array_equal(batch, [*first[8:], *second[:2]])


@pytest.mark.parametrize("batch_size", [1, 4, 7, 50])
def test_the_batch_size_cuts_the_order_and_does_not_change_it(batch_size):
    cut = stream(60, num_rows=23, batch_size=batch_size)
    np.testing.assert_array_equal(cut, epochs(3, num_rows=23).ravel()[:60])


def test_a_batch_larger_than_the_data_holds_several_epochs():
    batch = uniform_rows(0, num_rows=3, batch_size=8, seed=0)
    assert np.bincount(batch[:6]).tolist() == [2, 2, 2]
    assert len(set(batch[6:])) == 2


def test_orders_of_neighbouring_seeds_and_epochs_have_nothing_in_common():
    """Two random orders of 64 rows agree at Poisson(1) positions; 12 occur once in 10⁹."""
    orders = np.concatenate([epochs(20, num_rows=64, seed=seed) for seed in range(20)])
    agreements = (orders[:, None] == orders[None, :]).sum(2)[np.triu_indices(20 * 20, 1)]
    assert agreements.max() < 12
    assert agreements.mean() == pytest.approx(1, rel=0.02)


def test_neighbouring_seeds_do_not_share_the_keys_of_rounds():
    """Otherwise, a seed's first round would use the key of the previous seed's second round.

    With 64 rows in a square, the right halves of column i of one order would then be the left
    halves of line i of the next order.
    """
    squares = [epochs(1, num_rows=64, seed=seed)[0].reshape(8, 8) for seed in range(50)]
    in_common = [
        sorted(one[:, i] % 8) == sorted(following[i] // 8)
        for one, following in itertools.pairwise(squares)
        for i in range(8)
    ]
    assert np.mean(in_common) < 0.05


def test_distant_seeds_have_different_orders():
    seeds = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1]
    assert len({tuple(epochs(1, num_rows=64, seed=seed)[0]) for seed in seeds}) == len(seeds)


def chi_square(orders: np.ndarray, *, row: int) -> float:
    """How unevenly a row falls on the positions of an epoch, as a chi-square z-score."""
    num_epochs, num_rows = orders.shape
    count = np.bincount(np.argmax(orders == row, axis=1), minlength=num_rows)
    expected = num_epochs / num_rows
    statistic = ((count - expected) ** 2 / expected).sum()
    return (statistic - (num_rows - 1)) / math.sqrt(2 * (num_rows - 1))


@pytest.mark.parametrize("num_rows", [2, 3, 4, 5, 12, 16, 17])
def test_every_row_occurs_at_every_position_equally_often(num_rows):
    orders = epochs(4000, num_rows=num_rows)
    for row in {0, 1, num_rows - 1}:
        assert chi_square(orders, row=row) < 5


@pytest.mark.parametrize("num_rows", [3, 12])
def test_neighbouring_seeds_are_as_random_as_neighbouring_epochs(num_rows):
    orders = np.concatenate([epochs(1, num_rows=num_rows, seed=seed) for seed in range(1000)])
    assert chi_square(orders, row=0) < 5


def pair_deviation(orders: np.ndarray, *, batch_size: int) -> float:
    """The largest deviation of a pair's number of shared batches, in standard deviations."""
    num_epochs, num_rows = orders.shape
    batch_of_row = np.argsort(orders, axis=1) // batch_size
    shared = (batch_of_row[:, :, None] == batch_of_row[:, None, :]).sum(0)
    share = (batch_size - 1) / (num_rows - 1)
    deviation = (shared - num_epochs * share) / math.sqrt(num_epochs * share * (1 - share))
    return np.abs(deviation[np.triu_indices(num_rows, 1)]).max()


@pytest.mark.parametrize(("num_rows", "batch_size"), [(4, 2), (12, 4), (16, 8), (18, 6)])
def test_every_pair_shares_a_batch_equally_often(num_rows, batch_size):
    assert pair_deviation(epochs(4000, num_rows=num_rows), batch_size=batch_size) < 5


def test_the_measures_of_uniformity_tell_worse_orders_apart():
    unshuffled = np.tile(np.arange(12), (4000, 1))
    assert chi_square(unshuffled, row=0) > 100
    rotated = (
        unshuffled + np.arange(4000)[:, None]
    ) % 12  # uniform positions, but always with the same rows
    assert chi_square(rotated, row=0) < 5
    assert pair_deviation(rotated, batch_size=4) > 20


def test_rows_are_int32():
    for num_rows in (1, 40, 10**9):
        batch = uniform_rows(0, num_rows=num_rows, batch_size=5, seed=0)
        assert batch.dtype == np.int32
        assert batch.shape == (5,)


@pytest.mark.parametrize("num_rows", [10**9, 2**30 + 1, 2**31])
def test_memory_does_not_depend_on_the_number_of_rows(num_rows):
    tracemalloc.start()
    batch = uniform_rows(10**6, num_rows=num_rows, batch_size=1000, seed=0)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1e6
    assert batch.min() >= 0
    assert batch.max() < num_rows
    assert len(np.unique(batch)) == 1000


def test_a_late_step_continues_the_previous_step():
    whole = uniform_rows(10**12 // 2, num_rows=1000, batch_size=8, seed=0)
    halves = [uniform_rows(10**12 + i, num_rows=1000, batch_size=4, seed=0) for i in range(2)]
    np.testing.assert_array_equal(whole, np.concatenate(halves))


@pytest.mark.parametrize("scalar", [np.int32, np.int64, np.uint32, np.uint64])
def test_numpy_scalars_count_as_integers(scalar):
    seed = 2**31 - 1  # times the number of rounds, it would overflow int32
    batch = uniform_rows(scalar(3), num_rows=scalar(7), batch_size=scalar(5), seed=scalar(seed))
    np.testing.assert_array_equal(batch, uniform_rows(3, num_rows=7, batch_size=5, seed=seed))
    assert batch.dtype == np.int32


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (-1, 4), (4, -1)])
def test_sizes_below_one_are_an_error_that_names_them(sizes):
    num_rows, batch_size = sizes
    wanted = f"num_rows={num_rows} and batch_size={batch_size} must be at least 1"
    with pytest.raises(ValueError, match=wanted):
        uniform_rows(0, num_rows=num_rows, batch_size=batch_size, seed=0)


def test_more_rows_than_int32_can_number_are_an_error():
    with pytest.raises(ValueError, match=f"num_rows={2**31 + 1}"):
        uniform_rows(0, num_rows=2**31 + 1, batch_size=4, seed=0)


@pytest.mark.parametrize("step", [-1, 2**63])
def test_an_invalid_step_is_refused(step):
    with pytest.raises(ValueError, match=f"step={step}; steps count from 0"):
        uniform_rows(step, num_rows=6, batch_size=2, seed=0)
