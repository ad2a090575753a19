"""One battery for every loss, on every way to compute it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from jax.test_util import check_grads

from jaxcl.losses import (
    decoupled_infonce_loss,
    hard_infonce_loss,
    infonce_loss,
    running_estimate_loss,
    sigmoid_pair_loss,
    supervised_infonce_loss,
)
from jaxcl.losses.comparison import DIRECTIONS
from jaxcl.losses.running_estimate import NEVER_SEEN
from jaxcl.negatives.memory_bank import init_bank, read_bank
from jaxcl.ops.mesh import make_mesh
from tests.helpers import relative_error, relative_errors, unit_vectors

pytestmark = pytest.mark.usefixtures("x64")

LOSSES = {
    "symmetric": infonce_loss,
    "query_to_key": functools.partial(infonce_loss, directions=("query_to_key",)),
    "key_to_query": functools.partial(infonce_loss, directions=("key_to_query",)),
    "own_sides": functools.partial(infonce_loss, directions=("query_to_query", "key_to_key")),
    "joint": functools.partial(infonce_loss, directions=DIRECTIONS, partition="joint"),
    "hardness": functools.partial(infonce_loss, hardness=3.0),
    "margin": functools.partial(infonce_loss, margin=-0.7),
    "decoupled": decoupled_infonce_loss,
    "hard": hard_infonce_loss,
    "debiased": functools.partial(hard_infonce_loss, concentration=0.0, positive_share=0.02),
    "sigmoid": sigmoid_pair_loss,
}


def running_estimate(queries, keys, **options):
    """The loss of rows that no batch has held before."""
    wide = jnp.promote_types(queries.dtype, jnp.float32)
    unseen = jnp.full((queries.shape[0], 2), NEVER_SEEN, wide)
    return running_estimate_loss(queries, keys, estimates=unseen, **options)[0]


def supervised(queries, keys, **options):
    """Pairs of rows that are positives of each other, wherever they stand."""
    partner = jnp.argsort(jnp.argsort(queries[:, 0])) // 2
    return supervised_infonce_loss(queries, keys, groups=partner, **options)


LOSSES["running_estimate"] = running_estimate
WAYS = (("gather", "reference"), ("gather", "tiled"), ("ring", "tiled"))

# One for all tests here: what runs operation by operation is compiled for a shape but once.
ROWS = 5

VARIANTS = ("query_to_key", "key_to_query", "own_sides", "hardness", "margin", "debiased")


def parameter(name, *values):
    """A loss's name or function with other values; what is an option of another runs as slow."""
    marks = [pytest.mark.slow] if name in VARIANTS else []
    return pytest.param(*values, marks=marks, id="-".join(map(str, (name, *values[1:]))))


# The groups of this one are no masks.
and_supervised = pytest.mark.parametrize(
    "loss_fn",
    [parameter(name, loss_fn) for name, loss_fn in (LOSSES | {"supervised": supervised}).items()],
)
every_loss = pytest.mark.parametrize(
    "loss_fn", [parameter(name, loss_fn) for name, loss_fn in LOSSES.items()]
)


@every_loss
@pytest.mark.parametrize("label", ["ids", "groups"])
def test_masking_equal_labels_is_dropping_the_row_in_the_way(loss_fn, label):
    queries, keys = unit_vectors(0, ROWS, 8), unit_vectors(1, ROWS, 8)
    labels = jnp.array([0, 1, 2, 1, 4])  # rows 1 and 3 are one another's false negatives
    masked = loss_fn(queries, keys, **{label: labels})
    without = jnp.array([0, 1, 2, 4])  # what row 1 sees with row 3 left out
    dropped = loss_fn(queries[without], keys[without])
    np.testing.assert_allclose(masked[1], dropped[1], rtol=1e-12)
    unmasked = loss_fn(queries, keys)
    assert abs(masked[1] - unmasked[1]) > 1e-5
    np.testing.assert_allclose(masked[0], unmasked[0], rtol=1e-12)


@every_loss
def test_padding_changes_no_loss_and_no_gradient(loss_fn):
    queries, keys = unit_vectors(0, ROWS - 2, 8), unit_vectors(1, ROWS - 2, 8)
    padding = jnp.full((2, 8), 7.0)
    valid = jnp.arange(ROWS) < ROWS - 2

    def padded(queries, keys):
        return loss_fn(
            jnp.concatenate([queries, padding]), jnp.concatenate([keys, padding]), valid=valid
        )

    loss = padded(queries, keys)
    np.testing.assert_allclose(loss[:-2], loss_fn(queries, keys), rtol=1e-12)
    assert loss[-2:].tolist() == [0.0, 0.0]
    found, wanted = (
        jax.grad(lambda *sides, f=f: f(*sides).sum(), (0, 1))(queries, keys)
        for f in (padded, loss_fn)
    )
    assert max(relative_errors(found, wanted).values()) < 1e-12


@and_supervised
def test_nothing_valid_is_zero_with_a_finite_gradient(loss_fn):
    sides = unit_vectors(0, ROWS, 8)
    nothing = {"valid": jnp.zeros(ROWS, bool)}
    value, gradient = jax.value_and_grad(lambda s: loss_fn(s, s, **nothing).sum())(sides)
    assert value == 0.0
    assert np.isfinite(gradient).all()


@and_supervised
def test_huge_scores_stay_finite(loss_fn):
    queries, keys = 1e4 * unit_vectors(0, ROWS, 8), unit_vectors(1, ROWS, 8)
    how = {"temperature": 1.0}
    value, gradient = jax.value_and_grad(lambda q: loss_fn(q, keys, **how).sum())(queries)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@and_supervised
def test_the_order_of_rows_does_not_matter(loss_fn):
    queries, keys = unit_vectors(0, ROWS, 8), unit_vectors(1, ROWS, 8)
    order = np.random.default_rng(2).permutation(ROWS)
    found = loss_fn(queries[order], keys[order])
    np.testing.assert_allclose(found, loss_fn(queries, keys)[order], rtol=1e-12)


@and_supervised
def test_compiled_is_eager(loss_fn):
    queries, keys = unit_vectors(0, ROWS, 8), unit_vectors(1, ROWS, 8)
    assert relative_error(jax.jit(loss_fn)(queries, keys), loss_fn(queries, keys)) < 1e-12


@pytest.mark.parametrize(
    "loss_fn", [LOSSES[name] for name in ("symmetric", "joint", "hard", "sigmoid")]
)
def test_gradients_match_finite_differences(loss_fn):
    ids = jnp.array([0, 1, 2, 1, 4])

    def loss(queries, keys, log_temperature):
        queries, keys, log_temperature = map(jnp.asarray, (queries, keys, log_temperature))
        return loss_fn(queries, keys, temperature=jnp.exp(log_temperature), ids=ids)

    inputs = (unit_vectors(0, ROWS, 8), unit_vectors(1, ROWS, 8), jnp.log(0.1))
    check_grads(loss, inputs, order=1, modes=["rev"], eps=1e-6)


@and_supervised
def test_bfloat16_is_close(loss_fn):
    queries, keys = unit_vectors(0, 48, 256), unit_vectors(1, 48, 256)
    exact = loss_fn(queries, keys)
    loss = loss_fn(*(side.astype(jnp.bfloat16) for side in (queries, keys)))
    assert loss.dtype == jnp.float32
    # 2⁻⁹ of scores of about 1/16, over a temperature of .05 or more.
    assert relative_error(loss, exact) < 5e-3


def mean_loss(loss_fn, labels, mesh_shape=None, exchange="gather", implementation="reference"):
    """The mean loss as a function of both sides and the log-temperature, dense or over a mesh."""

    def local(queries, keys, labels, temperature, axis_name=None):
        return loss_fn(
            queries,
            keys,
            temperature=temperature,
            axis_name=axis_name,
            exchange=exchange,
            implementation=implementation,
            **labels,
        )

    if mesh_shape is None:
        return lambda q, k, log_t: local(q, k, labels, jnp.exp(log_t)).mean()
    mesh = make_mesh(mesh_shape)
    rows, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    sharded = jax.shard_map(
        functools.partial(local, axis_name=mesh.axis_names),
        mesh=mesh,
        in_specs=(rows, rows, rows, whole),
        out_specs=rows,
    )
    return lambda q, k, log_t: sharded(q, k, labels, jnp.exp(log_t)).mean()


def value_and_gradients(loss):
    inputs = unit_vectors(0, 16, 8), unit_vectors(1, 16, 8), jnp.log(0.05)
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*inputs)


@functools.cache
def on_one_device(name, masked):
    with jax.enable_x64(True):
        return value_and_gradients(mean_loss(LOSSES[name], labels(masked)))


def labels(masked):
    if not masked:
        return {}
    return {
        "ids": jnp.arange(16) % 13,
        "groups": jnp.arange(16) // 2,
        "valid": jnp.arange(16) != 5,
    }


FLAT, DEEP = {"data": 8}, {"replica": 2, "data": 4}
MAIN = ("symmetric", "joint", "sigmoid")


@pytest.mark.parametrize(
    ("name", "shape", "masked", "way"),
    [
        # Every loss the hard way; the other ways and the deeper mesh where they can differ.
        *(parameter(name, name, FLAT, True, ("ring", "tiled")) for name in LOSSES),
        *((name, FLAT, True, way) for name in MAIN for way in WAYS[:2]),
        *((name, DEEP, False, way) for name in MAIN for way in WAYS[1:]),
    ],
    ids=str,
)
def test_any_mesh_gives_the_loss_and_gradients_of_one_device(name, shape, masked, way):
    found = value_and_gradients(mean_loss(LOSSES[name], labels(masked), shape, *way))
    assert max(relative_errors(found, on_one_device(name, masked)).values()) < 1e-10


@pytest.mark.parametrize("name", ["symmetric", "sigmoid"])
@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_a_wrong_reduction_would_be_seen(name, way):
    """The habit of other frameworks, mean the local losses and then the gradients, is off by 8."""
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
            return LOSSES[name](queries, keys, temperature=temperature, **how).mean()

        gradients = jax.grad(loss, (0, 1, 2))(queries, keys, log_temperature)
        return *gradients[:2], jax.lax.pmean(gradients[2], "data")

    inputs = unit_vectors(0, 16, 8), unit_vectors(1, 16, 8), jnp.log(0.05)
    _, right = on_one_device(name, False)
    for wrong, gradient in zip(local_gradients(*inputs), right, strict=True):
        np.testing.assert_allclose(wrong / gradient, 8.0, rtol=1e-8)


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_explicit_negatives_are_the_same_on_any_mesh(way):
    exchange, implementation = way
    mesh = make_mesh({"replica": 2, "data": 4})
    rows, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    columns = {
        "ids": jnp.arange(16) % 15,
        "negative_ids": (jnp.arange(32) * 5 % 16).reshape(16, 2),
        "negatives_valid": jnp.arange(32).reshape(16, 2) % 7 != 0,
    }

    def local(sides, columns, temperature, axis_name=None):
        queries, keys, negatives = sides
        return infonce_loss(
            queries,
            keys,
            negatives=negatives,
            temperature=temperature,
            directions=DIRECTIONS,
            partition="joint",
            hardness=2.0,
            negative_hardness=1.0,
            margin=-0.7,
            axis_name=axis_name,
            exchange=exchange,
            implementation=implementation,
            **columns,
        )

    sharded = jax.shard_map(
        functools.partial(local, axis_name=mesh.axis_names),
        mesh=mesh,
        in_specs=(rows, rows, whole),
        out_specs=rows,
    )
    sides = unit_vectors(0, 16, 8), unit_vectors(1, 16, 8), unit_vectors(2, 16, 2, 8)
    found, wanted = (
        jax.jit(jax.value_and_grad(lambda s, t, f=f: f(s, columns, t).mean(), (0, 1)))(
            sides, jnp.asarray(0.1)
        )
        for f in (sharded, local)
    )
    assert max(relative_errors(found, wanted).values()) < 1e-10


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

    def local(sides, vectors, temperature, bank, axis_name=None):
        queries, keys, labels = sides
        return infonce_loss(
            queries,
            keys,
            tiers={"bank": read_bank(bank._replace(vectors=vectors))},
            temperature=temperature,
            hardness=2.0,
            margin=-0.7,
            axis_name=axis_name,
            exchange=exchange,
            implementation=implementation,
            **labels,
        )

    sharded = jax.shard_map(
        functools.partial(local, axis_name=mesh.axis_names),
        mesh=mesh,
        in_specs=(rows, rows, whole, places),
        out_specs=rows,
    )
    labels_of_rows = {"ids": jnp.arange(16), "groups": jnp.arange(16) % 6}
    sides = unit_vectors(0, 16, 8), unit_vectors(1, 16, 8)

    def run(loss):
        def total(sides, vectors, temperature):
            return loss((*sides, labels_of_rows), vectors, temperature, bank).mean()

        inputs = (sides, bank.vectors, jnp.asarray(0.1))
        return jax.jit(jax.value_and_grad(total, (0, 1, 2)))(*inputs)

    (value, found), (wanted_value, wanted) = run(sharded), run(local)
    assert relative_error(value, wanted_value) < 1e-10
    assert max(relative_errors(found[::2], wanted[::2]).values()) < 1e-10
    assert not found[1].any()
    without = infonce_loss(*sides, hardness=2.0, margin=-0.7, temperature=0.1, **labels_of_rows)
    assert relative_error(without.mean(), wanted_value) > 0.1
