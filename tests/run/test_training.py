"""From a config to the parts of a run: each option has its effect."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxcl.configs.code_search import get_config

from jaxcl.assignment import PRESETS, Gcbs
from jaxcl.configs import large_encoders
from jaxcl.losses import LOSSES
from jaxcl.models.trainable import split
from jaxcl.ops.mesh import put_batch
from jaxcl.run import training
from jaxcl.run.build_loss import _chunk_sizes, build_momentum
from jaxcl.run.memory import tiers_left_empty
from jaxcl.run.optimizer import build_optimizer
from jaxcl.settings.derived import gcbs_rule
from jaxcl.settings.read import read_settings
from tests.helpers import training_of
from tests.models.pretrained.tiny import write_copy_of_decoder
from tests.models.pretrained.tiny_towers import write_copy_of_towers
from tests.step.test_every_loss import DISTINCT

RATE = 0.5
QUEUE = {"negatives.bank.kind": "queue", "negatives.tiers.full_bank": True}
GCBS = {"name": "gcbs", "gcbs.refresh_every": 5, "gcbs.block_size": 4}  # of config.assignment


def test_the_rate_rises_to_its_peak_and_falls_to_zero():
    _, rate = optimizer_of(warmup_steps=2, steps=10)
    wanted = {0: 0.0, 1: RATE / 2, 2: RATE, 6: RATE / 2, 10: 0.0}
    for step, value in wanted.items():
        np.testing.assert_allclose(rate(step), value, atol=1e-7, err_msg=str(step))


def test_a_warmup_longer_than_the_run_peaks_at_the_last_step():
    _, rate = optimizer_of(warmup_steps=10, steps=4)
    np.testing.assert_allclose(rate(3), RATE, rtol=1e-6)


def test_a_warmup_of_none_is_a_tenth_of_the_steps():
    _, rate = optimizer_of(warmup_steps=None, steps=40)
    values = [float(rate(step)) for step in range(40)]
    np.testing.assert_allclose(values[:5], [RATE * step / 4 for step in range(5)], rtol=1e-6)
    assert max(values) == values[4]


def test_decay_shrinks_matrices_by_their_size_and_no_vector():
    params = {"matrix": jnp.array([[1.0, -4.0]]), "vector": jnp.ones(2), "scalar": jnp.ones(())}
    zeros = jax.tree.map(jnp.zeros_like, params)
    optimizer, _ = optimizer_of(weight_decay=0.1)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["matrix"], -RATE * 0.1 * params["matrix"], rtol=1e-6)
    assert not updates["vector"].any()
    assert not updates["scalar"].any()


@pytest.mark.parametrize(("clip_norm", "factor"), [(1.0, 1 / 5), (10.0, 1.0), (0.0, 1.0)])
def test_gradients_are_clipped_by_their_norm_together(clip_norm, factor):
    gradients = {"one": jnp.array([3.0]), "other": jnp.array([4.0])}
    optimizer, _ = optimizer_of(name="sgd", options={"decay": 0.0}, clip_norm=clip_norm)
    updates, _ = optimizer.update(gradients, optimizer.init(gradients), gradients)
    np.testing.assert_allclose(updates["one"], [-RATE * factor * 3.0], rtol=1e-6)
    np.testing.assert_allclose(updates["other"], [-RATE * factor * 4.0], rtol=1e-6)


def test_sgd_keeps_nine_tenths_of_its_momentum():
    gradient = jnp.array([1.0])
    optimizer, rate = optimizer_of(name="sgd", clip_norm=0.0)
    _, state = optimizer.update(gradient, optimizer.init(gradient), gradient)
    update, _ = optimizer.update(gradient, state, gradient)
    np.testing.assert_allclose(update, -rate(1) * (1.0 + 0.9), rtol=1e-6)


@pytest.mark.parametrize(
    ("variant", "count"), [("bert_base", 109_480_704), ("mistral_7b", 7_110_660_096)]
)
def test_the_large_encoders_have_the_sizes_of_their_namesakes(variant, count):
    config = large_encoders.get_config(variant)
    config.run.mesh.fsdp = 8
    params = training_of(config).abstract_state(1_000_000).params["towers"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


def test_the_large_decoder_with_adapters_trains_them_alone():
    config = large_encoders.get_config("mistral_7b_lora")
    config.run.mesh.fsdp = 8
    training = training_of(config)
    state = training.abstract_state(1_000_000)
    trained, frozen = split(state.params, training.frozen)
    hidden, keys, mlp = 4_096, 1_024, 14_336
    attention = 2 * (hidden + hidden) + 2 * (hidden + keys)
    adapters = 32 * 16 * (attention + 3 * (hidden + mlp))
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(part)) for part in (trained, frozen)]
    assert sizes == [adapters + 1, 7_110_660_096]  # and the temperature
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim)
    assert moments == 2 * adapters
    narrow = sum(leaf.size for leaf in jax.tree.leaves(frozen) if leaf.dtype == jnp.bfloat16)
    assert narrow == sizes[1] - (2 * 32 + 1) * hidden  # all except the norms


def test_a_pretrained_mistral_has_the_same_size(tmp_path):
    config = large_encoders.get_config("pretrained_7b")
    config.run.mesh.fsdp = 8
    config.model.pretrained = str(write_copy_of_decoder(tmp_path, {"model_type": "mistral"}))
    params = training_of(config).abstract_state(1_000_000).params["towers"]
    leaves = jax.tree.leaves(params)
    assert sum(leaf.size for leaf in leaves) == 7_110_660_096
    here = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    norms = (2 * 32 + 1) * 4_096  # which are too small to shard
    assert here == (7_110_660_096 - norms) / 8 + norms


@pytest.mark.parametrize(
    ("variant", "vision", "count"),
    [("clip", {"patch_size": 16}, 149_620_736), ("siglip", {}, 203_155_968)],
)
def test_the_image_text_encoders_have_the_sizes_of_their_namesakes(
    tmp_path, variant, vision, count
):
    config = large_encoders.get_config(variant)
    towers = {"model_type": variant, "text_config": {}, "vision_config": vision}
    config.model.pretrained = str(write_copy_of_towers(tmp_path, towers))
    params = training_of(config).abstract_state(1_000_000).params["towers"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
    assert set(params) == {"query", "key"}


def test_options_that_an_encoder_refuses_are_named_with_their_section():
    config = {"model": {"name": "transformer", "options": {"num_heads": 7}}}
    reason = r"^model\.options: hidden_dim=384 does not divide over 7 heads"
    with pytest.raises(ValueError, match=reason):
        training.build_towers(read_settings(config))


def test_another_seed_has_other_initial_parameters():
    first, again, other = (program_of(seed=seed).init() for seed in (1, 1, 2))
    assert np.array_equal(table(first), table(again))
    assert not np.array_equal(table(first), table(other))
    assert not jnp.array_equal(jax.random.key_data(first.key), jax.random.key_data(other.key))


@pytest.mark.parametrize(("masks", "loss"), [(("row",), 0), (("group",), 0), ((), np.log(8))])
def test_rows_with_equal_masked_columns_are_not_negatives(masks, loss):
    program = program_of(**{"loss.masks": masks})
    tokens, same = {"tokens": np.ones((8, 1), np.int32)}, np.zeros(8, np.int32)
    batch = {"query": tokens, "key": tokens, "row": same, "group": same}
    _, metrics = program.train_step(program.init(), put_batch(batch, program.mesh))
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)  # scores of 20 in float32


def test_a_bias_is_a_parameter_if_the_config_has_one():
    program = program_of(**{"loss.name": "sigmoid", "loss.bias": -4.0, "optimizer.name": "sgd"})
    assert float(program.init().params["bias"]) == -4.0
    tokens, numbers = {"tokens": np.arange(1, 9, dtype=np.int32)[:, None]}, np.arange(8)
    batch = {"query": tokens, "key": tokens, "row": numbers.astype(np.int32)}
    batch["group"] = batch["row"]
    state = program.init()
    for _ in range(2):  # the first rate is 0
        state, _ = program.train_step(state, put_batch(batch, program.mesh))
    assert float(state.params["bias"]) != -4.0
    with pytest.raises(ValueError, match="'infonce' has none"):
        program_of(**{"loss.bias": -4.0})


def test_estimates_are_part_of_the_state_s_memory():
    program = program_of(
        **{"loss.name": "running_estimate", "loss.options": {"temperature_rate": 0.1}}
    )
    state = program.init(1_500)
    assert {name: table.shape for name, table in state.memory["rows"].items()} == {
        "estimates": (2_048, 2),
        "log_temperatures": (2_048, 2),
    }
    assert jax.tree.map(lambda leaf: leaf.shape, program.abstract_state(1_500)) == jax.tree.map(
        lambda leaf: leaf.shape, state
    )
    with pytest.raises(ValueError, match="per row; give num_rows"):
        program.init()


@pytest.mark.parametrize(
    ("kind", "slots"), [("queue", 12), pytest.param("instance", 40, marks=pytest.mark.slow)]
)
def test_a_bank_of_earlier_keys_raises_the_loss_as_it_fills(kind, slots):
    still = {"optimizer.learning_rate": 1e-9, "augmentation.options.rate": 0.0}
    bank = {"negatives.bank.kind": kind, "negatives.bank.slots": 12}
    changes = {**bank, "negatives.tiers.full_bank": True, **still}
    with_bank, without = program_of(**changes), program_of(**still)
    states = [program.init(40) for program in (with_bank, without)]
    losses = []
    for start in (0, 8, 16, 24, 0):
        rows = np.arange(start, start + 8, dtype=np.int32)
        tokens = {"tokens": (rows % 9 + 1)[:, None].astype(np.int32)}
        batch = {"query": tokens, "key": tokens, "row": rows, "group": rows}
        pair = []
        for number, program in enumerate((with_bank, without)):
            states[number], metrics = program.train_step(
                states[number], put_batch(batch, program.mesh)
            )
            pair.append(float(metrics.loss))
        losses.append(pair)
    bank = states[0].memory["bank"]["key"]
    assert int((bank.written >= 0).sum()) == min(slots, 32 if kind == "instance" else 12)
    gains = np.subtract(*np.transpose(losses))
    assert gains[0] == pytest.approx(0, abs=1e-6)  # nothing is written yet
    assert (gains[1:] > 0.01).all()
    if kind == "instance":  # rows 0 to 7 again, which are not their own negatives
        assert gains[4] == pytest.approx(gains[3], rel=0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"negatives.bank.kind": "stack"}, "'stack' is unknown; use one of queue, instance"),
        (
            {**QUEUE, "loss.name": "distillation", "data.negatives": "some.npz"},
            "'distillation' takes no negatives of a bank and no synthetic ones",
        ),
        (
            {**QUEUE, "loss.masks": ()},
            "put 'row' or 'text' among loss.masks",
        ),
        (
            {**QUEUE, "negatives.bank.slots": 0},
            "negatives.bank.slots=0; set it to at least 1",
        ),
        (
            {"loss.name": "supervised", "data.group_field": None},
            "'supervised' needs the rows' groups; set data.group_field",
        ),
        (
            {"loss.name": "supervised", "loss.masks": ("group",)},
            "names 'group', but 'supervised' does not mask by groups",
        ),
        (
            {"loss.name": "supervised", "loss.masks": ("text",)},
            "compares classes, so rows with equal texts",
        ),
        ({"loss.name": "supervised", "loss.margin": 0.1}, r"loss\.margin=0\.1, but 'supervised'"),
        (
            {"loss.options": {"negatives": 1}},
            "loss.options.negatives is unknown to 'infonce'",
        ),
        ({"loss.options": {"exchange": "ring"}}, "loss.options.exchange is unknown"),
        (
            {"loss.name": "sigmoid", "loss.bias": -1.0, "loss.options": {"bias": -1.0}},
            "both given; leave one out",
        ),
        (
            {"negatives.tiers.uniform": 5},
            r"draws from a bank; set negatives\.bank\.kind to one of queue, instance",
        ),
        (
            {**QUEUE, "negatives.tiers.uniform": 5},
            r"tiers\.full_bank uses every slot of the bank already",
        ),
        ({"negatives.bank.kind": "queue"}, "nothing reads the bank; set negatives.tiers.full_bank"),
        (
            {
                "negatives.bank.kind": "queue",
                "negatives.tiers.mixed": 2,
                "negatives.tiers.of_batch": True,
            },
            "nothing reads the bank; set negatives.tiers.full_bank",
        ),
        ({**QUEUE, "negatives.bank.dtype": "bf16"}, "dtype='bf16'; use float32, bfloat16"),
        ({"optimizer.options.mu_dtype": "half2"}, "options.mu_dtype='half2'; use float32"),
        # Momentum of integers would be rounded to 0.
        ({"optimizer.options.mu_dtype": "int8"}, "options.mu_dtype='int8'; use float32"),
        ({"negatives.momentum_encoder.initial": 0.9}, "nothing reads that encoder"),
        ({"negatives.tiers.mixed": -1}, r"tiers\.mixed=-1; set it to at least 0"),
        (
            {"negatives.tiers.mixed": 2, "negatives.tiers.hardest": 0},
            r"tiers\.hardest=0; set it to at least 1",
        ),
        (
            {
                "negatives.tiers.mixed": 2,
                "loss.name": "distillation",
                "data.negatives": "some.npz",
            },
            "'distillation' takes no negatives of a bank and no synthetic ones",
        ),
        (
            {
                "negatives.bank.kind": "queue",
                "negatives.tiers.stratified": 4,
                "data.group_field": None,
            },
            r"stratified goes by group; set data\.group_field",
        ),
        ({"negatives.guide": "teacher"}, "'teacher' is unknown; use one of momentum, data"),
        ({"negatives.guide": "momentum"}, r"needs a margin; set loss\.margin"),
        (
            {"negatives.guide": "momentum", "loss.margin": 0.0},
            r"needs negatives\.momentum_encoder\.initial",
        ),
        ({"negatives.guide": "data", "loss.margin": 0.0}, "need each other"),
        (
            {"negatives.momentum_encoder.initial": 1.5},
            r"initial=1\.5; set it to at least 0, at most 1",
        ),
        (
            {"negatives.mined.refresh_every": 5},
            r"set negatives\.bank\.kind='instance'",
        ),
        (
            {"negatives.mined.refresh_every": 20, "negatives.bank.kind": "instance"},
            "refresh_every=20 never comes in 20 steps",
        ),
        (
            {"negatives.mined.refresh_every": 0, "negatives.bank.kind": "instance"},
            r"refresh_every=0; set it to at least 1",
        ),
        (
            {
                "negatives.mined.refresh_every": 5,
                "negatives.bank.kind": "instance",
                "data.negatives": "some.npz",
            },
            "both give each row its negatives",
        ),
        (
            {
                "negatives.mined.refresh_every": 5,
                "negatives.bank.kind": "instance",
                "negatives.mined.per_query": 0,
            },
            r"negatives\.mined\.per_query=0; set it to at least 1",
        ),
        (
            {"loss.name": "distillation", "loss.margin": 0.1, "loss.masks": ()},
            r"loss\.margin=0\.1, but 'distillation' takes none",
        ),
        (
            {**QUEUE, "negatives.bank.momentum": 1.0},
            r"bank\.momentum=1\.0; set it to at least 0, below 1",
        ),
    ],
)
def test_a_loss_that_does_not_fit_its_config_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        program_of(**changes)


@pytest.mark.parametrize(
    ("assignment", "others", "message"),
    [
        (
            {"name": "random"},
            {},
            "'random' is unknown; use one of uniform, one_per_query, sourced, gcbs",
        ),
        ({"name": "sourced"}, {"data.group_field": None}, r"goes by group; set data\.group_field"),
        ({"name": "sourced", "sourced.by": "text"}, {}, "by='text' is unknown; use one of group"),
        ({"name": "sourced", "sourced.by": "data_set"}, {}, r"by data_set; set data\.concatenated"),
        ({"name": "sourced", "sourced.by": "topic"}, {}, r"by topic; set data\.topics"),
        ({}, {"data.topics": "topics.npz"}, r"data\.topics is set, but no setting reads it"),
        ({"gcbs.refresh_epochs": 0.0}, {}, r"refresh_epochs=0\.0; set it above 0"),
        ({"gcbs.block_size": 3}, {}, "block_size=3 does not divide global_batch_size=8 into"),
        ({"gcbs.block_size": 16}, {}, "block_size=16 does not divide global_batch_size=8 "),
        ({"gcbs.block_size": 0}, {}, "block_size=0; set it to at least 2"),
        ({"gcbs.block_size": 1}, {}, "block_size=1; set it to at least 2"),
        ({"gcbs.refresh_every": 20}, {}, "refresh_every=20 never comes in 20 steps"),
        ({"gcbs.refresh_every": 0}, {}, r"refresh_every=0; set it to at least 1"),
        ({"gcbs.embeddings": "model"}, {}, "'model' is unknown; use one of encode, bank"),
        ({"gcbs.embeddings": "bank"}, {}, r"set negatives\.bank\.kind='instance'"),
        ({"gcbs.embeddings": "bank"}, QUEUE, r"set negatives\.bank\.kind='instance'"),
        (
            {"gcbs.keep_apart": ("text", "row")},
            {},
            "keep_apart names 'row'; use some of text, group",
        ),
        (
            {"gcbs.keep_apart": ("group",)},
            {"data.group_field": None},
            r"keep_apart names 'group', but data\.group_field is None",
        ),
        ({"gcbs.method": "metis"}, {}, "'metis' is unknown; use one of bisection, rcm_device, rcm"),
        ({"gcbs.graph": "whole"}, {}, "'whole' is unknown; use one of exact, clustered"),
        ({"gcbs.neighbours": 0}, {}, r"gcbs\.neighbours=0; set it to at least 1"),
        ({"gcbs.swaps": -1}, {}, r"assignment\.gcbs\.swaps=-1; set it to at least 0"),
        ({"gcbs.preset": "heavy"}, {}, r"gcbs\.preset='heavy' is unknown; use one of full, light"),
        ({"gcbs.random_initial": 1.5}, {}, r"random_initial=1\.5; set it to at least 0, at most 1"),
        ({"gcbs.method": "rmc", "gcbs.refresh_every": 20}, {}, "'rmc' is unknown"),
        ({"gcbs.random_final": -0.5}, {}, r"random_final=-0\.5; set it to at least 0, at most 1"),
    ],
)
def test_an_invalid_assignment_is_named(assignment, others, message):
    program_of(**assignment_of())
    with pytest.raises(ValueError, match=message):
        program_of(**assignment_of(**assignment), **others)


@pytest.mark.parametrize("name", ["uniform", "gcbs"])
def test_settings_of_another_assignment_have_no_effect(name):
    config = get_config("smoke")
    config.assignment.name = name
    read_settings(config, changed=["steps", "assignment.name"])
    unread = ["assignment.sourced.mix"] + ["assignment.gcbs.method"] * (name == "uniform")
    for setting in unread:
        with pytest.raises(ValueError, match=rf"{setting} has no effect here: assignment\.name="):
            read_settings(config, changed=["steps", setting])


def test_settings_of_an_assignment_arrive_in_its_rule():
    settings = {"method": "rcm_device", "graph": "clustered", "similarity_cap": 0.9}
    settings["neighbours"] = 7
    effort = {"swaps": 5, "refinements": 2}
    config = get_config("smoke")
    assert gcbs_rule(read_settings(config)) is None
    named = {f"gcbs.{name}": value for name, value in (settings | effort).items()}
    config.update_from_flattened_dict(assignment_of(**named, **{"gcbs.random_initial": 0.5}))
    rule = gcbs_rule(read_settings(config))
    assert settings.items() <= rule.settings._asdict().items()
    assert effort.items() <= rule.settings.effort._asdict().items()
    assert rule[1:3] == (4, 5)
    assert [rule.random_fraction(step) for step in (0, 10, 20)] == [0.5, 0.25, 0.0]
    assert (rule.keep_apart, rule.from_bank, rule.picture) == (("text",), False, False)


def test_unset_fields_of_an_assignment_come_from_the_preset():
    config = get_config("smoke")
    config.assignment.name = "gcbs"
    light = PRESETS["light"]
    assert gcbs_rule(read_settings(config)).settings == light
    config.assignment.gcbs.update({"swaps": 0, "similarity_cap": 0.9})
    effort = light.effort._replace(swaps=0)
    rule = gcbs_rule(read_settings(config))
    assert rule.settings == light._replace(similarity_cap=0.9, effort=effort)
    full = {"preset": "full", "swaps": None, "similarity_cap": None}
    config.assignment.gcbs.update(full)
    assert gcbs_rule(read_settings(config)).settings == Gcbs()


def assignment_of(**changes):
    return {f"assignment.{name}": value for name, value in (GCBS | changes).items()}


def test_the_momentum_encoder_slows_down_along_a_cosine():
    config = get_config("smoke")
    config.update_from_flattened_dict(QUEUE)
    config.negatives.momentum_encoder.update({"initial": 0.9, "final": 1.0})
    config.steps = 101
    momentum = build_momentum(read_settings(config))
    found = [float(momentum(jnp.int32(step))) for step in (0, 50, 100, 200)]
    np.testing.assert_allclose(found, [0.9, 0.95, 1.0, 1.0], atol=1e-6)
    assert found[0] < float(momentum(jnp.int32(10))) < 0.91  # slowly at first


def test_a_momentum_encoder_starts_as_the_towers_and_follows_them():
    changes = {**QUEUE, "negatives.momentum_encoder.initial": 0.75, "steps": 1}
    program = program_of(**changes, **{"negatives.momentum_encoder.final": 0.75})
    state = program.init()
    before = jax.device_get(state.params["towers"])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.memory["momentum"]), before)
    tokens, numbers = {"tokens": np.arange(1, 9, dtype=np.int32)[:, None]}, np.arange(8)
    labels = dict.fromkeys(("row", "text", "group"), numbers.astype(np.int32))
    batch = {"query": tokens, "key": tokens, **labels}
    state, _ = program.train_step(state, put_batch(batch, program.mesh))
    wanted = jax.tree.map(
        lambda old, new: 0.75 * old + 0.25 * np.asarray(new), before, state.params["towers"]
    )
    found = jax.device_get(state.memory["momentum"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, wanted)
    moved = [
        np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (found, before)), strict=True)
    ]
    assert max(moved) > 1e-4


@pytest.mark.parametrize(
    ("bank", "uniform", "empty"),
    [
        ({"negatives.bank.kind": "instance"}, 300, ["nearest"]),
        ({"negatives.bank.kind": "instance"}, 299, []),
        ({"negatives.bank.kind": "queue", "negatives.bank.slots": 16}, 16, ["nearest"]),
    ],
)
def test_a_tier_without_candidates_is_named(bank, uniform, empty):
    config = get_config("smoke")
    tiers = {"negatives.tiers.uniform": uniform, "negatives.tiers.nearest": 4}
    config.update_from_flattened_dict(bank | tiers)
    assert tiers_left_empty(read_settings(config), 300) == empty


def test_a_guide_in_the_data_masks_the_batch_and_the_bank(tmp_path):
    np.savez(tmp_path / "guides.npz", query=np.eye(8, 3), key=np.eye(8, 3))
    changes = {**QUEUE, "negatives.guide": "data", "loss.margin": 0.5}
    program = program_of(**changes, **{"data.guides": str(tmp_path / "guides.npz")})
    tokens, numbers = {"tokens": np.arange(1, 9, dtype=np.int32)[:, None]}, np.arange(8)
    # For the guide model, rows 0 to 3 are equal, and so are rows 4 to 7.
    seen = np.repeat(np.eye(2, 3, dtype=np.float32), 4, axis=0)
    state = program.init()
    for first in (0, 8, 16):
        labels = dict.fromkeys(("row", "text", "group"), (first + numbers).astype(np.int32))
        batch = {"query": tokens, "key": tokens, "guides": {"query": seen, "key": seen}, **labels}
        placed = put_batch(batch, program.mesh)
        measured = program.measure(state, placed)
        state, _ = program.train_step(state, placed)
    assert float(measured["negatives/batch/counted"]) == 4
    assert float(measured["negatives/batch/masked"]) == 3
    assert float(measured["negatives/bank/counted"]) == 8  # of the 16 in two batches
    assert float(measured["negatives/bank/masked"]) == 8


@pytest.mark.parametrize("file", [None, "some.npz"])
def test_distillation_without_a_teacher_is_an_error(file):
    teacherless = {"loss.name": "distillation", "loss.masks": ()}
    program = program_of(**teacherless, **{"data.negatives": file})
    tokens, numbers = {"tokens": np.ones((8, 1), np.int32)}, np.arange(8, dtype=np.int32)
    batch = {"query": tokens, "key": tokens, "row": numbers, "group": numbers}
    with pytest.raises(ValueError, match=r"needs batch\['negatives'\]"):
        program.train_step(program.init(), put_batch(batch, program.mesh))


def negatives_of(tokens):
    """Two for each row."""
    inputs = {name: np.stack([leaf, leaf[::-1]], 1) for name, leaf in tokens.items()}
    return {"inputs": inputs, "valid": np.ones((8, 2), bool)}


def optimizer_of(params=None, *, steps: int = 1000, **changes):
    config = get_config("smoke").optimizer
    config.update({"learning_rate": RATE, "warmup_steps": 0} | changes)
    settings = read_settings({"optimizer": config.to_dict(), "steps": steps})
    return build_optimizer(settings, {"one": jnp.ones(1)} if params is None else params)


def program_of(**changes):
    config = get_config("smoke")
    small = {"model.dim": 4, "data.vocabulary_size": 10, "global_batch_size": 8}
    config.update_from_flattened_dict(small | changes)
    return training_of(config)


def table(state) -> np.ndarray:
    return np.asarray(state.params["towers"]["both"]["table"])


def test_a_gradient_cache_goes_by_rows_or_by_tokens():
    config = get_config("smoke")
    assert _chunk_sizes(read_settings(config)) is None
    config.grad_cache.chunk_size = 4
    assert _chunk_sizes(read_settings(config)) == {"query": 4, "key": 4}
    config.grad_cache.chunk_tokens = 256
    with pytest.raises(ValueError, match=r"chunk_size=4 and grad_cache\.chunk_tokens=256"):
        training_of(config)
    config.grad_cache.chunk_size = None
    assert _chunk_sizes(read_settings(config)) == {"query": 256 // 32, "key": 256 // 128}
    config.grad_cache.chunk_tokens = 0
    with pytest.raises(ValueError, match=r"grad_cache\.chunk_tokens=0; set it to at least 1"):
        training_of(config)


@pytest.mark.slow
def test_a_loss_over_nested_lengths_is_their_sum():
    tokens, rows = {"tokens": np.arange(1, 9, dtype=np.int32)[:, None]}, np.arange(8)
    batch = {"query": tokens, "key": tokens, "row": rows.astype(np.int32)}
    batch["group"] = batch["row"]
    losses = []
    for dims in ((), (4,), (2,), (4, 2)):
        program = program_of(**{"loss.matryoshka_dims": dims, "augmentation.options.rate": 0.0})
        _, metrics = program.train_step(program.init(), put_batch(batch, program.mesh))
        losses.append(float(metrics.loss))
    whole, same, half, both = losses
    np.testing.assert_allclose([same, both], [whole, whole + half], rtol=1e-5)
    assert half != pytest.approx(whole, rel=1e-2)


# `losses/test_battery.py` has the other losses in a ring, some of them as slow tests.
@pytest.mark.parametrize(
    ("name", "exchange"),
    [
        ("infonce", "gather"),
        *(
            pytest.param(name, "ring", marks=() if name in DISTINCT else pytest.mark.slow)
            for name in LOSSES
        ),
    ],
)
def test_every_loss_makes_a_step_by_its_name(name, exchange):
    how = {"loss.exchange": exchange, "loss.implementation": "tiled", "grad_cache.chunk_size": 1}
    changes = {"loss.name": name, **how}
    scored = "teacher_scores" in LOSSES[name].columns
    if scored:
        changes["data.negatives"] = "some.npz"
    if name == "cosent":
        changes["data.score_field"] = "score"
    if name == "embedding_distillation":
        changes["data.guides"] = "some.npz"
    program = program_of(**changes)
    tokens, numbers = {"tokens": np.arange(1, 9, dtype=np.int32)[:, None]}, np.arange(8)
    batch = {"query": tokens, "key": tokens, "row": numbers.astype(np.int32)}
    batch["group"] = batch["row"]
    batch["score"] = numbers.astype(np.float32)
    if name == "embedding_distillation":
        vectors = np.random.default_rng(0).normal(size=(8, program.settings.model.dim))
        batch["guides"] = dict.fromkeys(("query", "key"), vectors.astype(np.float32))
    if scored:
        batch |= {"teacher_scores": np.ones((8, 3), np.float32), "negatives": negatives_of(tokens)}
    state, metrics = program.train_step(program.init(8), put_batch(batch, program.mesh))
    assert int(state.step) == 1
    assert np.isfinite(metrics.loss)
    assert metrics.gradient_norm > 0


@pytest.mark.parametrize(
    ("changes", "by_group"),
    [({}, False), ({"loss.masks": ("row", "group")}, True), ({"loss.name": "supervised"}, True)],
)
def test_rows_of_one_group_are_not_mined_if_groups_are_masked(changes, by_group, monkeypatch):
    asked = []
    monkeypatch.setattr(training, "make_mined_refresh", lambda *_, **how: asked.append(how))
    program_of(
        **{"negatives.bank.kind": "instance", "negatives.mined.refresh_every": 2},
        **changes,
    )
    assert asked == [{"by_group": by_group}]
