"""Mined negatives: their ranks, margins and number, the same on any mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxcl.negatives.mining import MiningRule, mine_negatives
from jaxcl.ops.mesh import make_mesh
from jaxcl.ops.pairs import PairLabels
from tests.helpers import unit_vectors

ROWS, DIM = 64, 6
IDS = np.arange(ROWS) // 2


@functools.cache
def miner(rule, devices):
    mesh = make_mesh({"data": devices}, devices=jax.devices()[:devices])
    rows = PartitionSpec("data")

    def local(queries, keys, ids, row_keys):
        labels = PairLabels(different=(ids,))
        return mine_negatives(
            queries,
            keys,
            keys,
            rule=rule,
            row_keys=row_keys,
            query_labels=labels,
            table_labels=labels,
            axis_name="data",
        )

    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=rows, out_specs=rows))


def mined(rule, *, devices=1, seed=0):
    queries, keys = (unit_vectors(n, ROWS, DIM, dtype=jnp.float32) for n in range(2))
    keys = queries + 0.5 * keys
    row_keys = jax.random.split(jax.random.key(seed), ROWS)
    found = miner(rule, devices)(queries, keys, jnp.asarray(IDS), row_keys)
    return jax.device_get(found), queries @ keys.T


def ranked(scores):
    """Each query's rows of other ids, the nearest first."""
    masked = np.where(IDS[:, None] == IDS, -np.inf, scores)
    order = np.argsort(-masked, axis=1, kind="stable")
    return order[:, : ROWS - 2]


@pytest.mark.parametrize("devices", [1, 8])
def test_the_top_are_those_of_the_range_that_keep_the_margin(devices):
    rule = MiningRule(per_query=4, rank_range=(2, 9), relative_margin=0.1, sampling="top")
    found, scores = mined(rule, devices=devices)
    scores = np.asarray(scores)
    for row, order in enumerate(ranked(scores)):
        ceiling = scores[row, row] - 0.1 * abs(scores[row, row])
        wanted = [place for place in range(2, 9) if scores[row, order[place]] <= ceiling][:4]
        there = found.rows[row] >= 0
        assert found.ranks[row][there].tolist() == wanted
        assert found.rows[row][there].tolist() == order[wanted].tolist()
        assert (found.similarities[row][~there] == -np.inf).all()
    counts = (found.rows >= 0).sum(1)
    assert counts.min() < 4  # ragged
    assert counts.max() == 4


def test_random_negatives_are_drawn_uniformly_from_the_whole_range():
    rule = MiningRule(per_query=3, rank_range=(5, 15))
    ranks = []
    for seed in range(20):
        found, _ = mined(rule, seed=seed)
        assert (np.diff(found.ranks, axis=1) > 0).all()  # the nearest first, without repeats
        ranks += found.ranks.ravel().tolist()
    counts = np.bincount(ranks, minlength=20)
    assert counts[:5].sum() == counts[15:].sum() == 0
    expected = 20 * ROWS * 3 / 10
    assert np.abs(counts[5:15] - expected).max() < 5 * np.sqrt(expected)


def test_any_number_of_devices_mines_the_same():
    rule = MiningRule(per_query=3, rank_range=(1, 20), margin=0.05)
    one, many = (mined(rule, devices=devices)[0] for devices in (1, 8))
    np.testing.assert_array_equal(one.rows, many.rows)
    other, _ = mined(rule, seed=1)
    assert (one.rows != other.rows).any()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (MiningRule(per_query=0), "per_query=0; set it to at least 1"),
        (MiningRule(rank_range=(10, 12)), "10:12 has no room for 7"),
        (MiningRule(rank_range=(-1, 12)), "begins at 0 or later"),
        (MiningRule(margin=0.1, relative_margin=0.1), "choose one"),
        (MiningRule(sampling="best"), "'best' is unknown; use one of random, top"),
    ],
)
def test_a_rule_that_finds_nothing_is_named(rule, message):
    with pytest.raises(ValueError, match=message):
        mined(rule)


def test_a_key_that_is_not_a_number_is_never_mined():
    queries, keys = (unit_vectors(n, ROWS, DIM, dtype=jnp.float32) for n in range(2))
    row_keys = jax.random.split(jax.random.key(0), ROWS)
    rule = MiningRule(per_query=8, rank_range=(0, 8), sampling="top")
    found = miner(rule, 1)(queries, keys.at[7].set(jnp.nan), jnp.asarray(IDS), row_keys)
    rows = np.delete(np.asarray(found.rows), 7, axis=0)  # with its NaN key, row 7 still has a query
    assert (rows >= 0).all()
    assert not (found.rows == 7).any()
