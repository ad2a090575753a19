"""Several sources: exact shares, each row once per epoch of its source, all from the step."""

import math

import numpy as np
import pytest

from jaxcl.assignment import uniform_rows
from jaxcl.assignment.sourced import SourcedRows

SIZES = {
    "even": [64, 64],
    "one": [50],
    "uneven": [500, 90, 9, 1],
    "irrational": [101, 37, 67, 11, 3],
    "many_topics": [1 + i * i % 37 for i in range(100)],
}


def some_sources(sizes: list[int], *, seed: int = 0) -> np.ndarray:
    """Shuffled rows of the sources 0, 3, 6, ..."""
    sources = np.repeat(3 * np.arange(len(sizes)), sizes)
    return np.random.default_rng(seed).permutation(sources)


def shares_of(sizes: list[int], temperature: float = 1.0) -> np.ndarray:
    powers = np.array(sizes, float) ** (1 / temperature)
    return powers / powers.sum()


def counts(rows: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """The number of `rows` of each source."""
    return np.bincount(sources[rows], minlength=sources.max() + 1)[::3]


def batches(rows_fn, num_steps: int, *, first_step: int = 0) -> np.ndarray:
    return np.stack([rows_fn(first_step + step) for step in range(num_steps)])


@pytest.mark.parametrize("temperature", [1.0, 3.0, math.inf])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_a_mixed_batch_has_each_source_s_share(sizes, temperature):
    sources = some_sources(sizes)
    rows_fn = SourcedRows(sources, batch_size=32, seed=0, temperature=temperature)
    share = shares_of(sizes, temperature)
    for first_step in (0, 10**6):
        for rows in batches(rows_fn, 8, first_step=first_step):
            assert rows.shape == (32,)
            assert rows.dtype == np.int32
            assert np.abs(counts(rows, sources) - 32 * share).max() < 1


def drift(drawn: np.ndarray, share: np.ndarray) -> np.ndarray:
    """The deviation of the sources from their shares before each step, for `[steps, sources]`."""
    before = np.cumsum(drawn, axis=0) - drawn
    return np.abs(before - before.sum(1, keepdims=True) * share).max(1)


def drawn_by(mix: str, sizes: list[int], num_steps: int, *, seed: int = 0) -> np.ndarray:
    sources = some_sources(sizes)
    batch_size = 16
    found = batches(SourcedRows(sources, batch_size=batch_size, seed=seed, mix=mix), num_steps)
    drawn = np.stack([counts(rows, sources) for rows in found])
    return drawn if mix == "mixed" else drawn // batch_size


@pytest.mark.parametrize("mix", ["mixed", "single"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_a_source_never_drifts_from_its_share(sizes, mix):
    drawn = drawn_by(mix, sizes, 130)
    found = drift(drawn, shares_of(sizes))
    bound = np.array([step.bit_count() for step in range(130)])
    assert (found < bound + 1e-6).all()
    assert found.max() < 5
    assert found[[1, 2, 4, 64, 128]].max() < 1 + 1e-6


def test_sources_drawn_at_random_drift_further():
    share = shares_of(SIZES["uneven"])
    drawn = np.random.default_rng(0).multinomial(16, share, size=130)
    assert drift(drawn, share).max() > 10


def test_drift_does_not_grow_over_long_runs():
    """The counts before a step are the sum of all earlier draws."""
    sizes = SIZES["irrational"]
    sources = some_sources(sizes)
    for mix in ("mixed", "single"):
        rows_fn = SourcedRows(sources, batch_size=16, seed=0, mix=mix)
        per_step = 16 if mix == "mixed" else 1
        for step in (1000, 2**20, 2**20 - 1, 12_345_678):
            before = rows_fn._drawn(step)
            assert before.sum() == step * per_step
            bound = step.bit_count() + step * per_step / 2**31
            assert np.abs(before - step * per_step * shares_of(sizes)).max() < bound
            now = counts(rows_fn(step), sources) * per_step // 16
            np.testing.assert_array_equal(rows_fn._drawn(step + 1) - before, now)


def assert_once_per_epoch(batches: np.ndarray, sources: np.ndarray) -> None:
    """After k draws from a source of n rows, each row was drawn k // n times or once more."""
    visits = np.zeros(len(sources), int)
    for rows in batches:
        np.add.at(visits, rows, 1)
        for source in np.unique(sources[rows]):
            ours = visits[sources == source]
            assert ours.min() == ours.sum() // len(ours)
            assert ours.max() == -(-ours.sum() // len(ours))


@pytest.mark.parametrize("mix", ["mixed", "single"])
@pytest.mark.parametrize("batch_size", [1, 16])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_each_row_occurs_once_per_epoch_of_its_source(sizes, batch_size, mix):
    sources = some_sources(sizes)
    rows_fn = SourcedRows(sources, batch_size=batch_size, seed=1, mix=mix)
    assert_once_per_epoch(batches(rows_fn, 40), sources)


def test_rows_drawn_independently_per_batch_do_not_occur_once_per_epoch():
    rng, sources = np.random.default_rng(0), some_sources(SIZES["uneven"])
    drawn = np.stack([rng.choice(len(sources), 16, replace=False) for _ in range(40)])
    with pytest.raises(AssertionError):
        assert_once_per_epoch(drawn, sources)


@pytest.mark.parametrize(("mix", "missed"), [("mixed", 5), ("single", 5 * 10)])
def test_an_epoch_of_all_rows_has_nearly_every_row_once(mix, missed):
    """All except a few draws of a source fall into the matching epoch of all rows."""
    sizes = [500, 300, 170, 30]
    rows_fn = SourcedRows(some_sources(sizes), batch_size=10, seed=0, mix=mix)
    for epoch in range(2):
        rows = batches(rows_fn, 100, first_step=100 * epoch)
        visits = np.bincount(rows.ravel(), minlength=1000)
        assert (visits != 1).sum() <= 2 * len(sizes) * missed


def test_shares_of_whole_rows_make_exact_epochs():
    sources = some_sources([60, 30, 10])
    rows_fn = SourcedRows(sources, batch_size=10, seed=0)
    for epoch in range(5):
        rows = batches(rows_fn, 10, first_step=10 * epoch)
        np.testing.assert_array_equal(np.sort(rows.ravel()), np.arange(100))


@pytest.mark.parametrize("mix", ["mixed", "single"])
def test_one_source_is_visited_as_by_uniform_rows(mix):
    rows_fn = SourcedRows(np.full(50, 7), batch_size=8, seed=5, mix=mix)
    for step in (0, 1, 6, 100):
        wanted = uniform_rows(step, num_rows=50, batch_size=8, seed=5)
        np.testing.assert_array_equal(np.sort(rows_fn(step)), np.sort(wanted))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_a_batch_of_one_source_has_no_other(sizes):
    sources = some_sources(sizes)
    rows_fn = SourcedRows(sources, batch_size=8, seed=0, mix="single")
    of = sources[batches(rows_fn, 50)]
    assert (of == of[:, :1]).all()
    assert len(set(of[:, 0])) > len(sizes) / 3


def test_every_part_of_a_mixed_batch_is_mixed():
    """Each device's 4 rows of a batch come from both sources equally often."""
    sources = some_sources([64, 64])
    parts = sources[batches(SourcedRows(sources, batch_size=16, seed=0), 150)].reshape(150, 4, 4)
    share = (parts == 0).mean((0, 2))
    assert np.abs(share - 0.5).max() < 5 * np.sqrt(0.25 / 600)
    alone = (parts == parts[..., :1]).all(2).mean()
    wanted = 2 * (8 * 7 * 6 * 5) / (16 * 15 * 14 * 13)  # all 4 among the 8 of one of two sources
    assert alone == pytest.approx(wanted, abs=5 * np.sqrt(wanted / 600))


def test_topics_are_spread_over_the_run():
    """32 consecutive batches have three or four of a topic with a tenth of the rows."""
    of = np.argmax(drawn_by("single", [70, 10, 10, 10], 192), axis=1).reshape(-1, 32)
    for topic in (1, 2, 3):
        assert set((of == topic).sum(1)) <= {3, 4}
    assert (of[0] != of[1]).any()  # but not at the same places


@pytest.mark.parametrize("mix", ["mixed", "single"])
def test_weights_are_shares_in_any_unit(mix):
    sources = some_sources([10, 100, 40, 5])
    weights = {0: 3.0, 3: 1.0, 6: 0.0, 9: 4.0}
    rows_fn = SourcedRows(sources, batch_size=16, seed=0, mix=mix, weights=weights)
    total = counts(batches(rows_fn, 64).ravel(), sources)
    np.testing.assert_array_equal(total, [64 * 16 * weights[name] / 8 for name in (0, 3, 6, 9)])


def test_temperatures_go_from_shares_of_rows_to_equal_ones():
    sources = some_sources([900, 100])
    small = [
        counts(
            batches(
                SourcedRows(sources, batch_size=100, seed=0, temperature=temperature), 32
            ).ravel(),
            sources,
        )[1]
        / 3200
        for temperature in (1.0, 2.0, math.inf)
    ]
    assert small == pytest.approx([0.1, math.sqrt(100) / (math.sqrt(900) + 10), 0.5], abs=1e-3)


@pytest.mark.parametrize("mix", ["mixed", "single"])
def test_a_source_smaller_than_its_part_of_a_batch_repeats_its_rows(mix):
    sources = some_sources([3, 40])
    rows_fn = SourcedRows(sources, batch_size=16, seed=0, mix=mix, temperature=math.inf)
    found = batches(rows_fn, 2)
    ours = found[sources[found] == 0]
    assert len(ours) == 16
    assert sorted(np.bincount(ours)[np.flatnonzero(sources == 0)]) == [5, 5, 6]


@pytest.mark.parametrize("mix", ["mixed", "single"])
def test_rows_are_a_function_of_the_step(mix):
    sources = some_sources(SIZES["irrational"])

    def fresh() -> SourcedRows:
        return SourcedRows(sources, batch_size=16, seed=0, mix=mix)

    wanted = batches(fresh(), 20)
    reused = fresh()
    for step in np.random.default_rng(0).permutation(20).tolist():
        np.testing.assert_array_equal(reused(step), wanted[step])
    np.testing.assert_array_equal(fresh()(13), wanted[13])


def test_seeds_have_different_rows_and_turns():
    sources = some_sources(SIZES["irrational"])
    seeds = (0, 1, 2**40, -1)
    rows = [batches(SourcedRows(sources, batch_size=16, seed=seed), 5) for seed in seeds]
    turns = [np.argmax(drawn_by("single", SIZES["irrational"], 30, seed=seed), 1) for seed in seeds]
    for i in range(len(seeds)):
        for j in range(i):
            assert (rows[i] != rows[j]).mean() > 0.8
            assert (turns[i] != turns[j]).any()


def test_epochs_of_a_source_and_sources_of_one_size_have_different_orders():
    sources = np.repeat([0, 1], 64)
    rows_fn = SourcedRows(sources, batch_size=2, seed=0)
    rows = np.sort(batches(rows_fn, 192), axis=1).reshape(3, 64, 2)  # [epoch, position, source]
    orders = [rows[epoch, :, source] - 64 * source for epoch in range(3) for source in (0, 1)]
    for i in range(len(orders)):
        np.testing.assert_array_equal(np.sort(orders[i]), np.arange(64))
        assert all((orders[i] == orders[j]).sum() < 12 for j in range(i))


SOURCES = np.array([0, 0, 1, 1, 5])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mix": "both"}, "mix='both' is unknown; use one of mixed, single"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"sources": np.array([], int)}, "rows=0"),
        ({"weights": {0: 1.0, 1: -1.0, 5: 1.0}}, "must be finite, at least 0"),
        ({"weights": {0: 1.0, 1: math.nan, 5: 1.0}}, "must be finite"),
        ({"weights": {0: 1.0, 1: math.inf, 5: 1.0}}, "must be finite"),
        ({"weights": {0: 0.0, 1: 0.0, 5: 0.0}}, "not all 0"),
        ({"weights": {0: 1.0, 1: 1.0}}, r"sources \[5\] have no weight"),
        ({"weights": {0: 1.0, 1: 1.0, 5: 1.0, 2: 0.0}}, r"name sources \[2\], which have no rows"),
        ({"weights": {0: 1.0, 1: 1.0, 5: 1.0}, "temperature": 2.0}, "weights override"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"temperature": math.nan}, "temperature=nan"),
    ],
    ids=str,
)
def test_invalid_shares_are_an_error(wrong, message):
    given = {"sources": SOURCES, "batch_size": 4, "seed": 0} | wrong
    with pytest.raises(ValueError, match=message):
        SourcedRows(given.pop("sources"), **given)


@pytest.mark.parametrize("step", [-1, 2**32])
def test_a_step_out_of_range_is_an_error(step):
    with pytest.raises(ValueError, match=f"step={step} must be from 0"):
        SourcedRows(SOURCES, batch_size=4, seed=0)(step)


@pytest.mark.usefixtures("unchecked_annotations")
def test_numbers_may_be_those_of_numpy_and_sources_a_list():
    plain = SourcedRows(np.array([0, 1, 1, 1]), batch_size=2, seed=0)
    other = SourcedRows([0, 1, 1, 1], batch_size=np.int64(2), seed=np.int64(0))
    for step in (0, 5, 2**31 - 1):
        np.testing.assert_array_equal(other(np.int32(step)), plain(step))
    with pytest.raises(ValueError, match="step=-1"):
        plain(np.int64(-1))
