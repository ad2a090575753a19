from math import exp, log

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from jax.test_util import check_grads

from jaxcl.losses import infonce_loss
from jaxcl.losses.softmax import DIRECTIONS
from jaxcl.mesh import make_mesh
from tests.helpers import relative_error, relative_errors, unit_vectors

pytestmark = pytest.mark.usefixtures("x64")

MESHES = ({"data": 1}, {"data": 8}, {"replica": 2, "data": 4})


def test_two_orthogonal_pairs_by_hand():
    sides = jnp.eye(2)
    loss = infonce_loss(sides, sides, temperature=0.5)
    expected = -log(exp(2) / (exp(2) + exp(0)))
    np.testing.assert_allclose(loss, [expected, expected], rtol=1e-12)


@pytest.mark.smoke
def test_each_direction_by_hand():
    queries = jnp.array([[1.0, 0.0], [0.6, 0.8]])
    keys = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    # scores: [[1, 0], [.6, .8]]
    query_to_key = [-log(exp(1) / (exp(1) + exp(0))), -log(exp(0.8) / (exp(0.6) + exp(0.8)))]
    key_to_query = [-log(exp(1) / (exp(1) + exp(0.6))), -log(exp(0.8) / (exp(0) + exp(0.8)))]
    both = [(a + b) / 2 for a, b in zip(query_to_key, key_to_query, strict=True)]
    wanted = {"query_to_key": query_to_key, "key_to_query": key_to_query, "symmetric": both}
    for direction in DIRECTIONS:
        loss = infonce_loss(queries, keys, temperature=1.0, direction=direction)
        np.testing.assert_allclose(loss, wanted[direction], rtol=1e-12, err_msg=direction)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("label", ["ids", "groups"])
def test_masking_equal_labels_is_dropping_the_row_in_the_way(direction, label):
    queries, keys = unit_vectors(0, 5, 8), unit_vectors(1, 5, 8)
    labels = jnp.array([0, 1, 2, 1, 4])  # rows 1 and 3 are one another's false negatives
    masked = infonce_loss(queries, keys, direction=direction, **{label: labels})
    without = jnp.array([0, 1, 2, 4])  # what row 1 sees with row 3 left out
    dropped = infonce_loss(queries[without], keys[without], direction=direction)
    np.testing.assert_allclose(masked[1], dropped[1], rtol=1e-12)
    unmasked = infonce_loss(queries, keys, direction=direction)
    assert abs(masked[1] - unmasked[1]) > 1e-3
    np.testing.assert_allclose(masked[0], unmasked[0], rtol=1e-12)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_padding_changes_no_loss_and_no_gradient(direction):
    queries, keys = unit_vectors(0, 4, 8), unit_vectors(1, 4, 8)
    padding = jnp.full((3, 8), 7.0)
    valid = jnp.arange(7) < 4

    def padded(queries, keys):
        return infonce_loss(
            jnp.concatenate([queries, padding]),
            jnp.concatenate([keys, padding]),
            direction=direction,
            valid=valid,
        )

    def plain(queries, keys):
        return infonce_loss(queries, keys, direction=direction)

    loss = padded(queries, keys)
    np.testing.assert_allclose(loss[:4], plain(queries, keys), rtol=1e-12)
    assert loss[4:].tolist() == [0.0, 0.0, 0.0]
    found, wanted = (
        jax.grad(lambda *sides, f=f: f(*sides).sum(), (0, 1))(queries, keys)
        for f in (padded, plain)
    )
    assert max(relative_errors(found, wanted).values()) < 1e-12


def test_nothing_valid_is_zero_with_a_finite_gradient():
    sides = unit_vectors(0, 3, 4)

    def total(sides):
        return infonce_loss(sides, sides, valid=jnp.zeros(3, bool)).sum()

    value, gradient = jax.value_and_grad(total)(sides)
    assert value == 0.0
    assert np.isfinite(gradient).all()


def test_one_row_costs_nothing():
    assert infonce_loss(unit_vectors(0, 1, 4), unit_vectors(1, 1, 4)).tolist() == [0.0]


@pytest.mark.parametrize("temperature", [0.01, 0.05, 1.0])
def test_gradients_match_finite_differences(temperature):
    queries, keys = unit_vectors(0, 5, 8), unit_vectors(1, 5, 8)
    ids = jnp.array([0, 1, 2, 1, 4])

    def loss(q, k, log_t):
        q, k, log_t = map(jnp.asarray, (q, k, log_t))
        return infonce_loss(q, k, temperature=jnp.exp(log_t), ids=ids)

    check_grads(
        loss,
        (queries, keys, jnp.log(temperature)),
        order=1,
        modes=["rev"],
        eps=1e-6,
    )


def test_huge_scores_stay_finite():
    queries, keys = 1e4 * unit_vectors(0, 6, 8), unit_vectors(1, 6, 8)
    value, gradient = jax.value_and_grad(lambda q: infonce_loss(q, keys, temperature=1.0).sum())(
        queries
    )
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_bfloat16_products_are_summed_in_float32():
    queries, keys = unit_vectors(0, 64, 256), unit_vectors(1, 64, 256)
    exact = infonce_loss(queries, keys, temperature=0.05)
    short = [side.astype(jnp.bfloat16) for side in (queries, keys)]
    loss = infonce_loss(*short, temperature=0.05)
    assert loss.dtype == jnp.float32
    # The inputs lose 8 bits: 2⁻⁹ of a score of about 1/16, over the temperature. A sum in
    # bfloat16 would lose as much again at every addition.
    assert relative_error(loss, exact) < 2e-3


@pytest.mark.smoke
@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_any_mesh_gives_the_loss_and_gradients_of_one_device(shape, direction, masked):
    queries, keys = unit_vectors(0, 16, 8), unit_vectors(1, 16, 8)
    labels = {}
    if masked:
        labels = {
            "ids": jnp.arange(16) % 13,
            "groups": jnp.arange(16) // 2,
            "valid": jnp.arange(16) != 5,
        }
    inputs = (queries, keys, jnp.log(0.05))
    dense = jax.jit(jax.value_and_grad(mean_loss(direction, labels), (0, 1, 2)))(*inputs)
    loss = mean_loss(direction, labels, shape)
    sharded = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*inputs)
    assert max(relative_errors(sharded, dense).values()) < 1e-10


def test_a_wrong_reduction_would_be_seen():
    """The habit of other frameworks, mean the local losses and then the gradients, is off by 8."""
    queries, keys = unit_vectors(0, 16, 8), unit_vectors(1, 16, 8)
    mesh = make_mesh({"data": 8})
    rows, whole = PartitionSpec("data"), PartitionSpec()

    def local_gradient(queries, keys, log_temperature):
        def loss(log_temperature):
            temperature = jnp.exp(log_temperature)
            return infonce_loss(queries, keys, temperature=temperature, axis_name="data").mean()

        return jax.lax.pmean(jax.grad(loss)(log_temperature), "data")

    wrong = jax.shard_map(local_gradient, mesh=mesh, in_specs=(rows, rows, whole), out_specs=whole)(
        queries, keys, jnp.log(0.05)
    )
    right = jax.grad(mean_loss("symmetric", {}), 2)(queries, keys, jnp.log(0.05))
    np.testing.assert_allclose(wrong / right, 8.0, rtol=1e-10)
    assert relative_error(wrong, right) > 1e-10


def test_the_order_of_rows_does_not_matter():
    queries, keys = unit_vectors(0, 9, 8), unit_vectors(1, 9, 8)
    order = np.random.default_rng(2).permutation(9)
    np.testing.assert_allclose(
        infonce_loss(queries, keys)[order], infonce_loss(queries[order], keys[order]), rtol=1e-12
    )


def test_an_unknown_direction_lists_the_known():
    with pytest.raises(ValueError, match=r"'both' is unknown; use one of symmetric"):
        infonce_loss(jnp.eye(2), jnp.eye(2), direction="both")


def test_sides_of_different_shapes_are_an_error():
    with pytest.raises(Exception, match=r"shape|axis|dimension"):
        infonce_loss(jnp.eye(3), jnp.eye(3)[:2])


def mean_loss(direction, labels, mesh_shape=None):
    """The mean loss as a function of both sides and the log-temperature, dense or over a mesh."""

    def dense(queries, keys, log_temperature):
        temperature = jnp.exp(log_temperature)
        return infonce_loss(
            queries, keys, temperature=temperature, direction=direction, **labels
        ).mean()

    if mesh_shape is None:
        return dense
    size = np.prod(list(mesh_shape.values()))
    mesh = make_mesh(mesh_shape, devices=jax.devices()[:size])
    rows, whole = PartitionSpec(mesh.axis_names), PartitionSpec()

    def local(queries, keys, labels, temperature):
        return infonce_loss(
            queries,
            keys,
            temperature=temperature,
            direction=direction,
            axis_name=mesh.axis_names,
            **labels,
        )

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, rows, whole), out_specs=rows)
    return lambda q, k, log_temperature: sharded(q, k, labels, jnp.exp(log_temperature)).mean()
