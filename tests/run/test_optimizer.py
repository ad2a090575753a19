"""The optimizer of a run: groups of parameters by their paths."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcl.models import make_towers
from jaxcl.models.pretrained.encoder import PretrainedEncoder
from jaxcl.models.trainable import parameter_paths
from jaxcl.run.optimizer import build_optimizer, layer_factors
from jaxcl.run.training import abstract_parameters, build_towers
from jaxcl.settings.read import read_settings
from tests.helpers import relative_errors, some_slow
from tests.models.pretrained.reference_models import describe, read_config
from tests.models.pretrained.tiny import write_tiny_bert

RATE = 0.5
PARAMS = {
    "towers": {
        "both": {
            "token_table": jnp.full((5, 4), 3.0),
            "blocks": {
                "widen": {"kernel": jnp.full((2, 4, 4), 2.0), "bias": jnp.ones((2, 4))},
                "norm": {"scale": jnp.ones((2, 4))},
            },
            "projection": {"kernel": jnp.full((4, 4), 2.0), "bias": jnp.ones(4)},
        }
    },
    "log_temperature": jnp.float32(-3.0),
}
TABLE, PROJECTION = "towers/both/token_table", "towers/both/projection/kernel"
STACKED = "towers/both/blocks/widen/kernel"


def settings_of(model=None, **optimizer):
    given = {"name": "sgd", "options": {"decay": 0.0}, "learning_rate": RATE, "warmup_steps": 0}
    given |= {"schedule": "warmup_constant", "clip_norm": 0.0, **optimizer}
    data = {"max_tokens": {"query": 16, "key": 16}}
    return read_settings({"model": model or {}, "data": data, "optimizer": given})


def updates_of(gradients, **optimizer):
    """Path -> the update of that parameter."""
    made, _ = build_optimizer(settings_of(**optimizer), PARAMS)
    updates, _ = made.update(gradients, made.init(PARAMS), PARAMS)
    return by_path(updates)


def by_path(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


ZEROS, ONES = (jax.tree.map(like, PARAMS) for like in (jnp.zeros_like, jnp.ones_like))


@pytest.mark.parametrize("no_decay", [(), ("*table",)])
def test_only_matrices_decay_whether_layers_are_stacked_or_not(no_decay):
    updates = updates_of(ZEROS, weight_decay=0.1, no_decay=no_decay)
    decayed = {TABLE, PROJECTION, STACKED} - ({TABLE} if no_decay else set())
    assert {path for path, update in updates.items() if update.any()} == decayed
    np.testing.assert_allclose(updates[STACKED], -RATE * 0.1 * 2.0, rtol=1e-6)


def test_a_factor_multiplies_the_rate_and_the_decay_of_the_first_pattern_that_matches():
    rates = ((TABLE, 0.1), ("*table", 0.9), ("*/projection/*", 2.0))
    updates = updates_of(ONES, rates=rates, weight_decay=0.25)
    np.testing.assert_allclose(updates[TABLE], -RATE * 0.1 * (1 + 0.25 * 3.0), rtol=1e-6)
    np.testing.assert_allclose(updates[PROJECTION], -RATE * 2.0 * (1 + 0.25 * 2.0), rtol=1e-6)
    np.testing.assert_allclose(updates["log_temperature"], -RATE, rtol=1e-6)


def test_layer_decay_and_factors_multiply():
    updates = updates_of(ONES, layer_decay=0.5, rates=(("*/widen/*", 0.1),))
    np.testing.assert_allclose(updates[STACKED][:, 0, 0], [-RATE * 0.05, -RATE * 0.1], rtol=1e-6)
    np.testing.assert_allclose(updates[TABLE], -RATE * 0.5**2, rtol=1e-6)
    np.testing.assert_allclose(updates[PROJECTION], -RATE, rtol=1e-6)


def test_each_group_is_clipped_by_its_own_norm():
    groups = (("*/blocks/*", 2.0), ("*", 0.0))
    updates = updates_of(ONES, clip_groups=(("*/blocks/*", 2.0),), clip_norm=3.0)
    of_blocks = 2 * 4 * 4 + 2 * 4 + 2 * 4
    others = 5 * 4 + 4 * 4 + 4 + 1
    np.testing.assert_allclose(updates[STACKED], -RATE * 2.0 / np.sqrt(of_blocks), rtol=1e-6)
    np.testing.assert_allclose(updates[TABLE], -RATE * 3.0 / np.sqrt(others), rtol=1e-6)
    # A norm of 0 disables clipping, and the first pattern that matches applies.
    updates = updates_of(ONES, clip_groups=groups, clip_norm=3.0)
    np.testing.assert_allclose(updates[STACKED], -RATE * 2.0 / np.sqrt(of_blocks), rtol=1e-6)
    np.testing.assert_allclose(updates[TABLE], -RATE, rtol=1e-6)


def test_a_group_within_its_norm_keeps_its_gradient():
    updates = updates_of(ONES, clip_groups=(("*/blocks/*", 100.0),))
    np.testing.assert_allclose(updates[STACKED], -RATE, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"no_decay": ("*/tabel",), "weight_decay": 0.1}, r"optimizer\.no_decay has '\*/tabel'"),
        ({"rates": (("*/tabel", 0.5),)}, r"rates has .*, which matches no trained parameter"),
        ({"clip_groups": (("*/tabel", 0.5),)}, r"optimizer\.clip_groups has"),
        ({"rates": (("*table", 0.5),), "freeze": ("*table",)}, "matches no trained parameter"),
    ],
)
def test_a_pattern_without_a_trained_parameter_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(settings_of(**changes), PARAMS)


@pytest.mark.parametrize("setting", ["rates", "clip_groups"])
def test_a_pattern_after_one_that_matches_more_is_an_error(setting):
    message = rf"{setting} has '{TABLE}' after '\*', .* and the first pattern applies"
    with pytest.raises(ValueError, match=message):
        build_optimizer(settings_of(**{setting: (("*", 0.5), (TABLE, 0.1))}), PARAMS)
    build_optimizer(settings_of(**{setting: ((TABLE, 0.1), ("*", 0.5))}), PARAMS)


def test_the_table_of_an_nnx_embed_is_an_embedding():
    both = {"embed": {"embedding": jnp.ones((5, 4))}, "blocks": {"0": {"kernel": jnp.ones((4, 4))}}}
    params = {"towers": {"both": both}}
    factors = layer_factors(params, 0.5)
    assert factors == {"towers/both/embed/embedding": 0.5, "towers/both/blocks/0/kernel": 1.0}
    # Muon makes the update of a matrix nearly orthogonal; Adam's first update is at least the rate.
    made, _ = build_optimizer(settings_of(name="muon", options={}), params)
    updates, _ = made.update(jax.tree.map(jnp.ones_like, params), made.init(params), params)
    found = by_path(updates)
    assert np.abs(found["towers/both/embed/embedding"]).min() > RATE
    assert np.abs(found["towers/both/blocks/0/kernel"]).max() < 0.5 * RATE


def test_layer_decay_of_an_encoder_without_layers_is_an_error():
    settings = settings_of(model={"name": "static"}, layer_decay=0.9)
    with pytest.raises(ValueError, match=r"layer_decay=0\.9, but the encoder has no layers"):
        build_optimizer(settings, abstract_parameters(settings, build_towers(settings)))


SMALL = {"hidden_dim": 8, "num_layers": 3, "num_heads": 2, "mlp_dim": 8}
OWN = {"name": "transformer", "options": SMALL}
FAMILIES = {
    "transformer": OWN,
    "post-LN": {"name": "transformer", "options": SMALL | {"norm_position": "post"}},
    "decoder": {"name": "decoder", "options": SMALL | {"num_key_heads": 1}},
    "two towers": OWN | {"shared": False},
    "bert": None,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_every_encoder_decay_from_the_top(family, tmp_path):
    model = FAMILIES[family] or {"pretrained": str(write_tiny_bert(tmp_path))}
    settings = settings_of(model=model, layer_decay=0.5)
    params = abstract_parameters(settings, build_towers(settings))
    made, _ = build_optimizer(settings, params)
    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), params)
    updates = by_path(made.update(ones, made.init(ones), ones)[0])
    layers = settings.model.options.get("num_layers") or max(
        int(path.split("/blocks/")[1].split("/")[0]) + 1 for path in updates if "/blocks/" in path
    )
    assert layers > (family != "bert")
    wanted = dict.fromkeys(updates, 1.0)
    for path in updates:
        for layer in range(layers):
            if f"/blocks/{layer}/" in path:
                wanted[path] = 0.5 ** (layers - 1 - layer)
        if path.endswith("_table"):
            wanted[path] = 0.5**layers
        if path.endswith("/norm/scale") or path.endswith("/norm/bias"):
            below = family not in ("transformer", "decoder", "two towers")
            wanted[path] = 0.5**layers if below else 1.0
        if "/blocks/" in path and family == "decoder":
            by_layer = np.array([0.25, 0.5, 1.0])
            wanted[path] = by_layer.reshape(-1, *[1] * (updates[path].ndim - 1))
    assert len({float(np.max(factor)) for factor in wanted.values()}) > 1
    for path, update in updates.items():
        factor = np.broadcast_to(wanted[path], update.shape)
        np.testing.assert_allclose(update, -RATE * factor, rtol=1e-6, err_msg=path)


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert", "mpnet", "roberta"])
def test_layers_of_every_pretrained_family_decay_from_the_top(family):
    model = describe(read_config(family))
    towers = make_towers(lambda rngs: PretrainedEncoder(model, rngs=rngs))
    params = {"towers": jax.eval_shape(towers.init, jax.random.key(0))}
    factors = layer_factors(params, 0.5, embedding_norms=("towers/both/encoder/norm",))
    layers = 1 + max(
        int(path.split("/blocks/")[1].split("/")[0]) for path in factors if "/blocks/" in path
    )
    assert layers > 1
    for path, factor in factors.items():
        inside = path.split("/blocks/")
        wanted = 0.5 ** (layers - 1 - int(inside[1].split("/")[0])) if inside[1:] else 0.5**layers
        assert factor == wanted, path
    above = set(parameter_paths(params)) - set(factors)
    assert all("final_norm" in path for path in above), above


def test_stacked_layers_have_the_factors_of_separate_ones():
    factors = {}
    for scan in (False, True):
        settings = settings_of(model=OWN | {"options": SMALL | {"scan_layers": scan}})
        params = abstract_parameters(settings, build_towers(settings))
        factors[scan] = layer_factors(params, 0.7)
        assert set(factors[scan]) <= set(parameter_paths(params))
    for path, factor in factors[True].items():
        if "/blocks/" in path:
            separate = [factors[False][path.replace("/blocks/", f"/blocks/{n}/")] for n in range(3)]
            np.testing.assert_allclose(np.ravel(factor), separate, rtol=1e-12)
        else:
            assert factor == factors[False][path]
    np.testing.assert_allclose(factors[True]["towers/both/token_table"], 0.7**3)


def test_without_these_settings_the_state_has_four_parts():
    """As before them, so that a run of an earlier version resumes."""
    made, _ = build_optimizer(settings_of(), PARAMS)
    assert len(made.init(PARAMS)) == 4
    assert isinstance(made.init(PARAMS)[0], optax.EmptyState)


@pytest.mark.parametrize("name", some_slow(["adam", "muon", "sgd"], ("adam",)))
def test_accumulated_gradients_are_the_mean_of_their_batches(name, x64):
    """Three updates of four batches each, and three of one batch with the mean gradient."""
    every = 4
    how = {"name": name, "options": {}, "weight_decay": 0.1, "clip_norm": 1.0, "layer_decay": 0.5}
    accumulating, _ = build_optimizer(settings_of(**how, accumulate_steps=every), PARAMS)
    single, _ = build_optimizer(settings_of(**how), PARAMS)
    ours = theirs = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), PARAMS)
    state, single_state = accumulating.init(ours), single.init(theirs)
    for update in range(3):
        keys = jax.random.split(jax.random.key(update), every)
        batches = [
            jax.tree.map(lambda leaf, key=key: jax.random.normal(key, leaf.shape), ours)
            for key in keys
        ]
        before = ours
        for number, gradients in enumerate(batches, start=1):
            updates, state = accumulating.update(gradients, state, ours)
            ours = optax.apply_updates(ours, updates)
            if number < every:
                jax.tree.map(np.testing.assert_array_equal, ours, before)
        mean = jax.tree.map(lambda *leaves: sum(leaves) / every, *batches)
        updates, single_state = single.update(mean, single_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        # The sums of optax are float32.
        assert max(relative_errors(ours, theirs).values()) < 1e-6


def test_an_update_of_several_steps_has_the_rate_of_the_first():
    settings = settings_of(accumulate_steps=4, schedule="linear")
    made, rate = build_optimizer(settings, PARAMS)
    state, found = made.init(PARAMS), []
    for _ in range(12):
        updates, state = made.update(ONES, state, PARAMS)
        found.append(-float(updates["log_temperature"]))
    falling = [RATE * (1 - step / settings.steps) for step in (0, 4, 8)]
    np.testing.assert_allclose(found[3::4], falling, rtol=1e-6)
    assert not np.delete(found, [3, 7, 11]).any()
    np.testing.assert_allclose([rate(step) for step in range(12)], np.repeat(falling, 4), rtol=1e-6)
