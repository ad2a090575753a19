"""The requirements of `LossFn`, for every registered loss and every way to compute it."""

import functools
import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from jax.test_util import check_grads

from jaxcl.losses import (
    LOSSES,
    ExplicitNegatives,
    Loss,
    Masks,
    OwnNegatives,
    SharedNegatives,
    infonce_loss,
)
from jaxcl.losses.comparison import DIRECTIONS
from jaxcl.losses.matryoshka import nested
from jaxcl.losses.running_estimate import NEVER_SEEN
from jaxcl.negatives.memory_bank import init_bank, read_bank
from jaxcl.ops.mesh import make_mesh
from tests.helpers import relative_error, relative_errors, unit_vectors

pytestmark = pytest.mark.usefixtures("x64")


def with_options(name, **options):
    return LOSSES[name]._replace(function=functools.partial(LOSSES[name].function, **options))


VARIANTS = {
    "query_to_key": with_options("infonce", directions=("query_to_key",)),
    "key_to_query": with_options("infonce", directions=("key_to_query",)),
    "own_sides": with_options("infonce", directions=("query_to_query", "key_to_key")),
    "joint": with_options("infonce", directions=DIRECTIONS, partition="joint"),
    "hardness": with_options("infonce", hardness=3.0),
    "debiased": with_options("hard", concentration=0.0, positive_share=0.02),
    "every_view": with_options("supervised", directions=DIRECTIONS),
    "row_temperatures": with_options("running_estimate", temperature_rate=0.1),
    "matryoshka": nested(LOSSES["infonce"], dims=(3, 8)),
    "matryoshka_scored": nested(LOSSES["cosent"], dims=(3, 8)),
    "matryoshka_estimate": nested(LOSSES["running_estimate"], dims=(3, 8)),
}
ALL = {**LOSSES, **VARIANTS}
WAYS = (("gather", "reference"), ("gather", "tiled"), ("ring", "tiled"))

# One shape for all tests here, so that each single operation is compiled once.
ROWS = 5


class Rows(NamedTuple):
    """A batch for any loss.

    Attributes:
      queries, keys: unit vectors.
      masks: fields of `Masks` by row.
      columns: labels, a teacher's scores and embeddings, and the scores of pairs.
      explicit: vectors of explicit negatives; a teacher scores each.
    """

    queries: jax.Array
    keys: jax.Array
    masks: dict
    columns: dict
    explicit: jax.Array


def batch(count, width=8, **masks):
    rng = np.random.default_rng(7)
    columns = {
        "labels": jnp.asarray(rng.permutation(count) // 2),
        "teacher_scores": jnp.asarray(rng.normal(size=(count, 3))),
        "scores": jnp.asarray(rng.permutation(count) // 2 / 2),  # with ties
        "teacher_vectors": {
            side: unit_vectors(seed, count, width) for seed, side in ((8, "query"), (9, "key"))
        },
    }
    sides = unit_vectors(0, count, width), unit_vectors(1, count, width)
    return Rows(*sides, masks, columns, unit_vectors(2, count, 2, width))


def take(rows, places):
    """These rows, in this order."""
    return jax.tree.map(lambda leaf: leaf[places], rows)


def value(loss, rows, *, negatives=None, margin=None, temperature=0.05, **how):
    """The loss of each row, given the arguments that the loss declares."""
    options = {name: rows.columns[name] for name in loss.columns}
    if loss.exchanges:
        options |= how if loss.multiplies else {"axis_name": how.get("axis_name")}
    fields = {**rows.masks, "margin": margin}
    fields = {name: one for name, one in fields.items() if name in loss.masks}
    if loss.masks:
        options["masks"] = Masks(**fields)
    if "teacher_scores" in loss.columns:
        negatives = {"explicit": ExplicitNegatives(rows.explicit)}
    if negatives is not None:
        options["negatives"] = negatives
    if loss.has_temperature:
        options["temperature"] = temperature
    if loss.init_memory is None:
        return loss.function(rows.queries, rows.keys, **options)
    return loss.function(rows.queries, rows.keys, memory=memory_of(loss, rows), **options)[0]


def memory_of(loss, rows):
    """The state for rows of no earlier batch."""
    given = loss.function.keywords if isinstance(loss.function, functools.partial) else {}
    tables = loss.init_memory(
        rows.queries.shape[0],
        temperature=0.05,
        temperature_rate=given.get("temperature_rate"),
    )
    wide = jnp.promote_types(rows.queries.dtype, jnp.float32)
    return jax.tree.map(lambda table: table[: rows.queries.shape[0]].astype(wide), tables)


def parameter(name, *values):
    """The name of a loss with further values; variants with options are slow tests."""
    marks = [pytest.mark.slow] if name in VARIANTS else []
    return pytest.param(name, *values, marks=marks, id="-".join(map(str, (name, *values))))


every_loss = pytest.mark.parametrize("name", [parameter(name) for name in ALL])


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_takes_what_it_declares_and_little_else(name):
    loss = LOSSES[name]
    arguments = set(inspect.signature(loss.function).parameters)
    declared = {"queries", "keys", *loss.columns}
    declared |= {"temperature"} if loss.has_temperature else set()
    declared |= {"masks"} if loss.masks else set()
    declared |= {"negatives"} if loss.negatives else set()
    if loss.exchanges:
        declared |= {"axis_name"}
        declared |= {"exchange", "implementation"} if loss.multiplies else set()
    declared |= {"bias"} if loss.has_bias else set()
    declared |= {"memory"} if loss.init_memory else set()
    declared |= {"temperature_bounds"} if loss.bounds_temperature else set()
    options = set(loss.options._fields)
    assert len(arguments) <= 14
    if "options" not in arguments:  # passes further arguments on
        assert declared <= arguments
        assert arguments - declared - options <= {"key_labels"}
        assert options <= arguments | {"bias"}
    assert set(loss.masks) <= set(Masks._fields)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        parameter(name, label)
        for name, loss in ALL.items()
        for label in ("ids", "groups")
        if label in loss.masks and loss.columns == {}
    ],
)
def test_masking_equal_labels_is_dropping_the_row_in_the_way(name, label):
    loss, rows = ALL[name], batch(ROWS)
    # Rows 1 and 3 are false negatives of each other.
    masked = value(loss, rows._replace(masks={label: jnp.array([0, 1, 2, 1, 4])}))
    dropped = value(loss, take(rows, jnp.array([0, 1, 2, 4])))  # without row 3
    np.testing.assert_allclose(masked[1], dropped[1], rtol=1e-12)
    unmasked = value(loss, rows)
    assert abs(masked[1] - unmasked[1]) > 1e-5
    np.testing.assert_allclose(masked[0], unmasked[0], rtol=1e-12)


@every_loss
def test_padding_changes_no_loss_and_no_gradient(name):
    loss, whole = ALL[name], batch(ROWS)
    kept = jnp.arange(ROWS - 2)
    wanted_rows = take(whole, kept)

    def padded(queries, keys):
        padding = jnp.full((2, 8), 7.0)
        sides = {"queries": queries, "keys": keys}
        sides = {side: jnp.concatenate([one, padding]) for side, one in sides.items()}
        valid = jnp.arange(ROWS) < ROWS - 2
        return value(loss, whole._replace(**sides, masks={"valid": valid}))

    def alone(queries, keys):
        return value(loss, wanted_rows._replace(queries=queries, keys=keys))

    sides = wanted_rows.queries, wanted_rows.keys
    found = padded(*sides)
    np.testing.assert_allclose(found[:-2], alone(*sides), rtol=1e-12)
    assert found[-2:].tolist() == [0.0, 0.0]
    gradients, wanted = (
        jax.grad(lambda *sides, f=f: f(*sides).sum(), (0, 1))(*sides) for f in (padded, alone)
    )
    assert max(relative_errors(gradients, wanted).values()) < 1e-12


@every_loss
def test_nothing_valid_is_zero_with_a_finite_gradient(name):
    rows = batch(ROWS, valid=jnp.zeros(ROWS, bool))

    def total(sides):
        return value(ALL[name], rows._replace(queries=sides, keys=sides)).sum()

    found, gradient = jax.value_and_grad(total)(rows.queries)
    assert found == 0.0
    assert np.isfinite(gradient).all()


@every_loss
def test_huge_scores_stay_finite(name):
    rows = batch(ROWS)

    def total(queries):
        return value(ALL[name], rows._replace(queries=queries), temperature=1.0).sum()

    found, gradient = jax.value_and_grad(total)(1e4 * rows.queries)
    assert np.isfinite(found)
    assert np.isfinite(gradient).all()


@every_loss
def test_the_order_of_rows_does_not_matter(name):
    rows = batch(ROWS)
    order = np.random.default_rng(2).permutation(ROWS)
    found = value(ALL[name], take(rows, order))
    np.testing.assert_allclose(found, value(ALL[name], rows)[order], rtol=1e-12)


@every_loss
def test_compiled_is_eager(name):
    rows, loss = batch(ROWS), functools.partial(value, ALL[name])
    assert relative_error(jax.jit(loss)(rows), loss(rows)) < 1e-12


# A loss with memory returns the value of one function and the gradient of another.
@pytest.mark.parametrize("name", [name for name in LOSSES if not LOSSES[name].init_memory])
def test_gradients_match_finite_differences(name):
    rows = batch(ROWS, ids=jnp.array([0, 1, 2, 1, 4]))

    def loss(queries, keys, log_temperature):
        queries, keys, log_temperature = map(jnp.asarray, (queries, keys, log_temperature))
        sides = rows._replace(queries=queries, keys=keys)
        return value(ALL[name], sides, temperature=jnp.exp(log_temperature))

    check_grads(loss, (rows.queries, rows.keys, jnp.log(0.1)), order=1, modes=["rev"], eps=1e-6)


@every_loss
def test_bfloat16_is_close(name):
    rows = batch(48, 256)
    exact = value(ALL[name], rows)
    narrow = {side: getattr(rows, side).astype(jnp.bfloat16) for side in ("queries", "keys")}
    narrow["explicit"] = rows.explicit.astype(jnp.bfloat16)
    loss = value(ALL[name], rows._replace(**narrow))
    assert loss.dtype == jnp.float32
    # 2⁻⁹ of scores of about 1/16, over a temperature of .05 or more; scores of
    # short lengths are larger.
    assert relative_error(loss, exact) < (2e-2 if "matryoshka" in name else 5e-3)


def outside(loss, count):
    """All kinds of negatives that a loss takes, for a batch of `count` rows."""
    rng = np.random.default_rng(3)

    def labels(*shape):
        return {
            "ids": jnp.asarray(rng.integers(0, 20, shape)),
            "groups": jnp.asarray(rng.integers(0, 8, shape)),
            "valid": jnp.asarray(rng.random(shape) < 0.8),
        }

    explicit = labels(count, 3)
    if "groups" not in loss.masks:
        del explicit["groups"]
    kinds = {
        "explicit": ExplicitNegatives(unit_vectors(4, count, 3, 8), **explicit),
        "bank": SharedNegatives(unit_vectors(5, 3 * count, 8), **labels(3 * count)),
        "nearest": OwnNegatives(unit_vectors(6, count, 2, 8), **labels(count, 2)),
    }
    return {name: one for name, one in kinds.items() if type(one) in loss.negatives}


MASKS = {
    "ids": lambda count: jnp.arange(count) % 13,
    "groups": lambda count: jnp.arange(count) // 2,
    "valid": lambda count: jnp.arange(count) != 5,
}
COUNT = 16


def mean_loss(name, masked, from_outside, mesh_shape=None, exchange="gather", way="reference"):
    """The mean loss as a function of both sides, the log-temperature and the negatives."""
    loss = ALL[name]
    masks = {field: make(COUNT) for field, make in MASKS.items()} if masked else {}
    if from_outside and not masked:
        masks = {field: MASKS[field](COUNT) for field in ("ids", "groups")}
    rows = batch(COUNT, **masks)
    negatives = (
        outside(loss, COUNT) if from_outside and "teacher_scores" not in loss.columns else {}
    )

    def local(sides, vectors, rest, negatives, temperature, axis_name=None):
        given = {name: one._replace(vectors=vectors[name]) for name, one in negatives.items()}
        return value(
            loss,
            rest._replace(queries=sides[0], keys=sides[1]),
            negatives=given or None,
            margin=-0.7 if masked else None,
            temperature=temperature,
            axis_name=axis_name,
            exchange=exchange,
            implementation=way,
        )

    whole_batch = local
    if mesh_shape is not None:
        mesh = make_mesh(mesh_shape)
        sharded, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
        whole_batch = jax.shard_map(
            functools.partial(local, axis_name=mesh.axis_names),
            mesh=mesh,
            in_specs=(sharded, sharded, sharded, sharded, whole),
            out_specs=sharded,
        )

    def mean(queries, keys, log_temperature, vectors):
        temperature = jnp.exp(log_temperature)
        return whole_batch((queries, keys), vectors, rows, negatives, temperature).mean()

    vectors = {name: one.vectors for name, one in negatives.items()}
    inputs = rows.queries, rows.keys, jnp.log(0.05), vectors
    # Temperatures by row replace the global one, whose gradient is then zero.
    has_temperature = loss.has_temperature and "row_" not in name
    arguments = (0, 1, 2, 3) if has_temperature else (0, 1)
    return jax.jit(jax.value_and_grad(mean, arguments))(*inputs)


@functools.cache
def on_one_device(name, masked, from_outside):
    with jax.enable_x64(True):
        return mean_loss(name, masked, from_outside)


FLAT, DEEP = {"data": 8}, {"replica": 2, "data": 4}
MAIN = ("infonce", "joint", "sigmoid")
TAKES_NEGATIVES = [name for name, loss in LOSSES.items() if SharedNegatives in loss.negatives]


@pytest.mark.parametrize(
    ("name", "shape", "masked", "from_outside", "way"),
    [
        # Every loss with the hardest options; others, and the deeper mesh, only where they differ.
        *(
            pytest.param(
                *(name, FLAT, True, True, ("ring", "tiled")),
                # infonce and joint check the same sums over tiles and devices.
                marks=[pytest.mark.slow] if name in (*VARIANTS, "decoupled", "nt_xent") else [],
            )
            for name in ALL
        ),
        *(
            pytest.param(
                *(name, DEEP, True, True, ("gather", "tiled")),
                marks=[] if name in MAIN else [pytest.mark.slow],
            )
            for name in TAKES_NEGATIVES
        ),
        *((name, FLAT, True, False, way) for name in MAIN for way in WAYS[:2]),
        *((name, DEEP, False, False, way) for name in MAIN for way in WAYS[1:]),
    ],
    ids=str,
)
def test_any_mesh_gives_the_loss_and_gradients_of_one_device(
    name, shape, masked, from_outside, way
):
    if not (ALL[name].exchanges and ALL[name].multiplies):
        way = ("gather", "reference")
    found = mean_loss(name, masked, from_outside, shape, *way)
    assert max(relative_errors(found, on_one_device(name, masked, from_outside)).values()) < 1e-10


@pytest.mark.parametrize("name", ["infonce", "sigmoid"])
@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_a_wrong_reduction_would_be_seen(name, way):
    """Averaging local losses and then gradients, as other frameworks do, is off by 8."""
    mesh = make_mesh({"data": 8})
    rows, whole = PartitionSpec("data"), PartitionSpec()
    exchange, implementation = way

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(rows, rows, whole), out_specs=(rows, rows, whole)
    )
    def local_gradients(queries, keys, log_temperature):
        def loss(queries, keys, log_temperature):
            temperature = jnp.exp(log_temperature)
            how = {"axis_name": "data", "exchange": exchange, "implementation": implementation}
            return LOSSES[name].function(queries, keys, temperature=temperature, **how).mean()

        gradients = jax.grad(loss, (0, 1, 2))(queries, keys, log_temperature)
        return *gradients[:2], jax.lax.pmean(gradients[2], "data")

    inputs = unit_vectors(0, 16, 8), unit_vectors(1, 16, 8), jnp.log(0.05)
    _, right = on_one_device(name, False, False)
    for wrong, gradient in zip(local_gradients(*inputs), right[:3], strict=True):
        np.testing.assert_allclose(wrong / gradient, 8.0, rtol=1e-8)


def scores_of_negatives(rows, negatives, ceilings, temperature):
    """Each query's scores with its allowed negatives, by dense matrices."""
    ids, groups = (np.asarray(rows.masks[name]) for name in ("ids", "groups"))
    queries, keys = np.asarray(rows.queries), np.asarray(rows.keys)
    kept = [[] for _ in queries]

    def add(similarity, present, other_ids, other_groups):
        allowed = present & (other_ids != ids[:, None]) & (other_groups != groups[:, None])
        allowed &= similarity <= ceilings[:, None]
        for row, chosen in enumerate(allowed):
            kept[row].extend(similarity[row, chosen] / temperature)

    everyone = np.ones((len(queries), len(queries)), bool)
    add(queries @ keys.T, everyone, ids[None], groups[None])
    for one in negatives.values():
        vectors, *labels = (np.asarray(a) for a in (one.vectors, one.valid, one.ids, one.groups))
        if isinstance(one, OwnNegatives):
            add(np.einsum("qd,qnd->qn", queries, vectors), *labels)
        else:
            flat = vectors.reshape(-1, vectors.shape[-1])
            add(queries @ flat.T, *(label.reshape(1, -1) for label in labels))
    return [np.array(scores) for scores in kept]


BY_FORMULA = {
    "infonce": lambda pos, neg: np.logaddexp(pos, np.logaddexp.reduce(neg)) - pos,
    "decoupled": lambda pos, neg: np.logaddexp.reduce(neg) - pos,
    "hard": lambda pos, neg: (
        np.logaddexp(
            pos,
            np.logaddexp.reduce(2 * neg) - np.logaddexp.reduce(neg) + np.log(len(neg)),
        )
        - pos
    ),
    "sigmoid": lambda pos, neg: (
        np.logaddexp(0, -(pos - 2)) + np.logaddexp(0, neg - 2).sum()  # a bias of −2
    ),
    "running_estimate": lambda pos, neg: np.logaddexp.reduce(neg - pos) - np.log(len(neg)),
}


@pytest.mark.parametrize("name", BY_FORMULA)
def test_negatives_from_outside_agree_with_a_dense_matrix(name):
    rows, temperature, margin = batch(COUNT), 0.3, 0.1
    rows = rows._replace(masks={one: MASKS[one](COUNT) for one in ("ids", "groups")})
    rows = rows._replace(keys=(rows.queries + 0.5 * rows.keys))
    options = {"sigmoid": {"bias": -2.0}}.get(name, {"directions": ("query_to_key",)})
    loss: Loss = with_options(name, **options)
    negatives = outside(loss, COUNT)
    if name == "running_estimate":
        tables = {"estimates": jnp.full((COUNT, 1), NEVER_SEEN)}
        loss = loss._replace(init_memory=lambda *_, **__: tables)
    found = value(loss, rows, negatives=negatives, margin=margin, temperature=temperature)
    positives = np.einsum("qd,qd->q", rows.queries, rows.keys)
    scores = scores_of_negatives(rows, negatives, positives - margin, temperature)
    wanted = [BY_FORMULA[name](*pair) for pair in zip(positives / temperature, scores, strict=True)]
    np.testing.assert_allclose(found, wanted, rtol=1e-10)
    assert len({len(one) for one in scores}) > 3  # masks differ from row to row
    without = value(loss, rows, margin=margin, temperature=temperature)
    assert relative_error(without, found) > 0.05


@pytest.mark.parametrize("way", [WAYS[1], WAYS[2]], ids="-".join)
def test_a_bank_is_the_same_on_any_mesh_and_gets_no_gradient(way):
    exchange, implementation = way
    mesh = make_mesh({"replica": 2, "data": 4})
    rows, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    slots = init_bank(40, 8, dtype=jnp.dtype("float64"))
    numbers = jnp.arange(slots.ids.shape[0])
    bank = slots._replace(
        vectors=unit_vectors(3, slots.ids.shape[0], 8),
        ids=numbers % 20,
        groups=numbers % 6,
        written=jnp.where(numbers % 5 == 0, -1, numbers),
    )
    places = type(bank)(rows, rows, rows, rows, whole, whole, None)
    labels_of_rows = {"ids": jnp.arange(16), "groups": jnp.arange(16) % 6}

    def local(sides, vectors, temperature, bank, axis_name=None):
        queries, keys, labels = sides
        return infonce_loss(
            queries,
            keys,
            negatives={"bank": read_bank(bank._replace(vectors=vectors))},
            temperature=temperature,
            hardness=2.0,
            masks=Masks(**labels, margin=-0.7),
            axis_name=axis_name,
            exchange=exchange,
            implementation=implementation,
        )

    sharded = jax.shard_map(
        functools.partial(local, axis_name=mesh.axis_names),
        mesh=mesh,
        in_specs=(rows, rows, whole, places),
        out_specs=rows,
    )
    sides = unit_vectors(0, 16, 8), unit_vectors(1, 16, 8)

    def run(loss):
        def total(sides, vectors, temperature):
            return loss((*sides, labels_of_rows), vectors, temperature, bank).mean()

        inputs = (sides, bank.vectors, jnp.asarray(0.1))
        return jax.jit(jax.value_and_grad(total, (0, 1, 2)))(*inputs)

    (found_value, found), (wanted_value, wanted) = run(sharded), run(local)
    assert relative_error(found_value, wanted_value) < 1e-10
    assert max(relative_errors(found[::2], wanted[::2]).values()) < 1e-10
    assert not found[1].any()
    masks = Masks(**labels_of_rows, margin=-0.7)
    without = infonce_loss(*sides, hardness=2.0, masks=masks, temperature=0.1)
    assert relative_error(without.mean(), wanted_value) > 0.1
