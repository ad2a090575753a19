from math import exp, log

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxcl.losses import Masks, cosent_loss
from jaxcl.ops.mesh import make_mesh
from tests.helpers import relative_error, relative_errors, unit_vectors

pytestmark = pytest.mark.usefixtures("x64")

ROWS = 24


def sides(count=ROWS):
    return unit_vectors(0, count, 8), unit_vectors(1, count, 8)


def scores(count=ROWS):
    """Ratings from 0 to 5 in steps of a half, so that several pairs have equal ones."""
    return jnp.asarray(np.random.default_rng(3).integers(0, 11, count) / 2)


def dense_loss(queries, keys, scores, temperature, valid=True):
    """The equation over all pairs of rows, in NumPy."""
    similarities = np.einsum("qd,qd->q", queries, keys) / temperature
    higher = (scores[:, None] > scores[None, :]) & valid & np.reshape(valid, (-1, 1))
    return np.logaddexp.reduce(
        np.append(0, (similarities[None, :] - similarities[:, None])[higher])
    )


def test_three_pairs_by_hand():
    similarities, ratings = jnp.array([0.9, 0.5, 0.7]), jnp.array([1.0, 2.0, 2.0])
    queries = jnp.ones((3, 1))
    loss = cosent_loss(queries, similarities[:, None], scores=ratings, temperature=0.1)
    # Both later pairs have a higher score than the first; between them is a tie.
    wanted = log(1 + exp((0.9 - 0.5) / 0.1) + exp((0.9 - 0.7) / 0.1))
    np.testing.assert_allclose(loss, [wanted] * 3, rtol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 3, ROWS])
def test_the_loss_is_that_of_all_pairs_of_rows(count):
    queries, keys = sides(count)
    ratings = scores(count)
    wanted = dense_loss(*map(np.asarray, (queries, keys, ratings)), 0.05)
    found = cosent_loss(queries, keys, scores=ratings)
    np.testing.assert_allclose(found, np.full(count, wanted), rtol=1e-12, atol=1e-15)


def dense_in_jax(queries, keys, temperature):
    similarities = (queries * keys).sum(1) / temperature
    ratings = scores()
    terms = jnp.where(
        ratings[:, None] > ratings, similarities[None, :] - similarities[:, None], -jnp.inf
    )
    return jax.nn.logsumexp(jnp.append(terms.ravel(), 0))


@pytest.mark.parametrize("shape", [{"data": 1}, {"data": 8}, {"replica": 2, "data": 4}], ids=str)
def test_the_mean_over_any_mesh_has_the_value_and_gradients_of_all_pairs(shape):
    size = int(np.prod(list(shape.values())))
    mesh = make_mesh(shape, devices=jax.devices()[:size])
    rows, whole = PartitionSpec(mesh.axis_names), PartitionSpec()

    def local(queries, keys, ratings, temperature):
        return cosent_loss(
            queries, keys, scores=ratings, temperature=temperature, axis_name=mesh.axis_names
        )

    over_mesh = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, rows, whole), out_specs=rows)

    def mean(queries, keys, temperature):
        return over_mesh(queries, keys, scores(), temperature).mean()

    inputs = *sides(), jnp.asarray(0.05)
    found = jax.jit(jax.value_and_grad(mean, (0, 1, 2)))(*inputs)
    wanted = jax.value_and_grad(dense_in_jax, (0, 1, 2))(*inputs)
    assert max(relative_errors(found, wanted).values()) < 1e-10


def test_the_loss_of_separate_devices_would_differ():
    whole = cosent_loss(*sides(), scores=scores())[0]
    halves = [
        cosent_loss(*(side[half] for side in sides()), scores=scores()[half])[0]
        for half in (slice(12), slice(12, None))
    ]
    assert abs(sum(halves) / 2 - whole) > 0.1


def test_only_the_order_of_scores_matters():
    found = cosent_loss(*sides(), scores=scores())
    np.testing.assert_allclose(found, cosent_loss(*sides(), scores=scores() ** 3 - 7), rtol=1e-12)
    assert relative_error(cosent_loss(*sides(), scores=-scores()), found) > 0.05


def test_similarities_in_the_order_of_the_scores_are_nearly_without_loss():
    queries, ratings = jnp.ones((5, 1)), jnp.arange(5.0)
    assert cosent_loss(queries, ratings[:, None], scores=ratings)[0] < 1e-7
    assert cosent_loss(queries, -ratings[:, None], scores=ratings)[0] > 50


@pytest.mark.parametrize("valid", [True, False])
def test_a_batch_with_equal_scores_has_no_loss_and_a_finite_gradient(valid):
    def total(queries, keys):
        masks = Masks(valid=jnp.full(ROWS, valid))
        return cosent_loss(queries, keys, scores=jnp.full(ROWS, 3.0), masks=masks).sum()

    loss, gradients = jax.value_and_grad(total, (0, 1))(*sides())
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients)


def test_invalid_rows_may_hold_anything():
    valid = jnp.arange(ROWS) % 3 != 1
    queries, keys = sides()
    damaged = jnp.where(valid[:, None], queries, jnp.nan)

    def total(queries, ratings):
        masks = Masks(valid=valid)
        return cosent_loss(queries, keys, scores=ratings, masks=masks).sum()

    kept = np.asarray(valid)
    wanted = dense_loss(*(np.asarray(one)[kept] for one in (queries, keys, scores())), 0.05)
    for ratings in (scores(), jnp.where(valid, scores(), jnp.nan), jnp.where(valid, scores(), 9)):
        loss, gradient = jax.value_and_grad(total)(damaged, ratings)
        assert float(loss) == pytest.approx(kept.sum() * wanted, rel=1e-12)
        assert np.isfinite(gradient[valid]).all()


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_narrow_embeddings_have_nearly_the_same_loss(dtype, bound):
    queries, keys, ratings = unit_vectors(0, 256, 64), unit_vectors(1, 256, 64), scores(256)
    wanted = cosent_loss(queries, keys, scores=ratings)
    found = cosent_loss(queries.astype(dtype), keys.astype(dtype), scores=ratings)
    assert relative_error(found, wanted) < bound


@pytest.mark.usefixtures("unchecked_annotations")
def test_scores_of_another_shape_and_masks_of_pairs_are_errors():
    with pytest.raises(ValueError, match=r"scores have the shape \(3,\), not \(24,\)"):
        cosent_loss(*sides(), scores=jnp.ones(3))
    for masks in (Masks(ids=jnp.arange(ROWS)), Masks(margin=0.1)):
        with pytest.raises(ValueError, match=r"only masks\.valid is allowed"):
            cosent_loss(*sides(), scores=scores(), masks=masks)
