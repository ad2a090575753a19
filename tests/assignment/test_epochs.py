"""From an order to batches: every row once per epoch, whole blocks, equal labels kept apart."""

import itertools
import tracemalloc

import numpy as np
import pytest

from jaxcl.assignment.conflicts import count_conflicts
from jaxcl.assignment.epochs import (
    Assigned,
    AssignedRows,
    epoch_batches,
    epoch_rows,
    random_to_hard,
    visited,
)

# (rows, batch, block): sizes that divide or do not, and data smaller than a batch or a block.
SIZES = [
    (24, 8, 4),
    (25, 8, 4),
    (26, 8, 4),
    (23, 6, 3),
    (40, 8, 1),
    (31, 8, 8),
    (33, 8, 8),
    (100, 16, 8),
    (7, 16, 4),
    (3, 8, 4),
    (2, 8, 8),
    (1, 4, 2),
]


def an_order(num_rows: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(num_rows).astype(np.int32)


def unseen(num_rows: int, *, seed: int = 0) -> Assigned:
    """The state at the start of a run."""
    return Assigned(an_order(num_rows, seed=seed), np.zeros(num_rows, bool), 0)


def stream(rows_fn, num_epochs: int, *, num_rows: int, batch_size: int) -> np.ndarray:
    """The rows of some epochs, one epoch per line, read batch by batch from the first step."""
    steps = range(-(-num_epochs * num_rows // batch_size))
    batches = [rows_fn(step) for step in steps]
    assert all(batch.shape == (batch_size,) and batch.dtype == np.int32 for batch in batches)
    return np.concatenate(batches)[: num_epochs * num_rows].reshape(num_epochs, num_rows)


def assert_once_each(epochs: np.ndarray) -> None:
    np.testing.assert_array_equal(np.sort(epochs, 1), np.arange(epochs.shape[1])[None] + 0 * epochs)


def broken_blocks(rows: np.ndarray, order: np.ndarray, *, first: int, block_size: int) -> int:
    """The number of blocks, on the grid of positions within `rows`, that are not in the order."""
    head = min(-first % block_size, len(rows))
    whole = rows[head : len(rows) - (len(rows) - head) % block_size].reshape(-1, block_size)
    place = np.argsort(order)[whole]
    return int(
        (place != place[:, :1] // block_size * block_size + np.arange(block_size)).any(1).sum()
    )


@pytest.mark.parametrize("random_fraction", [0.4, 1.0])
@pytest.mark.parametrize(("num_rows", "batch_size", "block_size"), SIZES)
def test_each_epoch_holds_every_row_once(num_rows, batch_size, block_size, random_fraction):
    rows_fn = AssignedRows(
        unseen(num_rows),
        batch_size=batch_size,
        block_size=block_size,
        seed=0,
        random_fraction=random_fraction,
        keep_apart=(np.arange(num_rows) // 2,),
    )
    assert_once_each(stream(rows_fn, 5, num_rows=num_rows, batch_size=batch_size))


@pytest.mark.parametrize(("num_rows", "batch_size", "block_size"), SIZES)
def test_batches_are_cut_from_the_epochs(num_rows, batch_size, block_size):
    sizes = {"batch_size": batch_size, "block_size": block_size}
    state = unseen(num_rows)
    cut = stream(AssignedRows(state, seed=3, **sizes), 5, num_rows=num_rows, batch_size=batch_size)
    for epoch, rows in enumerate(cut):
        np.testing.assert_array_equal(rows, epoch_rows(state.order, epoch=epoch, seed=3, **sizes))


@pytest.mark.parametrize(("num_rows", "batch_size", "block_size"), SIZES)
def test_every_batch_holds_whole_blocks(num_rows, batch_size, block_size):
    order = an_order(num_rows)
    for epoch in range(9):
        rows = epoch_rows(order, epoch=epoch, batch_size=batch_size, block_size=block_size, seed=0)
        first = epoch * num_rows
        assert broken_blocks(rows, order, first=first, block_size=block_size) == 0
        head = min(-first % block_size, num_rows)
        tail = (num_rows - head) % block_size
        pieces = [*rows[:head], *rows[num_rows - tail :]]
        np.testing.assert_array_equal(pieces, order[num_rows - head - tail :])
        assert head + tail in (num_rows % block_size, num_rows % block_size + block_size)


@pytest.mark.parametrize(("num_rows", "batch_size", "block_size"), SIZES)
def test_every_epoch_is_cut_into_batches_of_whole_blocks(num_rows, batch_size, block_size):
    order = an_order(num_rows)
    sizes = {"batch_size": batch_size, "block_size": block_size}
    epochs = [epoch_batches(order, epoch=epoch, seed=0, **sizes) for epoch in range(5)]
    for batches in epochs:
        assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
        rows = np.concatenate(batches)
        np.testing.assert_array_equal(np.sort(rows), np.arange(num_rows))
        assert broken_blocks(rows, order, first=0, block_size=block_size) == 0
    if num_rows // block_size > 2:  # few blocks may have the same order twice
        assert len({np.concatenate(batches).tobytes() for batches in epochs}) > 1


def test_slices_of_later_epochs_break_blocks_and_batches_do_not():
    order = an_order(26)
    sliced = epoch_rows(order, epoch=1, batch_size=8, block_size=4, seed=0)
    cut = np.concatenate(epoch_batches(order, epoch=1, batch_size=8, block_size=4, seed=0))
    assert broken_blocks(sliced, order, first=0, block_size=4) > 0
    assert broken_blocks(cut, order, first=0, block_size=4) == 0


def test_epochs_that_each_begin_with_a_block_break_it():
    order = an_order(26)
    grid = epoch_rows(order, epoch=1, batch_size=8, block_size=4, seed=0)
    naive = np.concatenate([grid[2:], grid[:2]])  # position 26 is in the middle of a block
    assert broken_blocks(naive, order, first=26, block_size=4) > 0


def test_blocks_occur_at_every_position_equally_often():
    epochs = [
        epoch_rows(np.arange(12), epoch=i, batch_size=3, block_size=3, seed=0) for i in range(120)
    ]
    for place in range(4):
        count = np.bincount(np.array(epochs)[:, 3 * place] // 3, minlength=4)
        assert (np.abs(count - 30) < 5 * np.sqrt(120 * 1 / 4 * 3 / 4)).all()


@pytest.mark.parametrize("num_rows", [4096, 4099])
@pytest.mark.parametrize("random_fraction", [0.0, 0.1, 0.5, 0.75])
def test_a_share_of_the_blocks_is_dissolved(random_fraction, num_rows):
    order = an_order(num_rows)
    rows = epoch_rows(
        order,
        epoch=1,
        batch_size=128,
        block_size=8,
        seed=0,
        random_fraction=random_fraction,
    )
    broken = broken_blocks(rows, order, first=num_rows, block_size=8)
    whole = (num_rows - -num_rows % 8) // 8
    assert broken == round(random_fraction * whole)
    shares = [
        broken_blocks(batch, order, first=0, block_size=8) / 16
        for batch in rows[-num_rows % 128 :][: 31 * 128].reshape(-1, 128)
    ]
    spread = np.sqrt(random_fraction * (1 - random_fraction) / 16)
    assert np.abs(np.array(shares) - random_fraction).max() <= 4 * spread


def test_a_random_fraction_of_one_is_a_random_epoch():
    order, sizes = an_order(13), {"batch_size": 4, "block_size": 4, "seed": 0}
    epochs = [epoch_rows(order, epoch=i, random_fraction=1.0, **sizes) for i in range(120)]
    place = np.argsort(np.array(epochs), axis=1)
    batch = place // 4
    together = (batch[:, order[0]] == batch[:, order[1]]).mean()
    share = 3 * 4 * 3 / (13 * 12)  # both in one of three full batches
    assert together == pytest.approx(share, abs=5 * np.sqrt(share * (1 - share) / 120))
    for row in order[[0, -1]]:  # one row of a full block, and the row of the short block
        count = np.bincount(place[:, row], minlength=13)
        assert np.abs(count - 120 / 13).max() < 5 * np.sqrt(120 / 13)
    hard = np.argsort([epoch_rows(order, epoch=i, **sizes) for i in range(40)], axis=1) // 4
    assert (hard[:, order[0]] == hard[:, order[1]]).mean() > 0.7


def changed(changes: list[int], last_step: int, *, num_rows: int, forget: bool = False, **options):
    """The rows of a run whose order changes at some steps; `forget` marks other rows as seen."""
    batch_size = options["batch_size"]
    state = unseen(num_rows)
    rows_fn = AssignedRows(state, **options)
    batches = []
    for step in range(last_step):
        if step in changes:
            seen = visited(
                rows_fn,
                before_step=state.step,
                step=step,
                num_rows=num_rows,
                batch_size=batch_size,
                seen=state.seen,
            )
            if forget:  # as many rows, but other ones
                seen = np.arange(num_rows) < seen.sum()
            state = Assigned(an_order(num_rows, seed=step), seen, step)
            rows_fn = AssignedRows(state, **options)
        batches.append(rows_fn(step))
    whole = last_step * batch_size // num_rows
    return np.concatenate(batches)[: whole * num_rows].reshape(whole, num_rows)


@pytest.mark.parametrize(
    "changes", [[1, 2, 5], [3, 6, 7], [*range(20)]], ids=["early", "late", "always"]
)
@pytest.mark.parametrize(("num_rows", "batch_size", "block_size"), SIZES[1::2])
def test_no_row_is_lost_where_the_order_changes(num_rows, batch_size, block_size, changes):
    epochs = changed(
        changes,
        max(8, min(4 * num_rows // batch_size, 20)),
        num_rows=num_rows,
        batch_size=batch_size,
        block_size=block_size,
        seed=0,
        random_fraction=0.3,
        keep_apart=(np.arange(num_rows) // 3,),
    )
    assert_once_each(epochs)


def test_rows_are_lost_if_a_new_order_ignores_the_rows_already_seen():
    options = {"num_rows": 26, "batch_size": 8, "block_size": 4, "seed": 0}
    assert_once_each(changed([2, 5], 20, **options))
    with pytest.raises(AssertionError):
        assert_once_each(changed([2, 5], 20, forget=True, **options))


def test_the_rest_of_an_epoch_has_blocks_of_the_new_order():
    num_rows, sizes = 103, {"batch_size": 16, "block_size": 4}
    old = AssignedRows(unseen(num_rows), seed=0, **sizes)
    seen = visited(old, before_step=0, step=9, num_rows=num_rows, batch_size=16)
    assert seen.sum() == 9 * 16 - num_rows
    order = an_order(num_rows, seed=1)
    new = AssignedRows(Assigned(order, seen, 9), seed=0, **sizes)
    rows = np.concatenate([new(step) for step in range(9, 13)])[: 2 * num_rows - 9 * 16]
    left = order[~seen[order]]
    ranks = np.argsort(left)[np.searchsorted(np.sort(left), rows)]
    assert broken_blocks(ranks, np.arange(len(left)), first=9 * 16, block_size=4) == 0


@pytest.mark.parametrize("batch_size", [1, 4, 7, 10, 25])
def test_visited_rows_are_those_of_the_epoch_under_way(batch_size):
    num_rows = 10

    def rows_fn(step: int) -> np.ndarray:
        position = step * batch_size + np.arange(batch_size)
        return (position % num_rows * 3 % num_rows).astype(np.int32)  # the same in each epoch

    for step in range(12):
        place = step * batch_size % num_rows
        wanted = np.zeros(num_rows, bool)
        wanted[np.arange(place) * 3 % num_rows] = True
        for before_step in range(step + 1):
            begins = before_step * batch_size
            seen = np.zeros(num_rows, bool)
            seen[np.arange(begins % num_rows) * 3 % num_rows] = True
            found = visited(
                rows_fn,
                before_step=before_step,
                step=step,
                num_rows=num_rows,
                batch_size=batch_size,
                seen=seen,
            )
            np.testing.assert_array_equal(found, wanted)


def test_visited_rows_in_the_middle_of_an_epoch_need_the_earlier_ones():
    def rows_fn(step: int) -> np.ndarray:
        assert step >= 3, "asked for a batch before the first"
        return np.arange(4 * step, 4 * step + 4) % 20

    options = {"num_rows": 20, "batch_size": 4}
    with pytest.raises(ValueError, match="before_step=3 is in the middle of the epoch of step=4"):
        visited(rows_fn, before_step=3, step=4, **options)
    found = visited(rows_fn, before_step=3, step=7, **options)  # a later epoch: not needed
    np.testing.assert_array_equal(np.flatnonzero(found), np.arange(8))
    with pytest.raises(ValueError, match="step=2 is before before_step=3"):
        visited(rows_fn, before_step=3, step=2, **options)


def test_rows_do_not_depend_on_earlier_calls():
    labels = (np.arange(50) // 4,)

    def fresh() -> AssignedRows:
        return AssignedRows(
            unseen(50), batch_size=8, block_size=4, seed=0, random_fraction=0.5, keep_apart=labels
        )

    steps = [*range(16)]
    in_turn = fresh()
    wanted = {step: in_turn(step) for step in steps}
    reused = fresh()
    for step in np.random.default_rng(0).permutation(steps + steps).tolist():
        found = reused(step)
        np.testing.assert_array_equal(found, wanted[step])
        found[:] = -1  # another caller's
    for step in (15, 7):
        np.testing.assert_array_equal(fresh()(step), wanted[step])


def test_epochs_and_seeds_have_different_orders():
    order = an_order(64)
    rows = [
        epoch_rows(order, epoch=epoch, batch_size=8, block_size=4, seed=seed)
        for seed in (0, 1, 2**40)
        for epoch in range(5)
    ]
    assert all((a != b).mean() > 0.5 for a, b in itertools.combinations(rows, 2))


def test_the_random_fraction_is_asked_where_an_epoch_begins():
    asked = []

    def fraction(step: int) -> float:
        asked.append(step)
        return 1.0 if step < 5 else 0.0

    order = an_order(20)
    options = {"batch_size": 8, "block_size": 4, "seed": 0}
    rows_fn = AssignedRows(
        Assigned(order, np.isin(np.arange(20), [1, 2, 3, 4]), 3),
        random_fraction=fraction,
        **options,
    )
    for step in range(3, 10):
        rows_fn(step)
    assert asked == [3, 5, 7]  # rows 24, 40 and 60 of the run
    rows = np.concatenate([rows_fn(step) for step in (5, 6, 7)])[:20]
    np.testing.assert_array_equal(rows, epoch_rows(order, epoch=2, **options))


def conflicts_by_hand(rows, labels, *, batch_size, first_position) -> int:
    held: dict[int, set] = {}
    conflicts = 0
    for position, row in enumerate(rows, first_position):
        batch = held.setdefault(position // batch_size, set())
        conflicts += int(labels[row]) in batch
        batch.add(int(labels[row]))
    return conflicts


@pytest.mark.parametrize("first_position", [0, 3, 4, 10**12 + 1])
def test_conflicts_are_counted(first_position):
    rng = np.random.default_rng(0)
    rows, labels = rng.permutation(40)[:30], rng.integers(-3, 3, 40)
    options = {"batch_size": 4, "first_position": first_position}
    wanted = conflicts_by_hand(rows, labels, **options)
    assert wanted > 0
    assert count_conflicts(rows, labels, **options) == wanted


def some_labels(num_rows: int, num_labels: int, *, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-5, num_labels, num_rows)


APART = {
    "pairs": lambda order: (np.argsort(order) // 2,),
    "blocks_of_one_text": lambda order: (np.argsort(order) // 12,),
    "random": lambda order: (some_labels(len(order), len(order) // 4, seed=0),),
    "one_in_each_batch": lambda order: (np.arange(len(order)) % (len(order) // 20),),
    "texts_and_groups": lambda order: (
        some_labels(len(order), len(order) // 2, seed=1),
        some_labels(len(order), len(order) // 6, seed=2),
    ),
    "three": lambda order: (
        np.argsort(order) // 2,
        some_labels(len(order), len(order) // 2, seed=1),
        some_labels(len(order), len(order) // 4, seed=2),
    ),
}


@pytest.mark.parametrize("labels_of", APART.values(), ids=APART)
@pytest.mark.parametrize("num_rows", [640, 653])
def test_equal_labels_are_kept_apart(num_rows, labels_of):
    order = an_order(num_rows)
    keep_apart, sizes = labels_of(order), {"batch_size": 32, "block_size": 8, "seed": 0}
    before = 0
    for epoch in (0, 3):
        without = epoch_rows(order, epoch=epoch, **sizes)
        rows = epoch_rows(order, epoch=epoch, keep_apart=keep_apart, **sizes)
        assert_once_each(rows[None])
        counted = {"batch_size": 32, "first_position": epoch * num_rows}
        conflicts = [count_conflicts(without, labels, **counted) for labels in keep_apart]
        before += sum(conflicts)
        assert [count_conflicts(rows, labels, **counted) for labels in keep_apart] == [0] * len(
            keep_apart
        )
        assert (rows != without).sum() <= 2 * sum(conflicts)  # the others do not move
    assert before > 20


@pytest.mark.parametrize("num_labels", [1, 3, 20, 40])
def test_labels_that_cannot_be_kept_apart_conflict_as_little_as_possible(num_labels):
    """Each of 20 batches can hold one row with a label; the other rows are conflicts."""
    labels = np.minimum(np.arange(640) // 5, 200 + np.arange(640) % num_labels)
    labels[:300] = np.arange(300) % num_labels
    order = an_order(640)
    rows = epoch_rows(order, epoch=0, batch_size=32, block_size=8, seed=0, keep_apart=(labels,))
    assert_once_each(rows[None])
    least = np.maximum(np.bincount(labels) - 20, 0).sum()
    assert count_conflicts(rows, labels, batch_size=32) == least


def test_a_label_that_cannot_be_kept_apart_does_not_affect_others():
    order = an_order(640)
    hopeless, texts = np.zeros(640, int), np.argsort(order) // 2
    few = np.arange(640) % 3
    sizes = {"batch_size": 32, "block_size": 8, "seed": 0}
    without = epoch_rows(order, epoch=0, **sizes)
    rows = epoch_rows(order, epoch=0, keep_apart=(hopeless, texts, few), **sizes)
    assert count_conflicts(without, texts, batch_size=32) == 320
    assert count_conflicts(rows, texts, batch_size=32) == 0
    assert count_conflicts(rows, hopeless, batch_size=32) == 640 - 20
    assert count_conflicts(rows, few, batch_size=32) == 640 - 3 * 20


def rounds(monkeypatch, order: np.ndarray, keep_apart, *, seed: int):
    """The rows, and the conflicts of each array of labels, after 0, 1, 2, ... rounds of swaps."""
    rows, conflicts = [], []
    for max_rounds in range(6):
        monkeypatch.setattr("jaxcl.assignment.conflicts._MAX_ROUNDS", max_rounds)
        found = epoch_rows(
            order, epoch=0, batch_size=20, block_size=4, seed=seed, keep_apart=keep_apart
        )
        rows.append(found)
        conflicts.append([count_conflicts(found, labels, batch_size=20) for labels in keep_apart])
    return np.array(rows), np.array(conflicts)


@pytest.mark.parametrize("num_labels", [(4, 9, 30), (70, 100), (12,)], ids=str)
def test_each_swap_of_each_round_removes_a_conflict(num_labels, monkeypatch):
    for seed in range(4):
        keep_apart = tuple(some_labels(240, size, seed=seed) for size in num_labels)
        rows, conflicts = rounds(monkeypatch, an_order(240), keep_apart, seed=seed)
        swaps = (rows[1:] != rows[:-1]).sum(1) // 2
        assert swaps[0] > 0
        assert (-np.diff(conflicts.sum(1)) >= swaps).all()


def test_one_label_array_is_not_repaired_at_the_cost_of_another(monkeypatch):
    order = an_order(240)
    without = epoch_rows(order, epoch=0, batch_size=20, block_size=4, seed=0)
    texts, groups = some_labels(240, 40, seed=0), np.zeros(240, int)
    # Each batch has 20 of 40 groups, once each.
    groups[without] = np.arange(240) % 20 + 20 * (some_labels(240, 45, seed=1) % 2)
    _, conflicts = rounds(monkeypatch, order, (texts, groups), seed=0)
    assert conflicts[-1, 0] < conflicts[0, 0] / 2
    assert (conflicts[:, 1] == 0).all()


def test_equal_labels_are_kept_apart_in_the_rest_of_an_epoch():
    order = an_order(640)
    seen = np.isin(np.arange(640), order[::2][: 7 * 32])
    labels = np.argsort(order) // 4
    rows_fn = AssignedRows(
        Assigned(order, seen, 27), batch_size=32, block_size=8, seed=0, keep_apart=(labels,)
    )
    for step in range(27, 50):
        assert count_conflicts(rows_fn(step), labels, batch_size=32) == 0


def test_one_batch_has_nothing_to_swap_with():
    rows = epoch_rows(
        np.arange(8), epoch=0, batch_size=8, block_size=4, seed=0, keep_apart=(np.arange(8) // 2,)
    )
    assert_once_each(rows[None])


def test_a_million_rows_take_little_memory():
    num_rows = 10**6
    labels = np.random.default_rng(0).permutation(num_rows) // 20
    tracemalloc.start()
    rows = epoch_rows(
        np.arange(num_rows, dtype=np.int32),
        epoch=1,
        batch_size=1024,
        block_size=32,
        seed=0,
        random_fraction=0.5,
        keep_apart=(labels,),
    )
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert_once_each(rows[None])
    assert count_conflicts(rows, labels, batch_size=1024, first_position=num_rows) == 0
    assert peak_bytes < 150 * num_rows


def test_a_schedule_goes_evenly_from_random_to_hard():
    fraction = random_to_hard(0.75, 0.25, 8)
    assert [fraction(step) for step in (0, 2, 4, 8, 100)] == [0.75, 0.625, 0.5, 0.25, 0.25]


@pytest.mark.parametrize("given", [(1.5, 0.0, 8), (0.5, -0.1, 8), (0.5, float("nan"), 8)])
def test_a_schedule_that_leaves_0_to_1_is_an_error(given):
    with pytest.raises(ValueError, match="must be from 0 to 1"):
        random_to_hard(*given)
    with pytest.raises(ValueError, match="steps=0 at least 1"):
        random_to_hard(1.0, 0.0, 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"block_size": 3}, "block_size=3 does not divide batch_size=8"),
        ({"block_size": 0}, "block_size=0 does not divide"),
        ({"random_fraction": 1.1}, "random_fraction=1.1 must be from 0 to 1"),
        ({"random_fraction": float("nan")}, "random_fraction=nan"),
        ({"order": np.array([0, 1, 1, 3])}, "not a permutation of its 4 rows"),
        ({"order": np.array([1, 2, 3, 4])}, "not a permutation"),
        ({"order": np.array([], int)}, "not a permutation of its 0 rows"),
    ],
    ids=str,
)
def test_invalid_arguments_are_errors(wrong, message):
    given = {"order": np.arange(4), "batch_size": 8, "block_size": 4, "seed": 0} | wrong
    order = given.pop("order")
    with pytest.raises(ValueError, match=message):
        epoch_rows(order, epoch=0, **given)
    with pytest.raises(ValueError, match=message):
        AssignedRows(Assigned(order, np.zeros(len(order), bool), 0), **given)(0)


def test_labels_of_other_rows_are_an_error():
    state = Assigned(np.arange(8), np.zeros(8, bool), 0)
    with pytest.raises(ValueError, match=r"keep_apart has labels of \[7\] rows; there are 8"):
        AssignedRows(state, batch_size=4, block_size=4, seed=0, keep_apart=(np.arange(7),))


def test_a_step_before_the_order_is_an_error():
    rows_fn = AssignedRows(
        Assigned(np.arange(8), np.zeros(8, bool), 4), batch_size=4, block_size=4, seed=0
    )
    with pytest.raises(ValueError, match="step 3 is before step 4"):
        rows_fn(3)


@pytest.mark.parametrize("seen", [np.arange(8) < 3, np.arange(8) < 5, np.arange(4) < 4], ids=str)
def test_seen_that_differs_from_the_visited_rows_is_an_error(seen):
    with pytest.raises(ValueError, match="before step 5 its epoch has visited 4 of 8"):
        AssignedRows(Assigned(np.arange(8), seen, 5), batch_size=4, block_size=4, seed=0)


@pytest.mark.usefixtures("unchecked_annotations")
def test_numbers_may_be_those_of_numpy():
    assigned = unseen(100)
    plain = AssignedRows(assigned, batch_size=10, block_size=5, seed=0)
    other = AssignedRows(
        Assigned(assigned.order.tolist(), assigned.seen.tolist(), np.int32(0)),
        **{name: np.int32(size) for name, size in (("batch_size", 10), ("block_size", 5))},
        seed=np.int64(0),
    )
    step = 2**29  # ten times this overflows int32
    np.testing.assert_array_equal(other(np.int32(step)), plain(step))
    sizes = {"batch_size": 10, "block_size": 5, "seed": 0}
    order = assigned.order
    np.testing.assert_array_equal(
        epoch_rows(order, epoch=np.int32(2**27), **sizes), epoch_rows(order, epoch=2**27, **sizes)
    )


def test_steps_and_epochs_count_from_0():
    with pytest.raises(ValueError, match="epoch=-1; epochs count from 0"):
        epoch_rows(an_order(4), epoch=-1, batch_size=2, block_size=1, seed=0)
    with pytest.raises(ValueError, match="step=-2; steps count from 0"):
        AssignedRows(unseen(4)._replace(step=-2), batch_size=2, block_size=1, seed=0)
    with pytest.raises(ValueError, match="before_step=-1"):
        visited(lambda step: an_order(2), before_step=-1, step=2, num_rows=4, batch_size=2)
