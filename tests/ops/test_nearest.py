import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxcl.ops.mesh import make_mesh
from jaxcl.ops.nearest import IMPLEMENTATIONS, nearest
from jaxcl.ops.pairs import PairLabels
from tests.helpers import unit_vectors


def by_sorting(queries, table, count, mask=None):
    """Rows by similarity, then by row number."""
    similarities = np.asarray(queries) @ np.asarray(table).T
    if mask is not None:
        similarities = np.where(mask, similarities, -np.inf)
    order = np.argsort(-similarities, axis=1, kind="stable")[:, :count]
    best = np.take_along_axis(similarities, order, 1)
    return best, np.where(np.isfinite(best), order, -1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("num_queries", "num_rows", "tile"), [(1, 1, 4), (5, 30, 4), (8, 16, 8)])
def test_the_nearest_are_those_of_a_sort(num_queries, num_rows, tile, implementation, x64):
    queries, table = unit_vectors(0, num_queries, 6), unit_vectors(1, num_rows, 6)
    count = min(5, num_rows)
    found = jax.jit(
        functools.partial(
            nearest, count=count, query_tile=3, tile=tile, implementation=implementation
        )
    )(queries, table)
    similarities, rows = by_sorting(queries, table, count)
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_allclose(found.similarities, similarities, rtol=1e-12)


def test_groups_hold_the_best_and_among_ties_the_lowest_rows(monkeypatch):
    monkeypatch.setattr("jaxcl.ops.nearest._GROUP", 4)
    # 75 rows with many equal ones, within groups of 4 and across them.
    table = jnp.round(2 * unit_vectors(1, 75, 3, dtype=jnp.float32))
    queries = jnp.round(3 * unit_vectors(0, 9, 3, dtype=jnp.float32))
    for count in (1, 3, 8):
        found = nearest(queries, table, count=count)
        similarities, rows = by_sorting(queries, table, count)
        np.testing.assert_array_equal(found.rows, rows)
        np.testing.assert_array_equal(found.similarities, similarities)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ties_are_ordered_by_the_lowest_row(implementation):
    table = jnp.tile(jnp.eye(3), (7, 1))  # rows 0, 3, 6 … are one vector
    found = nearest(jnp.eye(3), table, count=9, query_tile=2, tile=4, implementation=implementation)
    assert found.rows[0].tolist() == [0, 3, 6, 9, 12, 15, 18, 1, 2]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_masked_rows_are_not_found(implementation, x64):
    queries, table = unit_vectors(0, 5, 6), unit_vectors(1, 13, 6)
    ours, theirs, valid = jnp.arange(5) % 3, jnp.arange(13) % 3, jnp.arange(13) > 2
    found = nearest(
        queries,
        table,
        count=9,
        query_labels=PairLabels(different=(ours,)),
        table_labels=PairLabels(different=(theirs,), valid=valid),
        query_tile=2,
        tile=4,
        implementation=implementation,
    )
    mask = (np.asarray(ours)[:, None] != np.asarray(theirs)) & np.asarray(valid)
    similarities, rows = by_sorting(queries, table, 9, mask)
    np.testing.assert_array_equal(found.rows, rows)
    assert (rows == -1).any()
    np.testing.assert_allclose(found.similarities, similarities, rtol=1e-12)


def test_signed_zeros_are_equals():
    found = nearest(jnp.array([[1.0]]), jnp.array([[-0.0], [0.0], [-0.0]]), count=3)
    assert found.rows.tolist() == [[0, 1, 2]]


def test_missing_neighbours_are_padded():
    found = nearest(jnp.eye(2), jnp.eye(2), count=4)
    assert found.rows.tolist() == [[0, 1, -1, -1], [1, 0, -1, -1]]
    assert found.similarities[:, 2:].tolist() == [[-np.inf] * 2] * 2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [{"data": 8}, {"replica": 2, "data": 4}], ids=str)
def test_a_sharded_table_gives_the_same_rows(shape, implementation, x64):
    mesh = make_mesh(shape)
    rows = PartitionSpec(mesh.axis_names)
    queries, table = unit_vectors(0, 16, 6), jnp.tile(unit_vectors(1, 20, 6), (2, 1))
    labels = jnp.arange(16) % 7, jnp.arange(40) % 7

    def local(queries, table, ours, theirs):
        return nearest(
            queries,
            table,
            count=9,
            query_labels=PairLabels(different=(ours,)),
            table_labels=PairLabels(different=(theirs,)),
            axis_name=mesh.axis_names,
            implementation=implementation,
            query_tile=2,
            tile=4,
        )

    sharded = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, rows, rows), out_specs=rows)
    )
    found = sharded(queries, table, *labels)
    mask = np.asarray(labels[0])[:, None] != np.asarray(labels[1])
    similarities, wanted = by_sorting(queries, table, 9, mask)
    np.testing.assert_array_equal(found.rows, wanted)
    np.testing.assert_allclose(found.similarities, similarities, rtol=1e-12)


def test_no_matrix_of_queries_and_rows_is_stored():
    side = jax.ShapeDtypeStruct((100_000, 256), jnp.float32)
    program = jax.jit(functools.partial(nearest, count=32)).lower(side, side).compile()
    assert program.memory_analysis().temp_size_in_bytes < 2**30


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="'faiss' is unknown; use one of reference, tiled"):
        nearest(jnp.eye(2), jnp.eye(2), count=1, implementation="faiss")
    with pytest.raises(ValueError, match="count=0"):
        nearest(jnp.eye(2), jnp.eye(2), count=0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_that_are_not_finite_are_near_no_query(implementation, bad):
    queries, table = (np.array(unit_vectors(n, 7, 6, dtype=jnp.float32)) for n in (0, 1))
    rest = [row for row in range(7) if row != 3]
    _, places = by_sorting(queries, table[rest], 6)
    table[3, 2] = bad
    queries[5] = np.nan
    find = functools.partial(nearest, count=7, tile=4, implementation=implementation)
    found = find(jnp.asarray(queries), jnp.asarray(table))
    expected = np.column_stack([np.array(rest)[places], np.full(7, -1)])
    expected[5] = -1
    np.testing.assert_array_equal(found.rows, expected)
    np.testing.assert_array_equal(np.isneginf(found.similarities), expected == -1)
