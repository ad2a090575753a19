"""Nearest neighbours and their masses, against a dense computation, on 1 and on 8 devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxcl.assignment.graph import UNIT, Affinity, clustered_graph, exact_graph, two_sided
from jaxcl.ops.grid import length_on_grid
from jaxcl.ops.mesh import make_mesh
from jaxcl.ops.pairs.sides import PairLabels
from tests.helpers import unit_vectors

ROWS, DIM, NEIGHBOURS, BATCH, TEMPERATURE = 96, 12, 7, 16, 0.1
GROUPS = jnp.arange(ROWS) % 9


def pairs(noise=0.5):
    queries = unit_vectors(0, ROWS, DIM, dtype=jnp.float32)
    return queries, queries + noise * unit_vectors(1, ROWS, DIM, dtype=jnp.float32)


@functools.cache
def graph(devices, *, clusters=None, probes=3, by_group=False, cap=None):
    mesh = make_mesh({"data": devices}, devices=jax.devices()[:devices])
    rows = PartitionSpec("data")
    sample = two_sided(*pairs()).theirs[:8]

    def of_shard(queries, keys, ids, groups):
        labels = PairLabels(different=(ids, groups) if by_group else (ids,), valid=ids < ROWS - 2)
        if cap is not None:
            ceiling = jnp.full(ids.shape, cap * length_on_grid(2 * DIM) ** 2)
            labels = labels._replace(ceiling=ceiling)
        both = two_sided(queries, keys)
        affinity = Affinity(NEIGHBOURS, TEMPERATURE, BATCH, sample)
        if clusters is None:
            return exact_graph(both, labels, affinity, axis_name="data")
        members = jnp.asarray(np.asarray(clusters, np.int32))
        return clustered_graph(
            both, labels, affinity, clusters=members, probes=probes, axis_name="data"
        )

    program = jax.jit(jax.shard_map(of_shard, mesh=mesh, in_specs=(rows,) * 4, out_specs=rows))
    return jax.device_get(program(*pairs(), jnp.arange(ROWS), GROUPS))


def likeness():
    """The graph's similarities, exact in float64; −∞ for padding and own pairs."""
    queries, keys = (np.asarray(side, np.float64) for side in two_sided(*pairs()))
    products = queries @ keys.T
    own = products.diagonal().copy()
    np.fill_diagonal(products, -np.inf)
    products[:, ROWS - 2 :] = -np.inf
    return products, own, queries @ keys[:8].T


def test_the_graph_agrees_with_a_dense_matrix():
    products, own, random = likeness()
    found = graph(1)
    order = np.argsort(-products, axis=1, kind="stable")[:, :NEIGHBOURS]
    valid = slice(0, ROWS - 2)  # neighbours of padding do not matter
    np.testing.assert_array_equal(found.rows[valid], order[valid])
    near = np.take_along_axis(products, order, 1)
    greatest = np.maximum(own, near[:, 0])[:, None]
    one = TEMPERATURE * length_on_grid(2 * DIM) ** 2
    masses = np.minimum(np.exp((near - greatest) / one), 1 / 8)
    np.testing.assert_allclose(found.masses[valid] / UNIT, masses[valid], atol=2e-6)
    rest = np.exp((np.minimum(random, near[:, -1:]) - greatest) / one).mean(1) * (BATCH - 1)
    wanted = np.exp((own - greatest[:, 0]) / one) + rest
    np.testing.assert_allclose(found.own[valid] / UNIT, wanted[valid], rtol=1e-4)


def test_products_are_the_mean_of_both_directions():
    queries, keys = (np.asarray(side, np.float64) for side in pairs())
    unit = [side / np.linalg.norm(side, axis=1, keepdims=True) for side in (queries, keys)]
    wanted = (unit[0] @ unit[1].T + unit[1] @ unit[0].T) / 2
    ours, theirs = two_sided(*pairs())
    np.testing.assert_allclose(ours @ theirs.T / length_on_grid(2 * DIM) ** 2, wanted, atol=5e-3)


CLUSTERS = tuple(map(tuple, np.random.default_rng(2).permutation(ROWS).reshape(16, 6)))


@pytest.mark.parametrize("clusters", [None, CLUSTERS])
def test_devices_change_no_bit(clusters):
    jax.tree.map(
        np.testing.assert_array_equal, graph(1, clusters=clusters), graph(8, clusters=clusters)
    )


def test_probing_all_clusters_equals_an_exact_search():
    everywhere = graph(1, clusters=CLUSTERS, probes=16)
    np.testing.assert_array_equal(everywhere.rows[: ROWS - 2], graph(1).rows[: ROWS - 2])
    np.testing.assert_array_equal(everywhere.masses[: ROWS - 2], graph(1).masses[: ROWS - 2])


def test_probing_one_cluster_finds_its_members():
    alone = graph(8, clusters=CLUSTERS, probes=1)
    cluster_of = np.empty(ROWS, int)
    for number, members in enumerate(CLUSTERS):
        cluster_of[list(members)] = number
    for row in range(ROWS - 2):
        there = alone.rows[row][alone.rows[row] >= 0]
        members = {r for r in CLUSTERS[cluster_of[row]] if r < ROWS - 2 and r != row}
        assert set(there.tolist()) == members
        assert (alone.masses[row][alone.rows[row] < 0] == 0).all()


@pytest.mark.parametrize("clusters", [None, CLUSTERS])
def test_rows_of_one_group_are_not_neighbours(clusters):
    found = graph(1, clusters=clusters, by_group=True).rows
    same = np.asarray(GROUPS)[found] == np.asarray(GROUPS)[:, None]
    assert not same[found >= 0].any()
    found = graph(1, clusters=clusters).rows
    assert (np.asarray(GROUPS)[found] == np.asarray(GROUPS)[:, None])[found >= 0].any()


def test_rows_more_similar_than_the_cap_are_not_neighbours():
    products, _, _ = likeness()
    one = length_on_grid(2 * DIM) ** 2
    found = graph(1, cap=0.3).rows
    near = np.take_along_axis(products, np.maximum(found, 0), 1)[found >= 0]
    assert near.max() <= 0.3 * one
    assert products.max() > 0.3 * one
