"""Reverse Cuthill–McKee: SciPy's order of the paper's graph, and the implementation on devices."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components, reverse_cuthill_mckee

from jaxcl.assignment.cuthill_mckee import cuthill_mckee, paper_order
from jaxcl.assignment.graph import PairGraph
from jaxcl.ops.mesh import make_mesh
from tests.helpers import unit_vectors

NUM_ROWS, WIDTH = 90, 20  # the same for every graph, so that one program is compiled


def lists_of(edges, num_rows: int) -> np.ndarray:
    """`[n, k]`: the targets of each row's edges; n is padded to a multiple of 8 devices."""
    lists = np.full((num_rows + -num_rows % 8, WIDTH), -1, np.int32)
    for row in range(num_rows):
        ends = [end for start, end in edges if start == row]
        lists[row, : len(ends)] = ends
    return lists


def both_ways(edges) -> list[tuple[int, int]]:
    return sorted({pair for edge in edges for pair in (edge, edge[::-1])})


def shuffled(edges, num_rows: int, *, seed: int = 0) -> list[tuple[int, int]]:
    names = np.random.default_rng(seed).permutation(num_rows).tolist()
    return [(names[start], names[end]) for start, end in edges]


def path(num_rows: int) -> list[tuple[int, int]]:
    return list(itertools.pairwise(range(num_rows)))


def grid(height: int, width: int) -> list[tuple[int, int]]:
    down = [(row, row + width) for row in range((height - 1) * width)]
    across = [(row, row + 1) for row in range(height * width) if (row + 1) % width]
    return down + across


def nearest_in_a_plane(num_rows: int, count: int, *, seed: int = 0) -> list[tuple[int, int]]:
    points = np.random.default_rng(seed).uniform(size=(num_rows, 2))
    distances = np.linalg.norm(points[:, None] - points, axis=-1)
    ends = np.argsort(distances, axis=1)[:, 1 : count + 1]
    return [(row, end) for row in range(num_rows) for end in ends[row].tolist()]


def random_edges(num_rows: int, count: int, *, seed: int = 0) -> list[tuple[int, int]]:
    edges = np.random.default_rng(seed).integers(0, num_rows, (count, 2)).tolist()
    return sorted({(start, end) for start, end in edges if start != end})


GRAPHS = {
    "no edge": ([], NUM_ROWS),
    "path": (shuffled(path(21), 21), 21),
    "path, both ways": (both_ways(shuffled(path(21), 21)), 21),
    "ring": (shuffled([*path(16), (15, 0)], 16), 16),
    "star": ([(5, row) for row in range(12) if row != 5], 12),
    "grid": (shuffled(grid(5, 8), 40), 40),
    "nearest": (nearest_in_a_plane(64, 5), 64),
    "nearest, far apart": (nearest_in_a_plane(70, 2), 70),
    "many components": (random_edges(90, 50), 90),
    "few components": (random_edges(75, 110), 75),
    "dense": (random_edges(24, 300), 24),
    "pairs": ([(row, row ^ 1) for row in range(30)], 30),
    "two grids and a path": (
        shuffled([*grid(3, 4), *((a + 12, b + 12) for a, b in grid(2, 9)), (30, 31), (31, 32)], 35),
        35,
    ),
}


@functools.cache
def finder(num_rows: int, devices: int):
    if devices == 1:
        return jax.jit(functools.partial(cuthill_mckee, num_rows=num_rows))
    find = jax.shard_map(
        functools.partial(cuthill_mckee, num_rows=num_rows, axis_name="data"),
        mesh=make_mesh({"data": devices}, devices=jax.devices()[:devices]),
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec(),
    )
    return jax.jit(find)


def found(lists: np.ndarray, num_rows: int, *, devices: int) -> list[int]:
    """The order of all rows; padding must come last."""
    graph = PairGraph(lists, np.ones_like(lists), np.ones(len(lists), np.int32))
    order = finder(num_rows, devices)(jax.tree.map(jnp.asarray, graph))
    assert order.dtype == jnp.int32
    assert order[num_rows:].tolist() == list(range(num_rows, len(lists)))
    return order[:num_rows].tolist()


def order_of(edges, num_rows: int, *, devices: int = 1) -> list[int]:
    """The order of a graph's rows, among other rows without edges."""
    order = found(lists_of(edges, NUM_ROWS), NUM_ROWS, devices=devices)
    assert sorted(order) == list(range(NUM_ROWS))
    return [row for row in order if row < num_rows]


def order_by_a_queue(edges, num_rows: int) -> list[int]:
    """The algorithm as Cuthill and McKee describe it, one row after the other."""
    neighbours = [{a + b - row for a, b in edges if row in (a, b)} for row in range(num_rows)]
    degree = [sum(row in edge for edge in edges) for row in range(num_rows)]
    by_degree = sorted(range(num_rows), key=lambda row: (degree[row], row))
    order: list[int] = []
    for seed in by_degree:
        queue = [] if seed in order else [seed]
        while queue:
            order.append(queue.pop(0))
            new = neighbours[order[-1]].difference(order, queue)
            queue += [row for row in by_degree if row in new]
    return order[::-1]


def bandwidth(order, edges) -> int:
    """The largest distance between two neighbours in the order."""
    position = np.argsort(order)
    return max(abs(int(position[start] - position[end])) for start, end in edges)


def scipys_order(edges, num_rows: int) -> list[int]:
    starts, ends = np.array(edges).T
    matrix = csr_matrix((np.ones(len(edges)), (starts, ends)), shape=(num_rows, num_rows))
    return reverse_cuthill_mckee(matrix, symmetric_mode=False).tolist()


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("name", GRAPHS)
def test_levels_at_once_give_the_order_of_one_row_after_the_other(name, devices):
    assert order_of(*GRAPHS[name], devices=devices) == order_by_a_queue(*GRAPHS[name])


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("num_rows", [1, 8, 21])
def test_padding_comes_last(num_rows, devices):
    edges = [edge for edge in random_edges(24, 60) if max(edge) < num_rows]
    order = found(lists_of(edges, num_rows), num_rows, devices=devices)
    assert order == order_by_a_queue(edges, num_rows)


@pytest.mark.parametrize("seed", range(3))
def test_a_path_is_found_again(seed):
    names = np.random.default_rng(seed).permutation(43).tolist()
    order = order_of(shuffled(path(43), 43, seed=seed), 43)
    assert order in (names, names[::-1])


@pytest.mark.parametrize("shape", [(2, 9), (5, 5), (4, 11)])
def test_a_grid_is_as_narrow_as_scipy_makes_it(shape):
    num_rows = shape[0] * shape[1]
    edges = shuffled(grid(*shape), num_rows)
    ours, theirs = order_of(edges, num_rows), scipys_order(edges, num_rows)
    assert bandwidth(ours, edges) <= bandwidth(theirs, edges)
    assert bandwidth(range(num_rows), edges) > 1.5 * bandwidth(theirs, edges)


@pytest.mark.parametrize("seed", range(6))
def test_one_end_and_edges_both_ways_give_scipys_order(seed):
    """Both begin at the only row with a single neighbour; among several, SciPy may choose any."""
    nearest = nearest_in_a_plane(60, 6, seed=seed)
    edges = both_ways([*nearest, (60, seed)])
    starts, ends = np.array(edges).T
    matrix = csr_matrix((np.ones(len(edges)), (starts, ends)))
    assert connected_components(matrix)[0] == 1
    ours, theirs = order_of(edges, 61, devices=8), scipys_order(edges, 61)
    assert ours == theirs
    assert bandwidth(ours, edges) < bandwidth(range(61), edges)


def test_components_are_contiguous_and_rows_without_edges_come_last():
    edges, num_rows = GRAPHS["many components"]
    order = order_of(edges, num_rows)
    assert sorted(order) == list(range(num_rows))
    starts, ends = np.array(edges).T
    matrix = csr_matrix((np.ones(len(edges)), (starts, ends)), shape=(num_rows, num_rows))
    count, component = connected_components(matrix, directed=False)
    assert len(list(itertools.groupby(component[order]))) == count > 20
    alone = sorted(set(range(num_rows)) - set(starts.tolist()) - set(ends.tolist()))
    assert len(alone) > 10
    assert order[-len(alone) :] == alone[::-1]


@pytest.mark.parametrize("devices", [1, 8])
def test_edges_to_and_from_padding_are_ignored(devices):
    lists = lists_of(GRAPHS["nearest"][0], NUM_ROWS)
    padded = lists.copy()
    padded[:, -1], padded[NUM_ROWS:, 0] = NUM_ROWS + 1, 3
    wanted = found(lists, NUM_ROWS, devices=devices)
    assert found(padded, NUM_ROWS, devices=devices) == wanted


def test_an_edge_may_be_in_either_list():
    edges, num_rows = GRAPHS["grid"]
    turned = [edge[:: 1 - 2 * (number % 2)] for number, edge in enumerate(edges)]
    assert order_of(turned, num_rows) == order_of(edges, num_rows)


def pairs(num_rows: int, *, dim: int = 8, topics: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Queries and keys around the centres of topics; row `i` has the topic `i % topics`."""
    centres = np.tile(unit_vectors(0, topics, dim, dtype=jnp.float32), (-(-num_rows // topics), 1))[
        :num_rows
    ]
    noise = (unit_vectors(seed, num_rows, dim, dtype=jnp.float32) for seed in (1, 2))
    sides = (centres + 0.5 * np.asarray(one) for one in noise)
    queries, keys = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides)
    return queries, keys


def dense_order(queries: np.ndarray, keys: np.ndarray, *, quantile: float) -> np.ndarray:
    """The method, computed from the whole matrix."""
    products = queries @ keys.T
    others = ~np.eye(len(queries), dtype=bool)
    edges = (products > np.quantile(products[others], quantile)) & others
    return reverse_cuthill_mckee(csr_matrix(edges), symmetric_mode=False)


@pytest.mark.parametrize("block", [1, 7, 60, 61, 62, 1_000])
def test_blocks_give_the_order_of_the_whole_matrix(block):
    queries, keys = pairs(61)
    order = paper_order(queries, keys, quantile=0.9, block=block)
    assert order.dtype == np.int32
    np.testing.assert_array_equal(order, dense_order(queries, keys, quantile=0.9))


@pytest.mark.parametrize("num_rows", [1, 2, 3, 50, 400])
@pytest.mark.parametrize("quantile", [0.5, 0.97, 0.999])
def test_the_order_is_scipys(num_rows, quantile):
    queries, keys = pairs(num_rows)
    order = paper_order(queries, keys, quantile=quantile)
    assert sorted(order) == list(range(num_rows))
    if num_rows > 1:
        np.testing.assert_array_equal(order, dense_order(queries, keys, quantile=quantile))


def test_own_pairs_are_neither_edges_nor_count():
    """One additional feature per row increases only the product of the row's pair."""
    queries, keys = pairs(50)
    without = paper_order(queries, keys, quantile=0.95)
    for own in (-9, 9):
        ours, theirs = np.c_[queries, np.eye(50)], np.c_[keys, own * np.eye(50)]
        np.testing.assert_array_equal(paper_order(ours, theirs, quantile=0.95), without)
        counted = csr_matrix(ours @ theirs.T > np.quantile(ours @ theirs.T, 0.95))
        assert (reverse_cuthill_mckee(counted, symmetric_mode=False) != without).any()


def test_an_edge_counts_in_either_direction():
    queries, keys = pairs(60)
    order = paper_order(queries, keys, quantile=0.9)
    edges = np.argwhere(queries @ keys.T > np.quantile(queries @ keys.T, 0.9))
    turned = paper_order(keys, queries, quantile=0.9)
    assert bandwidth(turned, edges) == bandwidth(order, edges) < bandwidth(range(60), edges)


def test_rows_of_a_topic_are_contiguous():
    queries, keys = pairs(400)
    order = paper_order(queries, keys, quantile=0.9)
    assert (np.diff(order % 4) == 0).mean() > 0.8
    assert (np.diff(np.random.default_rng(0).permutation(400) % 4) == 0).mean() < 0.3


def test_the_quantile_is_exact_where_the_sample_holds_all_products():
    queries, keys = pairs(100)
    exact = dense_order(queries, keys, quantile=0.9)
    for sample in (100**2, 2**24):
        order = paper_order(queries, keys, quantile=0.9, sample=sample)
        np.testing.assert_array_equal(order, exact)
    fewer = paper_order(queries, keys, quantile=0.9, sample=100**2 - 1)
    assert (fewer != exact).any()


@pytest.mark.parametrize("sample", [1, 500, 20_000])
def test_a_sample_is_of_the_seed_and_loses_no_row(sample):
    orders = [
        paper_order(*pairs(400), quantile=0.9, sample=sample, seed=seed) for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(orders[0], orders[1])
    assert (orders[0] != orders[2]).any()
    for order in orders:
        assert sorted(order) == list(range(400))
        assert (np.diff(order % 4) == 0).mean() > 0.8


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_types_are_taken_as_float32(dtype):
    sides = [side.astype(dtype) for side in pairs(40)]
    single = [side.astype(np.float32) for side in sides]
    np.testing.assert_array_equal(
        paper_order(*sides, quantile=0.9), paper_order(*single, quantile=0.9)
    )


def test_rows_that_are_all_alike_make_no_edge_and_are_not_lost():
    alike = np.ones((10, 4), np.float32) / 2
    assert sorted(paper_order(alike, alike)) == list(range(10))


def test_progress_adds_up_to_all_rows():
    done = []
    paper_order(*pairs(50), block=20, quantile=0.9, advance=done.append)
    assert done == [20, 20, 10]


@pytest.mark.parametrize("quantile", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_quantile_beyond_0_and_1_is_an_error(quantile):
    with pytest.raises(ValueError, match=f"quantile={quantile} must be between 0 and 1"):
        paper_order(*pairs(10), quantile=quantile)


@pytest.mark.parametrize("shape", [(9, 8), (10, 7)])
def test_sides_of_different_shapes_are_named(shape):
    wanted = rf"queries have the shape \(10, 8\) and keys \({shape[0]}, {shape[1]}\)"
    with pytest.raises(ValueError, match=wanted):
        paper_order(pairs(10)[0], np.ones(shape, np.float32))


@pytest.mark.parametrize("sizes", [{"block": 0}, {"sample": 0}])
def test_sizes_below_one_are_an_error(sizes):
    with pytest.raises(ValueError, match="both must be at least 1"):
        paper_order(*pairs(10), **sizes)
