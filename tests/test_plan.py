"""The memory and work of a step, as the compiler reports them."""

import math

import jax
import numpy as np
import pytest
from jaxcl.configs.code_search import get_config

from jaxcl.cost.chips import CHIPS
from jaxcl.ops.mesh import put_batch
from jaxcl.plan import NoRoomError, Plan, _advice, _devices, _settings, main, make_plan
from jaxcl.settings.read import read_settings
from tests.helpers import training_of

ROWS = 2_000


def small(**changes):
    config = get_config("smoke")
    config.data.vocabulary_size = 4_096
    config.model.dim = 64
    for name, value in changes.items():
        place = config
        *parents, leaf = name.split(".")
        for parent in parents:
            place = place[parent]
        place[leaf] = value
    return config


@pytest.mark.parametrize(
    "changes",
    [
        {"run.mesh.fsdp": 4},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param(
            {"negatives.bank.kind": "instance", "negatives.tiers.full_bank": True},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["fsdp", "data", "bank"],
)
def test_parts_are_those_of_the_arrays(changes):
    config = small(**changes)
    plan = make_plan(read_settings(config), jax.devices(), num_rows=ROWS)
    program = training_of(config)
    state = program.init(ROWS, np.zeros(ROWS, np.int32))
    for part, tree in (
        (plan.parameters, state.params),
        (plan.optimizer, state.optimizer),
        (plan.memory, state.memory),
    ):
        leaves = jax.tree.leaves(tree)
        assert part == sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    rng = np.random.default_rng(0)
    size = config.global_batch_size
    batch = {
        side: {"tokens": rng.integers(1, 99, (size, config.data.max_tokens[side]), np.int32)}
        for side in ("query", "key")
    }
    batch |= {name: np.arange(size, dtype=np.int32) for name in ("row", "text", "group")}
    _, metrics = program.train_step(state, put_batch(batch, program.mesh))  # the same shapes
    assert math.isfinite(metrics.loss)
    assert plan.loss > 0
    assert plan.activations > 0
    assert plan.flops > 2 * size**2 / 8 * config.model.dim  # only the loss
    assert plan.moved > 0


def test_mined_negatives_are_part_of_the_batch_and_of_the_loss():
    mined = {"negatives.bank.kind": "instance", "negatives.mined.refresh_every": 5}
    config = small(**mined)
    plan = make_plan(read_settings(config), jax.devices(), num_rows=ROWS)
    rows, count = config.global_batch_size // 8, config.negatives.mined.per_query
    tokens = {side: 4 * length for side, length in config.data.max_tokens.items()}
    labels = 3 * 4
    assert plan.batch == rows * (sum(tokens.values()) + labels) + rows * count * (
        tokens["key"] + labels + 1
    )
    gradients = 2 * rows * 4 * config.model.dim  # for queries and keys
    assert plan.loss > gradients + rows * count * 4 * config.model.dim


@pytest.mark.slow
def test_parameters_over_an_axis_take_a_share():
    whole, shared = (
        make_plan(read_settings(small(**{"run.mesh.fsdp": size})), jax.devices(), num_rows=ROWS)
        for size in (1, 8)
    )
    assert shared.parameters < whole.parameters / 7
    assert shared.optimizer < whole.optimizer / 7


def test_the_slowest_part_is_the_bound_and_the_advice_is_about_the_largest():
    chip = CHIPS["v5e"]
    plan = Plan(256, 1, 2, 3, 4, 5, 2**40, flops=197e12, accessed=819e9 / 2, moved=25 * 10**9)
    assert plan.seconds(chip) == {"compute": 1.0, "memory": 0.5, "interconnect": 0.25}
    assert plan.total == 15 + 2**40
    assert "grad_cache" in _advice(plan)
    assert "ring" in _advice(plan._replace(loss=2**41))
    assert "fsdp" in _advice(plan._replace(optimizer=2**41))
    assert "bank" in _advice(plan._replace(memory=2**41))


def test_a_sweep_has_a_column_for_each_value():
    config = small()
    found = _settings(config, "global_batch_size=64,128")
    assert [one.global_batch_size for one in found.values()] == [64, 128]
    assert config.global_batch_size == 64
    found = _settings(config, "negatives.tiers.full_bank=True,False")
    assert [one.negatives.tiers.full_bank for one in found.values()] == [True, False]
    found = _settings(config, "loss.masks=('row',),('row', 'text'),text")
    assert [one.loss.masks for one in found.values()] == [("row",), ("row", "text"), ("text",)]
    for wrong, reason in (
        ("model.depth=1,2", "model.depth=1: there is no such field as depth; model has "),
        ("global_batch_size=many", "global_batch_size=many: give an integer$"),
    ):
        with pytest.raises(ValueError, match=f"^--sweep {reason}"):
            _settings(config, wrong)
    with pytest.raises(ValueError, match="give a field and its values"):
        _settings(config, "steps")


def test_a_step_that_the_compiler_cannot_fit_is_named(monkeypatch):
    def exhausted(self):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory: 19G of 15G.")

    monkeypatch.setattr(jax.stages.Lowered, "compile", exhausted)
    with pytest.raises(NoRoomError, match=r"^Ran out of memory: 19G of 15G.; try grad_cache"):
        make_plan(read_settings(small()), jax.devices(), num_rows=ROWS)


def test_shapes_that_only_a_file_has_are_an_error():
    with pytest.raises(ValueError, match="are known only from files"):
        make_plan(
            read_settings(small(**{"data.negatives": "mined.npz"})), jax.devices(), num_rows=ROWS
        )


def test_fewer_rows_than_a_batch_or_devices_than_asked_for_are_errors():
    with pytest.raises(ValueError, match="fewer than one batch"):
        make_plan(read_settings(small()), jax.devices(), num_rows=0)
    with pytest.raises(ValueError, match="but this machine has 8"):
        _devices(None, 9)


def test_a_number_of_devices_next_to_a_topology_is_an_error(capsys):
    command = ["--config", "pairs:smoke", "--topology", "v5e:2x2", "--devices", "8"]
    with pytest.raises(SystemExit):
        main(command)
    assert "--devices=8 and --topology=v5e:2x2 are both given" in capsys.readouterr().err


@pytest.mark.parametrize("topology", ["v5e", "v5e:", "v9:4x4", "H100:8", "v5e:4x", "", "../v4:2"])
def test_an_unknown_slice_is_an_error_that_lists_the_known_ones(topology):
    with pytest.raises(ValueError, match="is unknown; give v4, v5e, v5p or v6e, and the shape"):
        _devices(topology, None)
