"""The whole step over meshes: every parameter's gradient is that of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from jaxcl.losses import LOSSES, ExplicitNegatives, Loss, Masks, infonce_loss, sigmoid_pair_loss
from jaxcl.models import StaticEncoder, TransformerEncoder, make_towers
from jaxcl.models.augmentations import span_masking, token_dropout
from jaxcl.models.embedding_bag import embedding_bag
from jaxcl.ops.mesh import make_mesh, put_batch, replicated_sharding, table_sharding
from jaxcl.ops.row_tables import init_table
from jaxcl.step.batch_loss import make_loss
from jaxcl.step.train_step import (
    TemperatureBounds,
    init_state,
    make_train_step,
    state_sharding,
)
from jaxcl.typing import SIDES
from tests.helpers import relative_error, relative_errors, towers_of

MESHES = ({"data": 8}, {"replica": 2, "data": 4})
TEMPERATURE = TemperatureBounds(initial=0.05, minimum=0.01, maximum=1.0)
KEY = 1
MASKS = {"ids": "row", "groups": "group"}
INFONCE = LOSSES["infonce"]
TOWERS = {
    "static": make_towers(
        lambda rngs: StaticEncoder(50, dim=8, max_tokens=9, rngs=rngs),
        augment=dict.fromkeys(SIDES, token_dropout(rate=0.3)),
    ),
    "static, projected, two towers": make_towers(
        lambda rngs: StaticEncoder(50, dim=8, max_tokens=9, hidden_dim=12, rngs=rngs),
        shared=False,
        augment=dict.fromkeys(SIDES, span_masking(rate=0.3)),
    ),
    "transformer": make_towers(
        lambda rngs: TransformerEncoder(
            50,
            dim=8,
            max_tokens=9,
            hidden_dim=12,
            num_layers=2,
            num_heads=2,
            mlp_dim=16,
            compute_dtype="float64",
            rngs=rngs,
        ),
        shared=True,
    ),
}


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *((name, MESHES[0]) for name in TOWERS),
        ("static, projected, two towers", MESHES[1]),
        pytest.param("static", MESHES[1], marks=pytest.mark.slow),
        pytest.param("transformer", MESHES[1], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_any_mesh_gives_the_loss_and_every_gradient_of_one_device(name, shape, x64):
    wanted = loss_and_gradients(name, {"data": 1})
    found = loss_and_gradients(name, shape)
    errors = relative_errors(found, wanted)
    assert max(errors.values()) < 1e-10, errors


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("static", {"data": 1}),
        ("static", {"data": 8}),
        pytest.param("transformer", {"replica": 2, "data": 4}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_gradient_cache_has_every_gradient_of_the_whole_batch(name, shape, x64, monkeypatch):
    # The loop of a single CPU device, whatever this process has.
    bag = functools.partial(embedding_bag, implementation="loop")
    monkeypatch.setattr("jaxcl.models.static.embedding_bag", bag)
    wanted = loss_and_gradients(name, {"data": 1})
    ring = Loss(functools.partial(infonce_loss, exchange="ring", implementation="tiled"))
    found = loss_and_gradients(name, shape, ring, chunk_sizes={"query": 1, "key": 3})
    errors = relative_errors(found, wanted)
    assert max(errors.values()) < 1e-10, errors


def test_a_wrong_reduction_fails_that_test(x64):
    """Differentiating inside the mesh and averaging, a silent no-op there, is off by 8."""
    towers, mesh = TOWERS["static"], make_mesh({"data": 8})
    params, batch = double_params(towers), some_batch()
    rows, whole = PartitionSpec("data"), PartitionSpec()

    def local_gradients(params, batch):
        def loss(params):
            queries, keys = (
                towers.encode(params["towers"], side, batch[side]) for side in ("query", "key")
            )
            temperature = jnp.exp(params["log_temperature"])
            return infonce_loss(queries, keys, temperature=temperature, axis_name="data").mean()

        return jax.lax.pmean(jax.grad(loss)(params), "data")

    wrong = jax.jit(
        jax.shard_map(local_gradients, mesh=mesh, in_specs=(whole, rows), out_specs=whole)
    )(params, batch)
    whole_batch = make_loss(towers, INFONCE, mesh, masks={})
    right, _ = jax.jit(jax.grad(whole_batch, has_aux=True))(params, {}, batch, None)
    assert min(relative_errors(wrong, right).values()) > 1e-10
    ratio = wrong["log_temperature"] / right["log_temperature"]
    np.testing.assert_allclose(ratio, 8.0, rtol=1e-10)


def test_dropout_follows_the_row_and_not_its_place(x64):
    towers, mesh = TOWERS["static"], make_mesh({"data": 8})
    params, batch = double_params(towers), some_batch()
    loss = value_of(make_loss(towers, INFONCE, mesh, masks={}))
    order = np.random.default_rng(0).permutation(16)
    shuffled = jax.tree.map(lambda column: column[order], batch)
    key = jax.random.key(3)
    np.testing.assert_allclose(loss(params, batch, key), loss(params, shuffled, key), rtol=1e-12)
    assert relative_error(loss(params, batch, jax.random.key(4)), loss(params, batch, key)) > 1e-3
    assert relative_error(loss(params, batch, None), loss(params, batch, key)) > 1e-3


def test_the_two_sides_of_a_row_drop_differently():
    towers = TOWERS["static"]
    batch = some_batch()
    batch["key"] = batch["query"]
    mesh = make_mesh({"data": 8})
    loss = value_of(make_loss(towers, INFONCE, mesh, masks={}))
    params = init_state(
        jax.random.key(0), towers.init, optax.identity(), temperature=TEMPERATURE
    ).params
    equal_views = loss(params, batch, None)
    different_views = loss(params, batch, jax.random.key(1))
    assert relative_error(different_views, equal_views) > 1e-3


def test_the_two_sides_of_a_row_have_different_random_keys():
    mesh = make_mesh({"data": 8})
    params = {"towers": {}, "log_temperature": jnp.float32(0.0)}
    loss = value_of(make_loss(towers_of(drawn), Loss(difference), mesh, masks={}))
    assert float(loss(params, some_batch(), jax.random.key(1))) > 0.1


@pytest.mark.parametrize("shape", [None, {"replica": 2, "data": 4}], ids=str)
def test_explicit_negatives_go_through_step_cache_and_ring(shape, x64):
    towers = TOWERS["static"]
    params = double_params(towers)
    batch = some_batch()
    rng = np.random.default_rng(5)
    batch["negatives"] = {
        "inputs": {"tokens": rng.integers(1, 50, (16, 3, 7)).astype(np.int32)},
        "valid": np.arange(48).reshape(16, 3) % 5 != 0,
        "row": rng.integers(0, 20, (16, 3)).astype(np.int32),
        "group": rng.integers(0, 9, (16, 3)).astype(np.int32),
    }
    batch = jax.tree.map(jnp.asarray, batch)

    def by_hand(params):
        explicit = batch["negatives"]
        vectors = towers.encode(
            params["towers"], "key", {"tokens": explicit["inputs"]["tokens"].reshape(48, 7)}
        )
        return infonce_loss(
            *(towers.encode(params["towers"], side, batch[side]) for side in ("query", "key")),
            temperature=jnp.exp(params["log_temperature"]),
            masks=Masks(ids=batch["row"], groups=batch["group"]),
            negatives={
                "explicit": ExplicitNegatives(
                    vectors.reshape(16, 3, -1),
                    ids=explicit["row"],
                    groups=explicit["group"],
                    valid=explicit["valid"],
                )
            },
        ).mean()

    wanted = jax.jit(jax.value_and_grad(by_hand))(params)
    without, _ = loss_and_gradients("static", {"data": 1}, key=None)
    assert relative_error(wanted[0], without) > 0.05
    cached = {"chunk_sizes": {"query": 2, "key": 5}} if shape else {}
    ring = Loss(functools.partial(infonce_loss, exchange="ring", implementation="tiled"))
    found = loss_and_gradients(
        "static", shape or {"data": 1}, ring if shape else INFONCE, batch, key=None, **cached
    )
    assert max(relative_errors(found, wanted).values()) < 1e-10


def test_each_explicit_negative_has_a_different_random_key():
    batch = some_batch() | {"row": jnp.arange(16)}
    batch["negatives"] = {
        "inputs": {"tokens": jnp.ones((16, 3, 7), jnp.int32)},
        "valid": jnp.ones((16, 3), bool),
    }

    def remember(queries, keys, *, negatives, memory, **_):
        explicit = negatives["explicit"].vectors[..., 0]
        drawn_by_row = jnp.concatenate([queries[:, :1], keys[:, :1], explicit], 1)
        return queries[:, 0], {"drawn": drawn_by_row}

    loss = make_loss(
        towers_of(drawn), Loss(remember, init_memory=dict), make_mesh({"data": 8}), masks={}
    )
    memory = {"rows": {"drawn": init_table(16, 5, value=0.0)}}
    params = {"towers": {}, "log_temperature": jnp.float32(0.0)}
    _, memory = loss(params, memory, batch, jax.random.key(1))
    numbers = np.asarray(memory["rows"]["drawn"])[batch["row"]]
    assert np.unique(numbers).size == numbers.size


@pytest.mark.parametrize("size", [1, 8])
def test_the_memory_of_a_loss_is_read_and_written_by_row(size):
    mesh = make_mesh({"data": size}, devices=jax.devices()[:size])
    rows = jnp.array([5, 3, 5, 1030, 0, 7, 2, 9])
    batch = {side: {} for side in ("query", "key")} | {"row": rows}

    def count(queries, keys, *, memory, **_):
        return memory["seen"][:, 0], {"seen": memory["seen"] + 1 + queries[:, :1]}

    def encode(params, side, inputs, rngs=None):
        place = jnp.arange(8.0)[:, None]
        return place * (0.01 if side == "query" else 0.0)

    optimizer = optax.sgd(0.1)
    state = init_state(
        jax.random.key(0),
        lambda key: {},
        optimizer,
        temperature=TEMPERATURE,
        memory={"rows": {"seen": init_table(1_031, 1, value=2.0)}},
    )
    assert state.memory["rows"]["seen"].shape == (2_048, 1)
    loss = make_loss(towers_of(encode), Loss(count, init_memory=dict), mesh, masks={})
    step = make_train_step(loss, optimizer, mesh, temperature=TEMPERATURE)
    state, metrics = step(jax.device_put(state, state_sharding(mesh, state)), on_mesh(batch, mesh))
    assert float(metrics.loss) == 2.0
    assert state.memory["rows"]["seen"].sharding == table_sharding(mesh)
    seen = np.asarray(state.memory["rows"]["seen"])[:, 0]
    # Row 5 is at positions 0 and 2: the first is kept.
    wanted = {5: 3.0, 3: 3.01, 1030: 3.03, 0: 3.04, 7: 3.05, 2: 3.06, 9: 3.07}
    np.testing.assert_allclose(seen[list(wanted)], list(wanted.values()), rtol=1e-6)
    assert (np.delete(seen, list(wanted)) == 2.0).all()
    _, metrics = step(state, on_mesh(batch, mesh))
    np.testing.assert_allclose(
        metrics.loss, np.mean([3, 3.01, 3, 3.03, 3.04, 3.05, 3.06, 3.07]), rtol=1e-6
    )


def test_a_bias_of_the_scores_is_learned_where_a_loss_has_one(x64):
    towers = TOWERS["static"]
    mesh = make_mesh({"data": 8})
    params = double_params(towers) | {"bias": jnp.asarray(-3.0)}
    loss = make_loss(towers, LOSSES["sigmoid"], mesh, masks={"ids": "row"})
    batch = some_batch()

    def by_hand(params):
        return sigmoid_pair_loss(
            *(towers.encode(params["towers"], side, batch[side]) for side in ("query", "key")),
            temperature=jnp.exp(params["log_temperature"]),
            bias=params["bias"],
            masks=Masks(ids=batch["row"]),
        ).mean()

    found, _ = jax.jit(jax.grad(loss, has_aux=True))(params, {}, on_mesh(batch, mesh), None)
    wanted = jax.jit(jax.grad(by_hand))(params)
    assert max(relative_errors(found, wanted).values()) < 1e-10


def value_of(loss):
    """The value of a loss without memory."""
    return jax.jit(lambda params, batch, key: loss(params, {}, batch, key)[0])


def drawn(params, side, inputs, rngs=None):
    return jax.vmap(lambda key: jax.random.normal(key, (4,)))(rngs)


def difference(queries, keys, **_):
    return jnp.abs(queries - keys).mean(1)


def test_the_loss_is_the_mean_over_rows_and_takes_the_columns_of_its_masks():
    mesh, batch = make_mesh({"data": 8}), some_batch()
    params = {"towers": {}, "log_temperature": jnp.log(0.25)}

    def labels(queries, keys, *, masks, temperature, **_):
        return (100 * masks.ids + masks.groups + temperature).astype(queries.dtype)

    loss = value_of(make_loss(towers_of(drawn), Loss(labels), mesh, masks=MASKS))
    found = loss(params, batch, jax.random.key(1))
    wanted = 100 * np.mean(batch["row"]) + np.mean(batch["group"]) + 0.25
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_each_step_draws_again():
    mesh, optimizer = make_mesh({"data": 8}), optax.sgd(0.1)
    step = make_train_step(
        lambda params, memory, batch, key: (
            jax.random.uniform(key) + 0 * params["log_temperature"],
            memory,
        ),
        optimizer,
        mesh,
        temperature=TEMPERATURE,
    )
    state = jax.device_put(
        init_state(jax.random.key(0), TOWERS["static"].init, optimizer, temperature=TEMPERATURE),
        replicated_sharding(mesh),
    )
    losses = []
    for _ in range(3):
        state, metrics = step(state, on_mesh(some_batch(), mesh))
        losses.append(float(metrics.loss))
    assert len(set(losses)) == 3


def test_the_gradient_norm_is_that_before_clipping():
    mesh = make_mesh({"data": 8})
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
    step = make_train_step(
        lambda params, memory, batch, key: (
            3 * params["towers"] + 4 * params["log_temperature"],
            memory,
        ),
        optimizer,
        mesh,
        temperature=TEMPERATURE,
    )
    state = init_state(
        jax.random.key(0), lambda key: jnp.ones(()), optimizer, temperature=TEMPERATURE
    )
    _, metrics = step(jax.device_put(state, replicated_sharding(mesh)), on_mesh(some_batch(), mesh))
    assert float(metrics.gradient_norm) == 5.0
    assert jax.tree.map(float, metrics.leaf_gradient_norms) == {"towers": 3, "log_temperature": 4}


def test_the_temperature_starts_at_its_initial_value():
    towers, bounds = TOWERS["static"], TEMPERATURE._replace(initial=0.25)
    state = init_state(jax.random.key(0), towers.init, optax.identity(), temperature=bounds)
    np.testing.assert_allclose(jnp.exp(state.params["log_temperature"]), 0.25, rtol=1e-6)


@pytest.mark.parametrize("gradient_sign", [1.0, -1.0])
def test_the_temperature_is_clamped_and_comes_back_from_the_bound(gradient_sign):
    bound = TEMPERATURE.minimum if gradient_sign > 0 else TEMPERATURE.maximum
    mesh = make_mesh({"data": 8})
    optimizer = optax.sgd(10.0)
    directions = iter([gradient_sign, -gradient_sign])

    def step_with(sign):
        def loss(params, memory, batch, key):
            return sign * params["log_temperature"], memory

        return make_train_step(loss, optimizer, mesh, temperature=TEMPERATURE)

    state = jax.device_put(
        init_state(jax.random.key(0), TOWERS["static"].init, optimizer, temperature=TEMPERATURE),
        replicated_sharding(mesh),
    )
    batch = on_mesh(some_batch(), mesh)
    state, metrics = step_with(next(directions))(state, batch)
    np.testing.assert_allclose(metrics.temperature, bound, rtol=1e-6)
    _, metrics = step_with(next(directions))(state, batch)
    assert abs(float(metrics.temperature) - bound) > 1e-3


@pytest.mark.smoke
def test_the_step_counts_and_donates():
    mesh = make_mesh({"data": 8})
    towers, optimizer = TOWERS["static"], optax.sgd(0.1)
    loss = make_loss(towers, INFONCE, mesh, masks=MASKS)
    step = make_train_step(loss, optimizer, mesh, temperature=TEMPERATURE)
    before = jax.device_put(
        init_state(jax.random.key(0), towers.init, optimizer, temperature=TEMPERATURE),
        replicated_sharding(mesh),
    )
    after, metrics = step(before, on_mesh(some_batch(), mesh))
    assert int(after.step) == 1
    assert before.params["log_temperature"].is_deleted()
    assert np.isfinite(float(metrics.loss))
    norms = jax.tree.leaves(metrics.leaf_gradient_norms)
    np.testing.assert_allclose(
        metrics.gradient_norm, np.sqrt(sum(float(norm) ** 2 for norm in norms)), rtol=1e-5
    )


def loss_and_gradients(name, shape, loss=INFONCE, batch=None, key=KEY, **options):
    towers = TOWERS[name]
    size = int(np.prod(list(shape.values())))
    mesh = make_mesh(shape, devices=jax.devices()[:size])
    params = jax.device_put(double_params(towers), replicated_sharding(mesh))
    batch = on_mesh(some_batch() if batch is None else batch, mesh)
    of_batch = make_loss(towers, loss, mesh, masks=MASKS, **options)
    key = jax.random.key(key) if key == KEY else key
    (value, _), gradient = jax.jit(jax.value_and_grad(of_batch, has_aux=True))(
        params, {}, batch, key
    )
    return value, gradient


def on_mesh(batch, mesh):
    return put_batch(jax.tree.map(np.asarray, batch), mesh)


def double_params(towers):
    params = {"towers": towers.init(jax.random.key(0)), "log_temperature": jnp.log(0.05)}
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)


def some_batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50, (2, 16, 9)).astype(np.int32)  # id 0, padding, among them
    rows = (np.arange(16) % 15).astype(np.int32)  # one row occurs twice
    batch = {
        "query": {"tokens": tokens[0]},
        "key": {"tokens": tokens[1]},
        "row": rows,
        "group": rows // 2,
    }
    return jax.tree.map(jnp.asarray, batch)
