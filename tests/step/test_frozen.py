"""Frozen parameters: no gradient, no optimizer state, the same bits; the others train as ever."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcl.losses import LOSSES
from jaxcl.models.embedding_bag import embedding_bag
from jaxcl.models.trainable import matching_paths, merge, parameter_paths, split
from jaxcl.negatives.memory_bank import init_bank, update_queue
from jaxcl.negatives.tiers import TierBudgets
from jaxcl.ops.mesh import make_mesh
from jaxcl.step import parameter_sharding
from jaxcl.step.batch_loss import BeyondBatch, make_loss
from jaxcl.step.train_step import init_state, make_train_step, state_sharding
from tests.helpers import bits, relative_errors
from tests.step.test_parameter_sharding import TOWERS
from tests.step.test_train_step import MASKS, TEMPERATURE, on_mesh, some_batch

CHUNKS = {"query": 1, "key": 3}
TREE = {"towers": {"both": {"table": 1, "blocks": {0: {"bias": 2}}}}, "log_temperature": 3}
PATHS = ["towers/both/table", "towers/both/blocks/0/bias", "log_temperature"]


def test_paths_join_the_names_of_nested_dicts():
    assert parameter_paths(TREE) == sorted(PATHS)


@pytest.mark.parametrize("frozen", [(), PATHS[:1], PATHS[1:], PATHS])
def test_what_is_split_is_merged_again(frozen):
    trained, held = split(TREE, frozen)
    assert parameter_paths(held) == sorted(frozen)
    assert parameter_paths(trained) == sorted({*PATHS} - {*frozen})
    assert merge(trained, held) == TREE


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("towers/both/*", PATHS[:2]),
        ("*bias", PATHS[1:2]),
        ("*/blocks/[01]/*", PATHS[1:2]),
        ("log_temperature", PATHS[2:]),
    ],
)
def test_a_pattern_matches_whole_paths(pattern, matched):
    assert matching_paths("optimizer.freeze", [pattern], PATHS) == [matched]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("towers/both/tabel", "'towers/both/tabel', which matches no parameter; the nearest are"),
        ("towers/both/tabel", "are towers/both/table, "),
        ("table", "which matches no parameter"),  # only the end of a path
        ("towers/both", "not the whole path of a parameter; towers/both/[*] matches all below it"),
        ("Towers/*", "which matches no parameter"),
    ],
)
def test_a_pattern_without_a_match_is_an_error_with_the_nearest_paths(pattern, message):
    with pytest.raises(ValueError, match=message):
        matching_paths("optimizer.freeze", ["*", pattern], PATHS)


def start(name, *, frozen, optimizer, memory=None, shape=None):
    """The first state in float64, and its mesh."""
    shape = shape or {"data": 1}
    mesh = make_mesh(shape, devices=jax.devices()[: int(np.prod(list(shape.values())))])
    state = init_state(
        jax.random.key(0),
        TOWERS[name].init,
        optimizer,
        temperature=TEMPERATURE,
        memory=memory,
        frozen=frozen,
    )

    def wide(leaf):
        return leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf

    params, memory = jax.tree.map(wide, (state.params, state.memory))
    trained, _ = split(params, frozen)
    state = state._replace(params=params, memory=memory, optimizer=optimizer.init(trained))
    return jax.device_put(state, state_sharding(mesh, state)), mesh


def frozen_of(name, *patterns):
    params = jax.eval_shape(
        lambda: (
            init_state(
                jax.random.key(0), TOWERS[name].init, optax.identity(), temperature=TEMPERATURE
            ).params
        )
    )
    paths = parameter_paths(params)
    return {path for found in matching_paths("freeze", patterns, paths) for path in found}


def step_of(name, mesh, *, frozen, optimizer, loss=LOSSES["infonce"], momentum=None, **options):
    return make_train_step(
        make_loss(TOWERS[name], loss, mesh, masks=MASKS, **options),
        optimizer,
        mesh,
        temperature=TEMPERATURE,
        momentum=momentum,
        frozen=frozen,
    )


FREEZES = {
    "static": ("towers/both/table",),
    "static, projected, two towers": ("towers/query/*", "log_temperature"),
    "transformer": ("*/blocks/0/*", "*_table"),
    "one loop": ("*/blocks/projections/*", "*bias"),
}


SHARDED = ({"data": 2, "fsdp": 4}, CHUNKS)


@pytest.mark.parametrize(
    ("name", "shape", "chunk_sizes"),
    [
        ("static", {"data": 8}, None),
        ("static, projected, two towers", {"data": 1}, CHUNKS),
        ("static, projected, two towers", *SHARDED),
        pytest.param("transformer", *SHARDED, marks=pytest.mark.slow),
        pytest.param("transformer", {"data": 8}, None, marks=pytest.mark.slow),
        pytest.param("transformer", {"data": 1}, CHUNKS, marks=pytest.mark.slow),
        pytest.param("one loop", {"data": 1}, CHUNKS, marks=pytest.mark.slow),
        pytest.param("one loop", *SHARDED, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_frozen_training_is_that_of_one_device(name, shape, chunk_sizes, x64, monkeypatch):
    monkeypatch.setattr(parameter_sharding, "_WORTH_CUTTING", 1)
    bag = functools.partial(embedding_bag, implementation="loop")
    monkeypatch.setattr("jaxcl.models.static.embedding_bag", bag)
    frozen = frozen_of(name, *FREEZES[name])
    optimizer = optax.adam(1e-2, eps=1e-3)
    finals = []
    for where, chunks in (({"data": 1}, None), (shape, chunk_sizes)):
        state, mesh = start(name, frozen=frozen, optimizer=optimizer, shape=where)
        before = jax.device_get(state.params)
        step = step_of(name, mesh, frozen=frozen, optimizer=optimizer, chunk_sizes=chunks)
        for _ in range(3):
            state, metrics = step(state, on_mesh(some_batch(), mesh))
        held, was = (split(tree, frozen)[1] for tree in (jax.device_get(state.params), before))
        assert jax.tree.map(bits, held) == jax.tree.map(bits, was)
        norms = metrics.leaf_gradient_norms
        finals.append((split(state.params, frozen)[0], state.optimizer, metrics.loss, norms))
    assert parameter_paths(norms) == parameter_paths(finals[0][0])
    errors = relative_errors(*jax.tree.map(np.asarray, finals[::-1]))
    assert max(errors.values()) < 1e-9, errors


@pytest.mark.parametrize("name", ["static, projected, two towers", "one loop"])
def test_the_other_parameters_have_the_gradients_of_an_unfrozen_step(name, x64):
    frozen, optimizer = frozen_of(name, *FREEZES[name]), optax.sgd(1.0)
    after = {}
    for held in ((), frozen):
        state, mesh = start(name, frozen=held, optimizer=optimizer)
        before = jax.device_get(split(state.params, frozen)[0])
        step = step_of(name, mesh, frozen=held, optimizer=optimizer)
        state, _ = step(state, on_mesh(some_batch(), mesh))
        trained = split(state.params, frozen)[0]
        after[bool(held)] = jax.tree.map(lambda new, old: np.asarray(new - old), trained, before)
    assert max(relative_errors(after[True], after[False]).values()) < 1e-12


def test_no_gradient_of_a_frozen_matrix_is_computed(x64):
    """One product less for each frozen matrix, in the compiled program."""
    optimizer, name = optax.sgd(0.1), "transformer"
    products = {}
    kernels = [f"towers/both/blocks/1/{one}/kernel" for one in ("widen", "narrow", "output")]
    for frozen in ([], kernels[:1], kernels):
        mesh = make_mesh({"data": 1}, devices=jax.devices()[:1])
        state = init_state(
            jax.random.key(0), TOWERS[name].init, optimizer, temperature=TEMPERATURE, frozen=frozen
        )
        step = step_of(name, mesh, frozen=frozen, optimizer=optimizer)
        compiled = step.lower(state, on_mesh(some_batch(), mesh)).compile()
        products[len(frozen)] = sum(compiled.as_text().count(one) for one in (" dot(", "matmul"))
    sides = 2
    assert products[1] == products[0] - sides
    assert products[3] == products[0] - 3 * sides


def test_a_frozen_parameter_has_no_optimizer_state():
    params = {"towers": {"both": {"table": jnp.ones((3, 2)), "bias": jnp.ones(2)}}}
    state = init_state(
        jax.random.key(0),
        lambda key: params["towers"],
        optax.adam(0.1),
        temperature=TEMPERATURE,
        frozen=["towers/both/table"],
    )
    mu = state.optimizer[0].mu
    assert parameter_paths(mu) == ["log_temperature", "towers/both/bias"]
    assert parameter_paths(state.params) == [*parameter_paths(mu), "towers/both/table"]


def test_a_frozen_temperature_keeps_its_bits_at_a_bound():
    bounds = TEMPERATURE._replace(initial=TEMPERATURE.minimum)
    mesh, optimizer = make_mesh({"data": 8}), optax.sgd(0.1)
    state = init_state(
        jax.random.key(0),
        TOWERS["static"].init,
        optimizer,
        temperature=bounds,
        frozen=["log_temperature"],
    )
    state = jax.device_put(state, state_sharding(mesh, state))
    before = bits(state.params["log_temperature"])
    step = step_of("static", mesh, frozen=["log_temperature"], optimizer=optimizer)
    state, metrics = step(state, on_mesh(some_batch(), mesh))
    assert bits(state.params["log_temperature"]) == before
    assert float(metrics.temperature) == pytest.approx(TEMPERATURE.minimum)


def test_a_momentum_encoder_reads_the_frozen_parameters_of_the_model(x64):
    """It holds only the trained ones, and writes the bank that a whole copy would write."""
    name, optimizer = "static, projected, two towers", optax.sgd(0.5)
    frozen = frozen_of(name, "*/table")
    queue = BeyondBatch(
        TierBudgets(full_bank=True),
        {
            "key": lambda bank, vectors, rows, ids, groups, guides: update_queue(
                bank, vectors, ids, groups, num_slots=32
            )
        },
    )
    banks, momentum = {}, {}
    # Without frozen parameters, an optimizer that does not move them keeps them as well.
    labels = {True: "held", False: "moved"}
    still = optax.multi_transform(
        {"moved": optimizer, "held": optax.set_to_zero()},
        lambda params: merge(
            *(
                jax.tree.map(lambda _, label=labels[held]: label, part)
                for held, part in zip((False, True), split(params, frozen), strict=True)
            )
        ),
    )
    for held, one in ((frozen, optimizer), ((), still)):
        memory = {"momentum": {}, "bank": {"key": init_bank(32, 8, dtype=jnp.float64)}}
        state, mesh = start(name, frozen=held, optimizer=one, memory=memory)
        step = step_of(
            name,
            mesh,
            frozen=held,
            optimizer=one,
            loss=LOSSES["infonce"],
            momentum=lambda step: jnp.float64(0.75),
            beyond=queue,
        )
        for _ in range(3):
            state, _ = step(state, on_mesh(some_batch(), mesh))
        banks[bool(held)] = state.memory["bank"]["key"].vectors
        momentum[bool(held)] = state.memory["momentum"]
    assert not any("table" in path for path in parameter_paths(momentum[True]))
    wanted, _ = split({"towers": momentum[False]}, frozen)
    assert max(relative_errors(momentum[True], wanted["towers"]).values()) < 1e-12
    assert np.linalg.norm(banks[True] - banks[False]) < 1e-12 * np.linalg.norm(banks[False])
