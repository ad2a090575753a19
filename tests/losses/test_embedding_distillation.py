import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.losses import Masks, embedding_distillation_loss
from tests.helpers import unit_vectors

pytestmark = pytest.mark.usefixtures("x64")


def sides():
    return unit_vectors(0, 3, 4), unit_vectors(1, 3, 4)


def test_one_row_by_hand():
    queries, keys = jnp.array([[1.0, 0.0]]), jnp.array([[0.6, 0.8]])
    teacher = {"query": jnp.array([[2.0, 2.0]]), "key": jnp.array([[0.0, -3.0]])}
    loss = embedding_distillation_loss(queries, keys, teacher_vectors=teacher)
    np.testing.assert_allclose(loss, [1 - (0.5**0.5 + -0.8) / 2], rtol=1e-9)


def test_a_model_with_the_teacher_s_directions_has_no_loss_and_no_gradient():
    def loss(queries, keys):
        teacher = {"query": 3 * sides()[0], "key": 0.1 * sides()[1]}
        return embedding_distillation_loss(queries, keys, teacher_vectors=teacher).sum()

    value, gradients = jax.value_and_grad(loss, (0, 1))(*sides())
    np.testing.assert_allclose(value, 0, atol=1e-9)
    for gradient in gradients:
        np.testing.assert_allclose(gradient, 0, atol=1e-9)


def test_a_wider_teacher_is_truncated_if_asked():
    wide = {"query": unit_vectors(2, 3, 6), "key": unit_vectors(3, 3, 6)}
    short = {side: vectors[:, :4] for side, vectors in wide.items()}
    found = embedding_distillation_loss(*sides(), teacher_vectors=wide, truncate_teacher=True)
    wanted = embedding_distillation_loss(*sides(), teacher_vectors=short)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    with pytest.raises(ValueError, match=r"\['query'\] have the shape \(3, 6\), .* truncate_teac"):
        embedding_distillation_loss(*sides(), teacher_vectors=wide)
    narrow = {side: vectors[:, :3] for side, vectors in wide.items()}
    for truncate in (False, True):
        with pytest.raises(ValueError, match=r"\['query'\] have the shape \(3, 3\), and the model"):
            embedding_distillation_loss(*sides(), teacher_vectors=narrow, truncate_teacher=truncate)


def test_masks_that_compare_rows_are_errors():
    teacher = dict(zip(("query", "key"), sides(), strict=True))
    with pytest.raises(ValueError, match=r"only masks\.valid is allowed"):
        embedding_distillation_loss(
            *sides(), teacher_vectors=teacher, masks=Masks(ids=jnp.arange(3))
        )
