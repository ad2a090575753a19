import jax.numpy as jnp

from jaxcl.negatives import different_label_mask


def test_only_pairs_of_different_labels_may_be_negatives():
    mask = different_label_mask(jnp.array([0, 1, 1]), jnp.array([1, 0]))
    assert mask.tolist() == [[True, False], [False, True], [False, True]]
