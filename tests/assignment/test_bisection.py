"""Bisection finds planted blocks of similar rows, with the same bits on any number of devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxcl.assignment.bisection import Effort, _split, _walked, bisect
from jaxcl.assignment.graph import UNIT, Edges, PairGraph, weights_within
from jaxcl.assignment.place import Place
from jaxcl.assignment.sizes import segment_starts
from jaxcl.assignment.swaps import most_first, refine, segments_of, swap
from jaxcl.ops.grid import on_grid
from jaxcl.ops.mesh import make_mesh
from tests.helpers import unit_vectors


def clustered_points(num_clusters, size, *, dim=12, spread=0.35, seed=0):
    """Rows of planted clusters in a random order, and the cluster of each."""
    rng = np.random.default_rng(seed)
    of_row = rng.permutation(np.repeat(np.arange(num_clusters), size))
    centres = np.asarray(unit_vectors(seed, num_clusters, dim, dtype=jnp.float32))
    noise = np.asarray(unit_vectors(seed + 1, num_clusters * size, dim, dtype=jnp.float32))
    return on_grid(jnp.asarray(centres[of_row] + spread * noise)), of_row


def nearest_graph(points, count=5):
    products = np.array(points @ points.T)
    np.fill_diagonal(products, -np.inf)
    rows = np.argsort(-products, axis=1, kind="stable")[:, :count].astype(np.int32)
    near = np.take_along_axis(products, rows, 1)
    masses = np.exp((near - near[:, :1]) / (0.1 * 4_096**2)) * UNIT / 8
    own = np.full(len(points), UNIT // 4, np.int32)
    return PairGraph(jnp.asarray(rows), jnp.asarray(masses.astype(np.int32)), jnp.asarray(own))


@functools.cache
def compiled(devices, num_rows, block_size, effort):
    mesh = make_mesh({"data": devices}, devices=jax.devices()[:devices])
    rows, whole = PartitionSpec("data"), PartitionSpec()

    def of_shard(points, graph, key):
        starts = segment_starts(num_rows, block_size)
        return bisect(points, graph, starts=starts, key=key, effort=effort, axis_name="data")

    return jax.jit(
        jax.shard_map(of_shard, mesh=mesh, in_specs=(rows, rows, whole), out_specs=whole)
    )


def ordered(points, graph, *, devices=1, num_rows=None, block_size=8, seed=0, **effort):
    program = compiled(devices, num_rows or len(points), block_size, Effort(**effort))
    return np.asarray(program(points, graph, jax.random.key(seed)))


def together(order, of_row, block_size):
    """The share of a block's rows that belong to its most frequent cluster."""
    blocks = of_row[order].reshape(-1, block_size)
    return np.mean([np.bincount(block).max() / block_size for block in blocks])


def test_planted_clusters_become_blocks():
    points, of_row = clustered_points(16, 8, spread=0.5)
    graph = nearest_graph(points)
    alone, whole = (together(ordered(points, g), of_row, 8) for g in (None, graph))
    assert sorted(ordered(points, graph).tolist()) == list(range(128))
    assert 0.6 < alone < whole
    assert whole > 0.95
    assert together(np.random.default_rng(0).permutation(128), of_row, 8) < 0.4


@pytest.mark.parametrize("with_graph", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_devices_change_no_bit(with_graph):
    points, _ = clustered_points(12, 16, spread=0.6)
    graph = nearest_graph(points) if with_graph else None
    # 8 devices with 24 rows each process 96 segments in four parts.
    one, eight = (ordered(points, graph, devices=n, block_size=2) for n in (1, 8))
    np.testing.assert_array_equal(one, eight)
    assert (one != ordered(points, graph, block_size=2, seed=1)).any()


@pytest.mark.parametrize(
    ("num_rows", "block_size"),
    [
        *((90, 7), (65, 64), (5, 8)),
        *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((96, 7), (90, 8), (96, 1))),
    ],
)
def test_every_row_occurs_once_and_padding_comes_last(num_rows, block_size):
    points, _ = clustered_points(12, 8)
    graph = nearest_graph(points)
    there = (np.arange(96) < num_rows)[:, None]
    graph = graph._replace(
        rows=jnp.where(there & (graph.rows < num_rows), graph.rows, -1),
        masses=jnp.where(there & (graph.rows < num_rows), graph.masses, 0),
    )
    order = ordered(points, graph, devices=8, num_rows=num_rows, block_size=block_size)
    assert sorted(order[:num_rows].tolist()) == list(range(num_rows))
    assert sorted(order[num_rows:].tolist()) == list(range(num_rows, 96))


@pytest.mark.parametrize(("num_rows", "block_size"), [(64, 8), (90, 8), (90, 7), (7, 8), (33, 32)])
def test_segments_hold_whole_blocks_and_halve(num_rows, block_size):
    table = segment_starts(num_rows, block_size)
    num_blocks = -(-num_rows // block_size)
    assert len(table) == 1 + max(0, int(np.ceil(np.log2(num_blocks))))
    for level, starts in enumerate(table):
        sizes = np.diff(starts)
        assert sizes.sum() == num_rows
        assert (sizes[2**level :] == 0).all()
        assert ((starts % block_size == 0) | (starts == num_rows)).all()
        if level:
            blocks = -(-sizes[: 2**level] // block_size)
            assert np.abs(blocks[::2] - blocks[1::2]).max() <= 1
            np.testing.assert_array_equal(
                table[level - 1][: 2 ** (level - 1)], starts[: 2**level : 2]
            )
    assert (np.diff(table[-1]) <= block_size).all()


def captured(order, graph, block_size):
    """The sum of log masses that rows have in their blocks, which swaps increase."""
    block = np.empty(len(order), int)
    block[order] = np.arange(len(order)) // block_size
    same = block[np.asarray(graph.rows)] == block[:, None]
    return np.log(np.asarray(graph.own) + (np.asarray(graph.masses) * same).sum(1)).sum()


def test_swaps_and_refinement_increase_the_captured_mass():
    points, _ = clustered_points(16, 8, spread=0.8)
    graph = nearest_graph(points)
    start = {"starts": 1, "walks": 0}  # leaves room for improvement
    orders = [
        ordered(points, None, **start),  # the start of the swaps
        ordered(points, graph, **start, refinements=0),
        ordered(points, graph, **start),
    ]
    none, swapped, refined = (captured(order, graph, 8) for order in orders)
    assert none + 5 < swapped < refined


def test_a_swap_is_made_only_if_the_weights_within_segments_increase():
    # Two segments of two rows: rows 0 and 2 are neighbours, and so are 1 and 3.
    rows = jnp.array([[2], [3], [0], [1]], jnp.int32)
    graph = PairGraph(rows, jnp.full((4, 1), UNIT // 8, jnp.int32), jnp.full(4, UNIT, jnp.int32))
    segments = segments_of(jnp.array([0, 2, 4]), 4)
    options = {"rounds": 12, "eagerness": 0.5, "key": jax.random.key(0), "place": Place(None, 4)}
    order = jnp.arange(4, dtype=jnp.int32)
    found = swap(graph, order, segments, jnp.array([1, 0]), **options)
    assert {frozenset(half) for half in np.asarray(found).reshape(2, 2).tolist()} == {
        frozenset({0, 2}),
        frozenset({1, 3}),
    }
    # Once neighbours are together, no swap helps, nor does a swap of a row with itself.
    np.testing.assert_array_equal(swap(graph, found, segments, jnp.array([1, 0]), **options), found)
    np.testing.assert_array_equal(swap(graph, order, segments, jnp.array([0, 1]), **options), order)


def test_a_walk_finds_clusters_that_no_direction_shows():
    rng = np.random.default_rng(0)
    of_row = rng.permutation(np.repeat([0, 1], 32))
    rows = [rng.permutation(np.flatnonzero(of_row == one))[:6] for one in of_row]
    rows = [others[others != row][:5] for row, others in enumerate(rows)]
    graph = PairGraph(
        jnp.asarray(rows, jnp.int32),
        jnp.full((64, 5), UNIT // 8, jnp.int32),
        jnp.full(64, UNIT // 4, jnp.int32),
    )
    noise = on_grid(unit_vectors(0, 64, 8, dtype=jnp.float32))
    effort = {"block_size": 32, "swaps": 0, "refinements": 0}
    without, walked = (ordered(noise, graph, walks=walks, **effort) for walks in (0, 32))
    assert together(without, of_row, 32) < 0.7
    assert together(walked, of_row, 32) > 0.95


def test_a_walk_averages_over_the_neighbours_in_a_segment():
    rng = np.random.default_rng(0)
    starts, num_rows = np.array([0, 20, 20, 36]), 40  # one segment is empty, four rows are padding
    order = np.append(rng.permutation(36), np.arange(36, 40)).astype(np.int32)
    rows = rng.integers(-1, 36, (num_rows, 6)).astype(np.int32)
    rows[36:] = -1
    masses = np.where(rows >= 0, rng.integers(0, UNIT // 8, rows.shape), 0).astype(np.int32)
    own = rng.integers(1, UNIT, num_rows).astype(np.int32)
    along = rng.integers(0, 2**23, num_rows).astype(np.int32)
    segments = segments_of(jnp.asarray(starts), num_rows)
    of_row = np.asarray(segments.of_row(jnp.asarray(order)))
    graph = PairGraph(*map(jnp.asarray, (rows, masses, own)))
    place = Place(None, num_rows)
    same = (rows >= 0) & (of_row[rows] == of_row[:, None])
    given = jnp.where(same, weights_within(graph, jnp.asarray(of_row), place), 0)
    arguments = (Edges(graph.rows, given), jnp.asarray(along), jnp.asarray(of_row), segments)
    found = jax.jit(functools.partial(_walked, steps=5, place=place))(*arguments)
    on_eight = jax.shard_map(
        functools.partial(_walked, steps=5, place=Place("data", num_rows // 8)),
        mesh=make_mesh({"data": 8}),
        in_specs=(PartitionSpec("data"), *3 * (PartitionSpec(),)),
        out_specs=PartitionSpec(),
    )
    np.testing.assert_array_equal(jax.jit(on_eight)(*arguments), found)

    share = np.minimum(masses / (own + (masses * same).sum(1))[:, None], 1)
    weights = np.where(same, np.round(share * 2**14).astype(int), 0)
    np.testing.assert_allclose(given, weights, atol=1)
    weights >>= int(np.ceil(np.log2(weights.max()))) - 8
    ties = np.zeros((num_rows, num_rows))
    np.add.at(ties, (np.arange(num_rows)[:, None], rows), weights)
    ties += ties.T

    def level(values):
        levelled = np.zeros(num_rows)
        for segment in (0, 2):
            part = values[of_row == segment]
            centred = part - np.round(part.mean())
            scaled = centred * 512 / np.abs(centred).mean()
            levelled[of_row == segment] = np.clip(np.round(scaled), -2_048, 2_048)
        return levelled

    expected = level(along >> 13)
    for _ in range(5):
        nearby = np.round(ties @ expected / np.maximum(ties.sum(1), 1))
        expected = level(np.floor(expected / 4) + nearby)
    np.testing.assert_allclose(found[order[:36]], expected[order[:36]], atol=2)
    assert np.abs(expected - level(along >> 13)).max() > 100


def test_each_segment_takes_the_best_of_its_cuts():
    points, _ = clustered_points(16, 4, spread=0.9)
    graph, place = nearest_graph(points), Place(None, 64)
    segments, halves = (segments_of(jnp.arange(0, 65, size), 64) for size in (16, 8))
    of_row = np.arange(64) // 16
    rows, masses = np.asarray(graph.rows), np.asarray(graph.masses, float)
    inside = of_row[rows] == of_row[:, None]
    share = masses * inside / (np.asarray(graph.own) + (masses * inside).sum(1))[:, None]

    @jax.jit
    def split(starts):
        return _split(
            points.astype(jnp.int16),
            graph,
            jnp.arange(64, dtype=jnp.int32),
            segments,
            halves,
            starts=starts,
            effort=Effort(directions=1, walks=1),
            key=jax.random.key(0),
            place=place,
        )

    def kept(starts):
        """For each segment, the sum of neighbour weights that stay within its halves."""
        order = np.asarray(split(starts))
        assert (of_row[order] == of_row).all()
        half = np.empty(64, int)
        half[order] = np.arange(64) // 8
        return (share * (half[rows] == half[:, None])).sum(1).reshape(4, 16).sum(1)

    found = np.stack([kept(starts) for starts in range(1, 6)])
    assert (np.diff(found, axis=0) > -1e-2).all()  # up to the dropped bits
    better = np.diff(found, axis=0) > 0.1
    assert better.any(0).sum() > 1  # in more than one segment,
    assert len({tuple(column) for column in better.T}) > 1  # at different starts


@pytest.mark.parametrize("starts", [[0, 1_000], [0, 300, 300, 811, 900, 1_000, 1_000]])
def test_rows_are_sorted_by_segment_and_then_by_gain(starts):
    # Positions from 1,000 on are padding, which stays where it is.
    segments = segments_of(jnp.array(starts), 1_024)
    gains = np.random.default_rng(0).integers(-3_000, 3_000, 1_024).astype(np.int32)
    expected = np.lexsort((-gains, np.asarray(segments.of_position)))
    expected[1_000:] = np.arange(1_000, 1_024)
    np.testing.assert_array_equal(most_first(jnp.asarray(gains), segments), expected)


def test_a_million_rows_are_sorted_by_the_sign_and_magnitude_of_their_gains():
    num_rows = 2**20
    segments = segments_of(jnp.array([0, num_rows // 3, num_rows]), num_rows)
    gains = np.random.default_rng(0).integers(-(2**31) + 1, 2**31, num_rows)
    gains = (gains >> np.arange(num_rows) % 31).astype(np.int32)
    found = np.asarray(jax.jit(most_first)(jnp.asarray(gains), segments))
    np.testing.assert_array_equal(np.sort(found), np.arange(num_rows))
    np.testing.assert_array_equal(found < num_rows // 3, np.arange(num_rows) < num_rows // 3)
    for part in np.split(gains[found].astype(np.float64), [num_rows // 3]):
        least_so_far = np.minimum.accumulate(part)
        # Gains descend, up to a tenth.
        assert (part <= least_so_far + 0.1 * np.abs(part) + 0.1 * np.abs(least_so_far)).all()


def test_two_neighbours_are_not_swapped_with_each_other():
    # Rows 0 and 1 are neighbours; after swapping places, they would still be apart.
    rows = jnp.array([[1], [0]], jnp.int32)
    graph = PairGraph(rows, jnp.full((2, 1), UNIT // 8, jnp.int32), jnp.full(2, UNIT, jnp.int32))
    order = jnp.arange(2, dtype=jnp.int32)
    found = swap(
        graph,
        order,
        segments_of(jnp.array([0, 1, 2]), 2),
        jnp.array([1, 0]),
        rounds=1,
        eagerness=1.0,
        key=jax.random.key(0),
        place=Place(None, 2),
    )
    np.testing.assert_array_equal(found, order)


def test_refinement_swaps_between_segments_that_are_not_siblings():
    # Four segments of two rows; neighbours are in segments 0 and 2, and in 1 and 3.
    rows = jnp.array([[4], [5], [6], [7], [0], [1], [2], [3]], jnp.int32)
    graph = PairGraph(rows, jnp.full((8, 1), UNIT // 8, jnp.int32), jnp.full(8, UNIT, jnp.int32))
    segments = segments_of(jnp.array([0, 2, 4, 6, 8]), 8)
    options = {"eagerness": 0.5, "key": jax.random.key(0), "place": Place(None, 8)}
    order = jnp.arange(8, dtype=jnp.int32)
    siblings = swap(graph, order, segments, jnp.array([1, 0, 3, 2]), rounds=8, **options)
    refined = refine(graph, order, segments, rounds=40, **options)
    assert captured(np.asarray(siblings), graph, 2) == captured(np.asarray(order), graph, 2)
    halves = {frozenset(half) for half in np.asarray(refined).reshape(4, 2).tolist()}
    assert halves == {frozenset({row, row + 4}) for row in range(4)}
