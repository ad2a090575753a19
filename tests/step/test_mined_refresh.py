"""Mining from the banks in training: blocks change nothing, and unseen rows are left out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.negatives.memory_bank import init_bank, update_instances
from jaxcl.negatives.mining import MiningRule
from jaxcl.ops.mesh import make_mesh
from jaxcl.step import mined_refresh as refreshing
from jaxcl.step.mined_refresh import _blocks, make_mined_refresh
from jaxcl.step.train_state import TrainState
from jaxcl.step.train_step import state_sharding
from tests.helpers import unit_vectors

ROWS, DIM = 90, 6
SEEN = np.arange(ROWS) % 4 != 0
RULE = MiningRule(per_query=3, rank_range=(1, 9), relative_margin=0.02)


def refreshed(mesh, *, by_group=False):
    rows = jnp.flatnonzero(jnp.asarray(SEEN))
    banks = {}
    queries = unit_vectors(0, ROWS, DIM, dtype=jnp.float32)
    for side, vectors in (
        ("query", queries),
        ("key", queries + 0.3 * unit_vectors(1, ROWS, DIM, dtype=jnp.float32)),
    ):
        banks[side] = update_instances(init_bank(ROWS, DIM), vectors[rows], rows, rows % 5)
    mined = jnp.full((1_024, RULE.per_query), -1, jnp.int32)
    memory = {"bank": banks, "mined": mined}
    state = TrainState(jnp.int32(3), {}, {}, memory, jax.random.key(0))
    state = jax.device_put(state, state_sharding(mesh, state))
    state, metrics = make_mined_refresh(RULE, mesh, by_group=by_group)(state)
    return np.asarray(state.memory["mined"]), {name: float(v) for name, v in metrics.items()}


def meshes():
    return (
        make_mesh({"data": size}, devices=jax.devices()[:size]) for size in (1, jax.device_count())
    )


@pytest.mark.parametrize("by_group", [pytest.param(False, marks=pytest.mark.slow), True])
def test_blocks_and_devices_change_nothing_and_only_seen_rows_take_part(monkeypatch, by_group):
    one, many = meshes()
    whole, metrics = refreshed(one, by_group=by_group)
    monkeypatch.setattr(refreshing, "_BLOCK_ROWS", 512)
    for mesh in (one, many):
        in_blocks, theirs = refreshed(mesh, by_group=by_group)
        np.testing.assert_array_equal(in_blocks, whole)
        assert theirs == pytest.approx(metrics, rel=1e-5)
    found = whole[:ROWS]
    assert (found[~SEEN] == -1).all()
    assert (whole[ROWS:] == -1).all()
    assert SEEN[found[found >= 0]].all()
    assert (found[SEEN] >= 0).any(1).all()
    assert metrics["mined/per_row"] == pytest.approx((found >= 0).sum() / SEEN.sum())
    assert 1 <= metrics["mined/rank"] < 9
    same = (found % 5 == np.arange(ROWS)[:, None] % 5)[found >= 0]
    assert same.any() != by_group


@pytest.mark.parametrize(
    ("rows", "most", "blocks"), [(1_024, 4_096, 1), (1_024, 512, 2), (6, 4, 2), (7, 3, 7)]
)
def test_blocks_are_equal_and_no_larger_than_allowed(rows, most, blocks):
    assert _blocks(rows, most=most) == blocks
