from math import exp, log

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.losses import ExplicitNegatives, Masks, distillation_loss, margin_mse_loss
from tests.helpers import unit_vectors

pytestmark = pytest.mark.usefixtures("x64")


def softmax(*scores):
    return np.exp(scores) / sum(map(exp, scores))


def test_two_candidates_by_hand():
    queries, keys = jnp.array([[1.0, 0.0]]), jnp.array([[0.6, 0.8]])
    negatives = jnp.array([[[0.0, 1.0], [0.8, 0.6]]])
    loss = distillation_loss(
        queries,
        keys,
        negatives={"explicit": ExplicitNegatives(negatives)},
        teacher_scores=jnp.array([[3.0, 1.0, 2.0]]),
        temperature=0.5,
        teacher_temperature=2.0,
    )
    wanted, found = softmax(1.5, 0.5, 1.0), softmax(1.2, 0.0, 1.6)
    np.testing.assert_allclose(loss, [(wanted * np.log(wanted / found)).sum()], rtol=1e-12)


def test_absent_negatives_of_a_row_are_not_read():
    sides = unit_vectors(0, 3, 4), unit_vectors(1, 3, 4)
    negatives, scores = unit_vectors(2, 3, 4, 4), jnp.arange(15.0).reshape(3, 5)
    valid = jnp.arange(4) < jnp.array([[4], [2], [0]])

    def loss(negatives, scores):
        explicit = {"explicit": ExplicitNegatives(negatives, valid=valid)}
        return distillation_loss(*sides, negatives=explicit, teacher_scores=scores)

    found = loss(negatives, scores)
    nowhere = jnp.concatenate([jnp.ones((3, 1), bool), valid], 1)
    other = loss(jnp.where(valid[..., None], negatives, 7.0), jnp.where(nowhere, scores, jnp.nan))
    np.testing.assert_allclose(found, other, rtol=1e-12)
    shorter = distillation_loss(
        *(side[1:2] for side in sides),
        negatives={"explicit": ExplicitNegatives(negatives[1:2, :2])},
        teacher_scores=scores[1:2, :3],
    )
    np.testing.assert_allclose(found[1], shorter[0], rtol=1e-12)
    assert found[2] == 0  # only its key, so no disagreement is possible
    gradient = jax.grad(lambda negatives: loss(negatives, scores).sum())(negatives)
    assert np.isfinite(gradient).all()
    assert not gradient[~valid].any()


def test_a_student_that_equals_its_teacher_has_no_gradient():
    sides = unit_vectors(0, 5, 8), unit_vectors(1, 5, 8)
    negatives = unit_vectors(2, 5, 3, 8)
    scores = jnp.concatenate(
        [jnp.einsum("qd,qd->q", *sides)[:, None], jnp.einsum("qd,qnd->qn", sides[0], negatives)], 1
    )
    same = {
        "negatives": {"explicit": ExplicitNegatives(negatives)},
        "teacher_scores": scores / 0.05,
    }
    loss, gradient = jax.value_and_grad(lambda q: distillation_loss(q, sides[1], **same).sum())(
        sides[0]
    )
    np.testing.assert_allclose(loss, 0, atol=1e-12)
    np.testing.assert_allclose(gradient, 0, atol=1e-10)
    wrong = same | {"teacher_scores": scores[:, ::-1] / 0.05}
    assert (distillation_loss(*sides, **wrong) > 0.1).all()


def test_a_teacher_gets_no_gradient():
    sides = unit_vectors(0, 3, 4), unit_vectors(1, 3, 4)

    def loss(scores):
        negatives = {"explicit": ExplicitNegatives(unit_vectors(2, 3, 1, 4))}
        return distillation_loss(*sides, negatives=negatives, teacher_scores=scores).sum()

    assert not jax.grad(loss)(jnp.arange(6.0).reshape(3, 2)).any()


def test_padding_and_a_single_candidate_have_no_loss():
    sides = unit_vectors(0, 3, 4), unit_vectors(1, 3, 4)
    negatives = unit_vectors(2, 3, 1, 4)
    loss = distillation_loss(
        *sides,
        negatives={"explicit": ExplicitNegatives(negatives)},
        teacher_scores=jnp.array([[log(3.0), 0.0]] * 3),
        masks=Masks(valid=jnp.array([True, False, True])),
    )
    assert loss[1] == 0
    assert (loss[::2] > 0).all()
    assert distillation_loss(*sides, teacher_scores=jnp.ones((3, 1))).tolist() == [0, 0, 0]


def test_scores_that_do_not_fit_are_named():
    sides = unit_vectors(0, 3, 4), unit_vectors(1, 3, 4)
    with pytest.raises(ValueError, match=r"teacher_scores have the shape \(3, 3\), not"):
        distillation_loss(*sides, teacher_scores=jnp.ones((3, 3)))


def test_masks_and_negatives_that_a_teacher_does_not_score_are_errors():
    sides, scores = (unit_vectors(0, 3, 4), unit_vectors(1, 3, 4)), jnp.ones((3, 1))
    with pytest.raises(ValueError, match=r"only masks\.valid is allowed"):
        distillation_loss(*sides, teacher_scores=scores, masks=Masks(ids=jnp.arange(3)))
    bank = {"bank": ExplicitNegatives(unit_vectors(2, 3, 1, 4))}
    with pytest.raises(ValueError, match=r"negatives has \['bank'\]; only 'explicit' is allowed"):
        distillation_loss(*sides, teacher_scores=scores, negatives=bank)


def test_margins_by_hand():
    queries, keys = jnp.array([[1.0, 0.0]]), jnp.array([[0.6, 0.8]])
    negatives = jnp.array([[[0.0, 1.0], [0.8, 0.6]]])
    loss = margin_mse_loss(
        queries,
        keys,
        negatives={"explicit": ExplicitNegatives(negatives)},
        teacher_scores=jnp.array([[3.0, 1.0, 2.0]]),
        temperature=0.5,
        teacher_temperature=2.0,
    )
    margins = (0.6 - 0.0) / 0.5, (0.6 - 0.8) / 0.5
    wanted = ((margins[0] - (3 - 1) / 2) ** 2 + (margins[1] - (3 - 2) / 2) ** 2) / 2
    np.testing.assert_allclose(loss, [wanted], rtol=1e-12)


def test_margins_of_invalid_negatives_are_not_read():
    sides = unit_vectors(0, 3, 4), unit_vectors(1, 3, 4)
    negatives, scores = unit_vectors(2, 3, 4, 4), jnp.arange(15.0).reshape(3, 5)
    valid = jnp.arange(4) < jnp.array([[4], [2], [0]])

    def loss(negatives, scores):
        explicit = {"explicit": ExplicitNegatives(negatives, valid=valid)}
        return margin_mse_loss(*sides, negatives=explicit, teacher_scores=scores)

    found = loss(negatives, scores)
    scored = jnp.concatenate([jnp.ones((3, 1), bool), valid], 1)
    other = loss(jnp.where(valid[..., None], negatives, 7.0), jnp.where(scored, scores, jnp.nan))
    np.testing.assert_allclose(found, other, rtol=1e-12)
    shorter = margin_mse_loss(
        *(side[1:2] for side in sides),
        negatives={"explicit": ExplicitNegatives(negatives[1:2, :2])},
        teacher_scores=scores[1:2, :3],
    )
    np.testing.assert_allclose(found[1], shorter[0], rtol=1e-12)
    assert found[2] == 0  # a row without negatives
    gradient = jax.grad(lambda negatives: loss(negatives, scores).sum())(negatives)
    assert np.isfinite(gradient).all()
    assert not gradient[~valid].any()
    assert gradient[valid].any()


def test_a_teacher_s_scores_may_be_shifted_without_a_change_of_margins():
    sides, explicit = (unit_vectors(0, 3, 4), unit_vectors(1, 3, 4)), unit_vectors(2, 3, 2, 4)
    given = {"negatives": {"explicit": ExplicitNegatives(explicit)}}
    scores = jnp.arange(9.0).reshape(3, 3) ** 2
    found = margin_mse_loss(*sides, teacher_scores=scores, **given)
    shifted = margin_mse_loss(*sides, teacher_scores=scores - 5, **given)
    np.testing.assert_allclose(found, shifted, rtol=1e-12)
    with pytest.raises(ValueError, match=r"teacher_scores have the shape \(3, 2\), not"):
        margin_mse_loss(*sides, teacher_scores=scores[:, :2], **given)
