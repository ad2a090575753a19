"""Every optimizer: trains, is deterministic, and is the same over devices and over `fsdp`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcl.models.trainable import parameter_paths
from jaxcl.ops.mesh import put_batch
from jaxcl.run.optimizer import build_optimizer
from jaxcl.run.training import abstract_parameters, build_towers, build_training
from jaxcl.settings.derived import schedule_warnings
from jaxcl.settings.optimizers import OPTIMIZERS
from jaxcl.settings.parts import SCHEDULE_FIELDS, SCHEDULES
from jaxcl.settings.read import read_settings
from jaxcl.step import parameter_sharding
from tests.helpers import bits, relative_errors

MODEL = {
    "name": "transformer",
    "dim": 8,
    "options": {
        **{"hidden_dim": 8, "num_layers": 2, "num_heads": 2, "mlp_dim": 16},
        **{"scan_layers": True, "dropout": 0.0},
    },
}
STATIC = {"name": "static", "dim": 8, "options": {"hidden_dim": 16}}
OPTIONS = {"adafactor": {"min_dim_size_to_factor": 4}}
GROUPS = {
    "rates": (("*table", 0.5),),
    "clip_groups": (("log_temperature", 1.0),),
    "freeze": ("*/position_weight",),
    "weight_decay": 0.01,
}


def settings_of(name, *, model=MODEL, **changes):
    optimizer = {"name": name, "options": OPTIONS.get(name, {}), "learning_rate": 0.02}
    optimizer |= {"schedule": "constant", **changes.pop("optimizer", {})}
    data = {"vocabulary_size": 16, "max_tokens": {"query": 8, "key": 8}}
    return read_settings(
        {"model": model, "data": data, "optimizer": optimizer, "global_batch_size": 8, **changes}
    )


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 16, (8, 8)).astype(np.int32)
    rows = np.arange(8, dtype=np.int32)
    side = {"tokens": tokens, "length": np.full(8, 8, np.int32)}
    return {"query": side, "key": side, "row": rows, "group": rows, "text": rows}


def trained(program, *, steps):
    """The losses and the last state."""
    state, losses = program.init(), []
    for _ in range(steps):
        state, metrics = program.train_step(state, put_batch(batch(), program.mesh))
        losses.append(float(metrics.loss))
    return losses, state


# The states of the slow ones have the shapes of Adam's or SGD's.
SLOW = ("adamw", "adagrad", "lion", "radam", "rmsprop")


@pytest.mark.parametrize(
    "name",
    [pytest.param(one, marks=pytest.mark.slow if one in SLOW else ()) for one in OPTIMIZERS],
)
def test_every_optimizer_trains_alike_on_any_mesh(name, monkeypatch):
    monkeypatch.setattr(parameter_sharding, "_WORTH_CUTTING", 1)
    given = {"model": STATIC, "optimizer": GROUPS}
    one = settings_of(name, **given, run={"mesh": {"data": 1, "fsdp": 1}})
    losses, state = trained(build_training(one, devices=jax.devices()[:1]), steps=6)
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    # A rule that fits the parameter, and not all of the optimizer's state.
    run = {"mesh": {"data": 2, "fsdp": 4}, "parameter_rules": (("projection/kernel$", 1),)}
    program = build_training(settings_of(name, **given, run=run))
    found, sharded = trained(program, steps=2)
    np.testing.assert_allclose(found, losses[:2], rtol=1e-4)
    assert parameter_paths(sharded.params) == parameter_paths(state.params)
    again, same = trained(program, steps=2)
    assert again == found
    assert jax.tree.map(bits, same) == jax.tree.map(bits, sharded)


def params_of(settings):
    params = abstract_parameters(settings, build_towers(settings))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params)


def first_updates(settings, params):
    made, _ = build_optimizer(settings, params)
    gradients = jax.tree.map(lambda leaf: leaf[::-1] if leaf.ndim else leaf, params)
    return gradients, made.update(gradients, made.init(params), params)[0]


def test_muon_is_that_of_optax_for_matrices_and_adam_for_all_else():
    settings = settings_of("muon", optimizer={"clip_norm": 0.0})
    params = params_of(settings)
    gradients, updates = first_updates(settings, params)
    nesterov = {"clip_norm": 0.0, "options": {"nesterov": True}}  # as optax does within muon
    _, adam = first_updates(settings_of("adam", optimizer=nesterov), params)
    muon = optax.contrib.muon(0.02)
    for path in parameter_paths(params):
        gradient, found, of_adam = (_at(tree, path) for tree in (gradients, updates, adam))
        if path.endswith("kernel"):
            layers = gradient if "/blocks/" in path else gradient[None]
            wanted = [muon.update(one, muon.init(one), one)[0] for one in layers]
            np.testing.assert_allclose(found.reshape(layers.shape), wanted, rtol=2e-3, atol=1e-5)
            assert not np.allclose(found, of_adam, rtol=0.1)
        else:
            np.testing.assert_allclose(found, of_adam, rtol=1e-4, err_msg=path)


def _at(tree, path):
    for name in path.split("/"):
        tree = tree[name]
    return np.asarray(tree)


def test_adafactor_is_that_of_optax_and_holds_a_row_and_a_column_of_a_matrix():
    settings = settings_of("adafactor", optimizer={"clip_norm": 0.0})
    params = params_of(settings)
    gradients, updates = first_updates(settings, params)
    theirs = optax.adafactor(0.02, min_dim_size_to_factor=4)
    wanted, _ = theirs.update(gradients, theirs.init(params), params)
    assert max(relative_errors(updates, wanted).values()) < 1e-5
    adam = settings_of("adam", optimizer={"clip_norm": 0.0})
    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(build_optimizer(one, params)[0].init(params)))
        for one in (settings, adam)
    ]
    assert sizes[0] < sizes[1] / 3


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("warmup_cosine", {0: 0.0, 2: 1.0, 6: 0.55, 10: 0.1}),
        ("warmup_linear", {0: 0.0, 1: 0.5, 2: 1.0, 6: 0.55, 10: 0.1}),
        ("warmup_constant", {0: 0.0, 1: 0.5, 2: 1.0, 10: 1.0}),
        ("warmup_stable_decay", {0: 0.0, 1: 0.5, 2: 1.0, 6: 1.0, 8: 0.55, 10: 0.1}),
        ("cosine", {0: 1.0, 5: 0.55, 10: 0.1}),
        ("linear", {0: 1.0, 5: 0.55, 10: 0.1}),
        ("constant", {0: 1.0, 10: 1.0}),
    ],
)
def test_each_schedule_has_the_values_of_its_name(name, values):
    given = {"warmup_steps": 2, "decay_steps": 4, "final_rate": 0.1}
    given = {field: given[field] for field in SCHEDULE_FIELDS[name]}
    rate = SCHEDULES[name].function(3.0, steps=10, **given)
    for step, share in values.items():
        np.testing.assert_allclose(rate(step), 3.0 * share, rtol=1e-5, atol=1e-7)


WARNINGS = {
    "warmup": "warmup_steps=30 does not fit into the run's 20 steps, .* is shortened to ",
    "peak": "warmup_steps=30 is not less than the run's 20 steps, so .* never reaches its peak",
    "decay": "decay_steps=30 is more than the run's 20 steps, so .* decays from the first step",
}


@pytest.mark.parametrize(
    ("schedule", "given", "wanted"),
    [
        ("warmup_cosine", {}, [WARNINGS["warmup"] + "19$"]),  # 30 steps of warmup by default
        ("warmup_cosine", {"warmup_steps": 19}, []),
        ("warmup_linear", {"warmup_steps": 30}, [WARNINGS["warmup"] + "19$"]),
        ("warmup_linear", {"warmup_steps": None}, []),
        ("warmup_constant", {"warmup_steps": 30}, [WARNINGS["peak"]]),
        ("warmup_constant", {"warmup_steps": 19}, []),
        ("warmup_stable_decay", {"warmup_steps": 18}, []),
        ("warmup_stable_decay", {}, [WARNINGS["warmup"] + "18$"]),
        ("warmup_stable_decay", {"warmup_steps": 0, "decay_steps": 30}, [WARNINGS["decay"]]),
        ("warmup_stable_decay", {"decay_steps": 20}, [WARNINGS["warmup"] + "0$"]),
        ("cosine", {}, []),
        ("constant", {}, []),
    ],
)
def test_a_warmup_or_decay_that_does_not_fit_is_shortened_with_a_warning(schedule, given, wanted):
    settings = read_settings({"steps": 20, "optimizer": {"schedule": schedule, **given}})
    lines = list(schedule_warnings(settings.optimizer, steps=settings.steps))
    assert len(lines) == len(wanted)
    for line, pattern in zip(lines, wanted, strict=True):
        assert re.match(rf"optimizer\.{pattern}", line)
    if schedule in ("warmup_cosine", "warmup_linear", "warmup_stable_decay"):
        _, rate = build_optimizer(settings, {"one": jnp.ones(1)})
        rates = [float(rate(step)) for step in range(21)]
        shortened = [line.rpartition(" ")[2] for line in lines if "shortened" in line]
        for step in shortened:  # the peak is where the warning says
            assert rates[int(step)] == max(rates)
        assert rates[20] == pytest.approx(0, abs=1e-9)


def test_every_schedule_declares_what_it_reads():
    assert SCHEDULE_FIELDS.keys() == SCHEDULES.keys()


def test_decay_steps_of_none_are_a_tenth_of_the_steps():
    settings = settings_of("sgd", steps=40, optimizer={"schedule": "warmup_stable_decay"})
    _, rate = build_optimizer(settings, {"one": jnp.ones(1)})
    np.testing.assert_allclose([rate(36), rate(38), rate(40)], [0.02, 0.01, 0.0], atol=1e-8)


@pytest.mark.parametrize(
    ("schedule", "field"),
    [
        ("constant", "warmup_steps"),
        ("constant", "final_rate"),
        ("warmup_cosine", "decay_steps"),
        ("warmup_constant", "final_rate"),
    ],
)
def test_a_field_that_the_schedule_does_not_read_has_no_effect(schedule, field):
    config = {"optimizer": {"schedule": schedule}}
    with pytest.raises(ValueError, match=f"{field} has no effect here"):
        read_settings(config, changed=[f"optimizer.{field}"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_option_reaches_its_optimizer(name):
    for option in OPTIMIZERS[name].options._fields:
        value = {"mu_dtype": "bfloat16", "nesterov": True, "ns_steps": 3}.get(option, 0.5)
        if option in ("min_dim_size_to_factor", "clipping_threshold"):
            value = 2
        if option == "multiply_by_parameter_scale":
            value = False
        settings = read_settings({"optimizer": {"name": name, "options": {option: value}}})
        made, _ = build_optimizer(settings, {"one": jnp.ones((4, 4))})
        made.update(
            {"one": jnp.ones((4, 4))},
            made.init({"one": jnp.ones((4, 4))}),
            {"one": jnp.ones((4, 4))},
        )


def test_accumulated_gradients_and_the_average_are_sharded_like_the_parameters(monkeypatch):
    monkeypatch.setattr(parameter_sharding, "_WORTH_CUTTING", 1)
    given = {"model": STATIC, "optimizer": {"accumulate_steps": 2, "average_decay": 0.5}}
    one = settings_of("adam", **given, run={"mesh": {"data": 1, "fsdp": 1}})
    losses, whole = trained(build_training(one, devices=jax.devices()[:1]), steps=4)
    assert losses[0] == losses[1] != losses[2]  # one batch, so that only an update changes the loss
    mesh = {"data": 2, "fsdp": 4}
    found, state = trained(
        build_training(settings_of("adam", **given, run={"mesh": mesh})), steps=4
    )
    np.testing.assert_allclose(found, losses, rtol=1e-4)
    averages = (one.memory["average"].towers for one in (state, whole))
    assert max(relative_errors(*averages).values()) < 1e-4
    where = state.params["towers"]["both"]["table"].sharding
    assert not where.is_fully_replicated
    assert state.optimizer.acc_grads["towers"]["both"]["table"].sharding == where
    assert state.memory["average"].towers["both"]["table"].sharding == where
