"""Every loss with all its negatives: a cached step on a mesh equals a plain one on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.losses import LOSSES, SharedNegatives
from jaxcl.losses.matryoshka import nested
from jaxcl.models import StaticEncoder, make_towers
from jaxcl.models.augmentations import token_dropout
from jaxcl.negatives.memory_bank import init_bank, update_queue
from jaxcl.negatives.tiers import TierBudgets
from jaxcl.ops.mesh import make_mesh, put_batch, replicated_sharding, table_sharding
from jaxcl.step.batch_loss import BeyondBatch, make_loss
from jaxcl.typing import SIDES
from tests.helpers import relative_error, relative_errors, some_slow

pytestmark = pytest.mark.usefixtures("x64")

ROWS, SLOTS, DIM = 16, 64, 8
ALL = {**LOSSES, "matryoshka": nested(LOSSES["infonce"], dims=(3, DIM))}
TOWERS = make_towers(
    lambda rngs: StaticEncoder(50, dim=DIM, max_tokens=9, rngs=rngs),
    augment=dict.fromkeys(SIDES, token_dropout(rate=0.3)),
)


def batch():
    rng = np.random.default_rng(0)
    rows = (np.arange(ROWS) % 15).astype(np.int32)  # one row occurs twice
    others = rng.integers(0, 20, (ROWS, 3)).astype(np.int32)
    tokens = rng.integers(1, 50, (5, ROWS, 9)).astype(np.int32)
    return {
        "query": {"tokens": tokens[0]},
        "key": {"tokens": tokens[1]},
        "row": rows,
        "group": rows // 2,
        "teacher_scores": rng.normal(size=(ROWS, 4)),
        "score": rng.integers(0, 5, ROWS) / 4,
        "guides": {side: rng.normal(size=(ROWS, DIM)) for side in SIDES},
        "negatives": {
            "inputs": {"tokens": tokens[2:].transpose(1, 0, 2)},
            "valid": others % 5 != 0,
            "row": others,
            "group": others // 2,
        },
    }


def filled_bank():
    rng = np.random.default_rng(1)
    bank = init_bank(SLOTS, DIM, dtype=jnp.dtype("float64"))
    vectors = rng.normal(size=(SLOTS, DIM))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = jnp.asarray(rng.integers(0, 25, SLOTS), jnp.int32)
    return update_queue(bank, jnp.asarray(vectors), ids, ids // 2, num_slots=SLOTS)


def value_and_gradients(
    name,
    devices,
    chunk_sizes,
    *,
    explicit=True,
    own_group=False,
    without_valid=False,
    gradients=True,
):
    loss, mesh = ALL[name], make_mesh({"data": devices}, devices=jax.devices()[:devices])
    update_banks, budgets = {}, TierBudgets()
    memory = {}
    if SharedNegatives in loss.negatives:
        update_banks = {"key": lambda old, *_: old}
        # All tiers enter every loss in the same way, so one loss with the slow tiers is enough.
        more = {"nearest": 4, "mixed": 2} if name == "infonce" else {}
        budgets = TierBudgets(uniform=16, **more)
        memory["bank"] = {"key": filled_bank()}
    if loss.init_memory is not None:
        tables = loss.init_memory(ROWS, temperature=0.05)
        memory["rows"] = jax.tree.map(lambda table: table.astype(jnp.float64), tables)
    masks = {"ids": "row", "groups": "group"}
    of_batch = make_loss(
        TOWERS,
        loss,
        mesh,
        masks=masks,
        chunk_sizes=chunk_sizes,
        beyond=BeyondBatch(budgets, update_banks),
    )
    params = {"towers": TOWERS.init(jax.random.key(0)), "log_temperature": jnp.log(0.1)}
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    if loss.has_bias:
        params["bias"] = jnp.asarray(-2.0)
    given = batch()
    if not explicit:
        del given["negatives"]
    elif own_group:
        given["negatives"]["group"] = np.ones_like(given["negatives"]["group"])
        given["group"] = np.ones_like(given["group"])
        if without_valid:
            given["negatives"]["valid"] = np.zeros_like(given["negatives"]["valid"])
    tables = table_sharding(mesh)
    memory = jax.tree.map(
        lambda leaf: jax.device_put(leaf, tables if leaf.ndim else replicated_sharding(mesh)),
        memory,
    )
    params = jax.device_put(params, replicated_sharding(mesh))
    arguments = params, memory, put_batch(given, mesh), jax.random.key(2)
    if not gradients:
        return jax.jit(of_batch)(*arguments)
    (value, after), found = jax.jit(jax.value_and_grad(of_batch, has_aux=True))(*arguments)
    if not loss.has_temperature:  # the gradient is zero
        del found["log_temperature"]
    return value, found, after.get("rows", {})


# The others differ from these only in parts that `tests/losses/test_battery.py` checks on a mesh.
DISTINCT = ("infonce", "running_estimate", "distillation", "cosent")


@pytest.mark.parametrize(
    "name",
    [pytest.param(one, marks=[] if one in DISTINCT else [pytest.mark.slow]) for one in ALL],
)
def test_cached_on_a_mesh_is_whole_on_one_device(name):
    wanted = value_and_gradients(name, 1, None)
    found = value_and_gradients(name, 8, {"query": 1, "key": 2})
    rows = [jax.tree.map(lambda table: table[: ROWS - 1], result[2]) for result in (found, wanted)]
    assert max(relative_errors(found[:2], wanted[:2]).values()) < 1e-10
    if rows[0]:
        assert max(relative_errors(*rows).values()) < 1e-10


@pytest.mark.parametrize(
    "name",
    some_slow(
        [name for name in ALL if SharedNegatives in ALL[name].negatives],
        ("infonce", "matryoshka", "sigmoid", "supervised"),
    ),
)
def test_explicit_negatives_change_the_loss(name):
    value, _ = value_and_gradients(name, 1, None, gradients=False)
    without, _ = value_and_gradients(name, 1, None, explicit=False, gradients=False)
    assert relative_error(without, value) > 1e-3


@pytest.mark.parametrize("name", ["infonce", "supervised"])
def test_explicit_negatives_of_a_row_s_own_group_are_masked(name):
    """Groups are masks of one loss, and classes of the other."""
    one_group = {"gradients": False, "own_group": True}
    value, _ = value_and_gradients(name, 1, None, **one_group)
    without, _ = value_and_gradients(name, 1, None, **one_group, without_valid=True)
    np.testing.assert_allclose(value, without, rtol=1e-12)
