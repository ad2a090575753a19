"""The gap between batch and data set, compared with all pairs, on any number of devices."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.assignment.gap import (
    GapReport,
    make_gap_measure,
    measure_gap,
    sample_batches,
)
from jaxcl.assignment.row_gaps import GapOptions, row_gaps
from jaxcl.ops.mesh import batch_sharding, make_mesh
from jaxcl.ops.vectors import normalise
from tests.helpers import relative_error, unit_vectors

ROWS, PADDED, DIM, TEMPERATURE = 45, 48, 6, 0.1
KEY = jax.random.key(7)


def pairs(num_rows=PADDED, *, noise=0.5, dtype=jnp.float64):
    queries = unit_vectors(0, num_rows, DIM, dtype=dtype)
    keys = queries + noise * unit_vectors(1, num_rows, DIM, dtype=dtype)
    return queries, normalise(keys)


def some_batches(*, batch_size=7, count=3, num_rows=ROWS, seed=0):
    order = np.random.default_rng(seed).permutation(num_rows)
    return sample_batches(order, batch_size=batch_size, count=count, seed=seed)


def log_sum(scores, mask):
    return np.log(np.where(mask, np.exp(scores), 0).sum(1))


def by_all_pairs(queries, keys, rows, *, different=(), threshold=0.95, rows_per_batch=None):
    """Every part of the report from dense matrices, row by row."""
    x, y = (np.asarray(side, np.float64)[:ROWS] for side in (queries, keys))
    scores = x @ y.T / TEMPERATURE
    may_meet = np.ones((ROWS, ROWS), bool)
    for labels in different:
        may_meet &= np.asarray(labels)[:ROWS, None] != np.asarray(labels)[None, :ROWS]
    may_meet |= np.eye(ROWS, dtype=bool)
    cosines = [side @ side.T / np.outer(*[np.linalg.norm(side, axis=1)] * 2) for side in (x, y)]
    mates = np.asarray(jax.random.permutation(KEY, ROWS))[: rows.size].reshape(rows.shape)
    parts = {name: [] for name in ("train", "gap", "random", "bound", "neighbours", "duplicates")}
    first = slice(rows_per_batch)
    for batch, drawn in zip(rows, mates, strict=True):
        inside, others = np.zeros((2, ROWS, ROWS), bool)
        inside[:, batch] = True
        for row in batch:
            others[row, [mate for mate in drawn if mate != row][: len(batch) - 1]] = True
        others |= np.eye(ROWS, dtype=bool)
        ways = []
        for matrix in (scores, scores.T):
            whole, own = log_sum(matrix, may_meet), log_sum(matrix, may_meet & inside)
            random = log_sum(matrix, may_meet & others)
            hardest = np.where(may_meet & ~inside, matrix, -np.inf).max(1)
            bound = np.log(np.exp(own) + (ROWS - len(batch)) * np.exp(hardest)) - own
            ways.append([own - np.diag(matrix), whole - own, whole - random, bound])
        for name, values in zip(parts, np.mean(ways, 0), strict=False):
            parts[name].append(values[batch[first]])
        likeness = np.where(may_meet & ~np.eye(ROWS, dtype=bool), (scores + scores.T) / 2, -np.inf)
        nearest = np.argsort(-likeness, axis=1)[batch[first], :10]
        parts["neighbours"].append(np.isin(nearest, batch).mean(1))
        close = (np.maximum(*cosines) > threshold) & ~np.eye(ROWS, dtype=bool)
        parts["duplicates"].append(close[np.ix_(batch[first], batch)].sum(1) * len(batch) / 2)
    return {name: np.concatenate(values) for name, values in parts.items()}


def summary(parts):
    return GapReport(
        global_loss=parts["train"].mean() + parts["gap"].mean(),
        train_loss=parts["train"].mean(),
        gap=parts["gap"].mean(),
        gap_p99=np.quantile(parts["gap"], 0.99),
        gap_max=parts["gap"].max(),
        random_gap=parts["random"].mean(),
        closed=1 - parts["gap"].mean() / parts["random"].mean(),
        bound=parts["bound"].mean(),
        neighbours=parts["neighbours"].mean(),
        near_duplicates=parts["duplicates"].mean(),
    )


@functools.cache
def measure_on(devices, num_rows, **options):
    mesh = make_mesh({"data": devices}, devices=jax.devices()[:devices])
    return mesh, make_gap_measure(mesh, num_rows=num_rows, **options)


def measured(
    queries, keys, rows, *, devices=1, num_rows=ROWS, key=KEY, different=(), **options
) -> GapReport:
    mesh, measure = measure_on(devices, num_rows, **options)
    embeddings = jax.device_put((queries, keys, different), batch_sharding(mesh))
    return measure(*embeddings[:2], jnp.asarray(rows), TEMPERATURE, key, embeddings[2])


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(("batch_size", "count", "labelled"), [(7, 3, False), (4, 11, True)])
def test_the_report_agrees_with_all_pairs_written_out(devices, batch_size, count, labelled, x64):
    """With three batches, most of eight devices have none; with eleven, some have two."""
    sides = pairs()
    # Three consecutive rows share a text, and every fifth a group; padding has the first labels.
    labels = (jnp.arange(PADDED) // 3 % 15, jnp.arange(PADDED) % 5) if labelled else ()
    rows = some_batches(batch_size=batch_size, count=count)
    found = measured(*sides, rows, devices=devices, different=labels, near_duplicate=0.5)
    wanted = summary(by_all_pairs(*sides, rows, different=labels, threshold=0.5))
    assert wanted.near_duplicates > 0
    assert 0 < wanted.neighbours < 1
    for name, value in wanted._asdict().items():
        assert relative_error(getattr(found, name), value) < 1e-12, name


@pytest.mark.parametrize("devices", [1, 8])
def test_sampled_rows_are_compared_with_their_whole_batch(devices, x64):
    sides, rows = pairs(), some_batches(batch_size=15)  # a batch has a third of all rows
    options = {"near_duplicate": 0.5, "rows_per_batch": 6}
    found = measured(*sides, rows, devices=devices, **options)
    wanted = summary(by_all_pairs(*sides, rows, threshold=0.5, rows_per_batch=6))
    assert wanted.near_duplicates > 0
    for name, value in wanted._asdict().items():
        assert relative_error(getattr(found, name), value) < 1e-12, name


def test_a_selection_of_fields_has_the_same_values_and_costs_less(x64):
    sides, rows = pairs(), some_batches()
    whole, some = measured(*sides, rows), measured(*sides, rows, fields=("gap", "closed"))
    for name, value in some._asdict().items():
        wanted = getattr(whole, name) if name in ("gap", "closed") else np.nan
        np.testing.assert_array_equal(value, wanted)
    # The searches for nearest and most similar rows, which the other fields need, are left out.
    arguments = (*sides, jnp.asarray(rows), TEMPERATURE, KEY)
    work, less = (
        jax.jit(measure_on(1, ROWS, **options)[1])
        .lower(*arguments)
        .compile()
        .cost_analysis()["flops"]
        for options in ({}, {"fields": ("gap", "closed")})
    )
    assert less < work / 2
    with pytest.raises(ValueError, match="unknown fields: gaps; use global_loss, "):
        make_gap_measure(make_mesh({"data": -1}), num_rows=ROWS, fields=("gap", "gaps"))


@pytest.mark.parametrize("devices", [1, 8])
def test_more_sampled_rows_than_a_batch_has_are_the_whole_batch(devices, x64):
    sides, rows = pairs(), some_batches()
    on = functools.partial(measured, *sides, rows, devices=devices)
    np.testing.assert_array_equal(on(), on(rows_per_batch=9))
    with pytest.raises(ValueError, match="rows_per_batch=0; measure at least 1"):
        on(rows_per_batch=0)


def test_the_report_is_the_same_without_a_mesh(x64):
    queries, keys = pairs()
    rows = jnp.asarray(some_batches())
    measure = functools.partial(measure_gap, temperature=TEMPERATURE, num_rows=ROWS)
    alone = jax.jit(measure)(queries, keys, rows, key=KEY)
    np.testing.assert_allclose(alone, measured(queries, keys, rows), rtol=1e-12)


def test_padding_has_no_effect(x64):
    queries, keys = pairs()
    hostile = [side.at[ROWS:].set(100 * side[0]) for side in (queries, keys)]
    rows = some_batches()
    np.testing.assert_array_equal(measured(*hostile, rows), measured(queries, keys, rows))


def test_the_order_within_batches_changes_nothing(x64):
    sides, rows = pairs(), some_batches()
    shuffled = np.random.default_rng(1).permuted(rows, axis=1)
    assert (shuffled != rows).any()
    ours, theirs = (measured(*sides, some, near_duplicate=0.5) for some in (rows, shuffled))
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@functools.partial(jax.jit, static_argnames="num_rows")
def per_row(queries, keys, rows, *, temperature=TEMPERATURE, num_rows=ROWS):
    options = GapOptions(num_rows)
    return row_gaps(queries, keys, rows, (), options, temperature=temperature, key=KEY)


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
def test_no_row_has_a_gap_below_zero_or_above_its_bound(temperature, x64):
    for noise in (0.1, 1.0, 10.0):
        found = per_row(*pairs(noise=noise), some_batches(), temperature=temperature)
        assert (found.gap >= 0).all()
        assert (found.bound >= found.gap).all()
        assert (found.bound > 1.01 * found.gap).any()


def test_the_bound_is_attained_where_all_outside_are_alike(x64):
    """If all rows are orthogonal, each gap is log(1 + (N − b) e⁰ / (e^(1/τ) + (b − 1) e⁰))."""
    size, batch_size = 12, 4
    found = per_row(*[jnp.eye(size)] * 2, np.arange(8).reshape(2, 4), num_rows=size)
    inside = math.exp(1 / TEMPERATURE) + (batch_size - 1)
    gap = math.log(1 + (size - batch_size) / inside)
    np.testing.assert_allclose(found.gap, gap, rtol=1e-12)
    np.testing.assert_allclose(found.bound, gap, rtol=1e-12)


def test_one_batch_of_all_rows_leaves_no_gap():
    rows = np.random.default_rng(0).permutation(ROWS)[None].astype(np.int32)
    found = measured(*pairs(dtype=jnp.float32), rows, devices=8)
    assert found.gap == found.gap_max == found.bound == 0
    assert found.closed == 1
    assert found.neighbours == 1
    assert found.random_gap == pytest.approx(0, abs=1e-6)


def test_random_orders_close_nothing(x64):
    sides = pairs()
    closed = [
        float(measured(*sides, some_batches(count=6, seed=seed), key=jax.random.key(seed)).closed)
        for seed in range(40)
    ]
    error = np.std(closed) / len(closed) ** 0.5
    assert abs(np.mean(closed)) < 3 * error
    assert error < 0.02


CLUSTERS, MEMBERS = 8, 6


def clustered():
    """Rows around eight orthogonal centres, in turn."""
    centres = jnp.eye(CLUSTERS)[np.arange(CLUSTERS * MEMBERS) % CLUSTERS]
    near = [
        0.1 * unit_vectors(seed, CLUSTERS * MEMBERS, CLUSTERS, dtype=jnp.float32) for seed in (0, 1)
    ]
    return [normalise(centres + part) for part in near]


def test_batches_of_whole_clusters_close_most_of_the_gap_and_torn_ones_open_it():
    rows = np.arange(CLUSTERS * MEMBERS, dtype=np.int32).reshape(MEMBERS, CLUSTERS)
    torn, whole = (
        measured(*clustered(), some, devices=8, num_rows=rows.size) for some in (rows, rows.T)
    )
    assert whole.closed > 0.99
    assert torn.closed < 0
    assert whole.global_loss == pytest.approx(float(torn.global_loss), rel=1e-5)
    assert whole.neighbours == pytest.approx(
        5 / 10
    )  # the other five of a row's ten nearest neighbours
    assert torn.neighbours < 0.3


def test_near_duplicates_are_counted_for_both_rows_and_on_both_sides(x64):
    queries, keys = (jnp.asarray(np.eye(12)[numbers]) for numbers in (range(8), range(8)))
    # In the first batch, rows 0 and 1 share query and key, and rows 2 and 3 the query; in the
    # second, three rows share a key. Lengths do not matter; rows 0 and 4 are in different batches.
    queries = queries.at[1].set(2 * queries[0]).at[2].set(queries[3]).at[4].set(queries[0])
    keys = keys.at[1].set(keys[0]).at[jnp.array([6, 7])].set(keys[5])
    rows = np.arange(8).reshape(2, 4)
    found = per_row(queries, keys, rows, num_rows=8)
    assert found.near_duplicates.tolist() == [1, 1, 1, 1, 0, 2, 2, 2]


def test_bfloat16_vectors_are_measured_without_further_rounding():
    sides, rows = pairs(dtype=jnp.bfloat16), some_batches()
    wanted = summary(by_all_pairs(*sides, rows))
    found = measured(*sides, rows, devices=8)
    # `closed` is near 0, a difference of numbers near 1.
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_no_matrix_of_sampled_rows_and_all_is_stored():
    num_rows, dim, rows = 2**18, 16, (4, 2_048)
    side = jax.ShapeDtypeStruct((num_rows, dim), jnp.float32)
    measure = functools.partial(measure_gap, temperature=TEMPERATURE, num_rows=num_rows)
    program = (
        jax.jit(lambda *arguments: measure(*arguments[:3], key=arguments[3]))
        .lower(side, side, jax.ShapeDtypeStruct(rows, jnp.int32), KEY)
        .compile()
    )
    matrix = 4 * rows[0] * rows[1] * num_rows  # 8 GiB
    assert program.memory_analysis().temp_size_in_bytes < matrix / 16


def test_the_table_stays_where_it_is():
    num_rows = 2**13
    mesh = make_mesh({"data": 8})
    side = jax.ShapeDtypeStruct((num_rows, DIM), jnp.float32, sharding=batch_sharding(mesh))
    measure = make_gap_measure(mesh, num_rows=num_rows)
    program = (
        jax.jit(measure)
        .lower(side, side, jax.ShapeDtypeStruct((8, 8), jnp.int32), TEMPERATURE, KEY)
        .compile()
    )
    names = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
    collectives = re.findall(rf"= (.*?) (?:{names})(?:-start)?\(", program.as_text())
    shapes = re.findall(r"\[([\d,]+)\]", " ".join(collectives))
    sizes = [math.prod(int(size) for size in shape.split(",")) for shape in shapes]
    assert max(sizes) >= 8 * 8 * DIM  # every device receives all sampled rows
    assert max(sizes) < num_rows // 8 * DIM  # but less than one device's share of the other rows


def test_sampled_batches_are_whole_batches_of_the_order_and_none_twice():
    order = np.random.default_rng(0).permutation(50)
    whole = order[:48].reshape(6, 8).tolist()
    found = sample_batches(order, batch_size=8, count=4, seed=0)
    assert found.dtype == np.int32
    places = [whole.index(batch) for batch in found.tolist()]
    assert len(set(places)) == 4
    assert sample_batches(order, batch_size=8, count=99, seed=0).tolist() == whole
    seeds = {tuple(sample_batches(order, batch_size=8, count=1, seed=s)[0]) for s in range(30)}
    assert len(seeds) == 6


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="5 rows has no whole batch"):
        sample_batches(np.arange(5), batch_size=6, count=1, seed=0)
    with pytest.raises(ValueError, match="count=0 must be at least 1"):
        sample_batches(np.arange(5), batch_size=2, count=0, seed=0)
    with pytest.raises(ValueError, match="50 rows in all, the data set 45"):
        measured(*pairs(dtype=jnp.float32), np.zeros((10, 5), np.int32))
