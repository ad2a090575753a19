import jax
import jax.numpy as jnp
import pytest

from jaxcl.negatives import batch_labels, similarity_ceilings


def test_rows_are_distinct_unless_ids_are_equal():
    assert batch_labels(3).different[0].tolist() == [0, 1, 2]
    ids, groups = jnp.array([7, 8, 7]), jnp.array([1, 1, 2])
    labels = batch_labels(3, ids=ids, groups=groups)
    assert [label.tolist() for label in labels.different] == [[7, 8, 7], [1, 1, 2]]


def test_ceilings_by_difference_and_by_share():
    positives = jnp.array([0.8, -0.5])
    assert similarity_ceilings(positives) is None
    assert similarity_ceilings(positives, margin=0.1) == pytest.approx([0.7, -0.6])
    assert similarity_ceilings(positives, relative_margin=0.1) == pytest.approx([0.72, -0.55])


def test_ceilings_have_no_gradient():
    gradient = jax.grad(lambda x: similarity_ceilings(x, margin=0.1).sum())(jnp.ones(2))
    assert gradient.tolist() == [0.0, 0.0]


def test_two_margins_are_an_error():
    with pytest.raises(ValueError, match="choose one"):
        similarity_ceilings(jnp.ones(1), margin=0.1, relative_margin=0.1)
