import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.models.pretrained.modules import POOLING_MODES
from jaxcl.models.pretrained.pooling import pool_states, without_prompt
from tests.helpers import relative_error
from tests.models.pretrained.reference_models import REFERENCE, read_values

STATES = jnp.array([[[1.0, -2.0], [3.0, 4.0], [2.0, 0.0], [100.0, 100.0]]])
MASK = jnp.array([[True, True, True, False]])


@pytest.mark.parametrize(
    ("mode", "vector"),
    [
        ("cls", [1, -2]),
        ("max", [3, 4]),
        ("mean", [(1 + 3 + 2) / 3, (-2 + 4 + 0) / 3]),
        ("mean_sqrt_len_tokens", [(1 + 3 + 2) / 3**0.5, (-2 + 4 + 0) / 3**0.5]),
        ("weightedmean", [(1 * 1 + 2 * 3 + 3 * 2) / (1 + 2 + 3), (1 * -2 + 2 * 4 + 3 * 0) / 6]),
        ("lasttoken", [2, 0]),
    ],
)
def test_each_mode_matches_a_hand_computed_vector(mode, vector):
    np.testing.assert_allclose(pool_states(STATES, MASK, modes=(mode,)), [vector], rtol=1e-6)


def test_excluding_the_prompt_does_not_shift_the_weights_of_the_weighted_mean():
    mask = without_prompt(MASK, jnp.array([1]))
    vectors = pool_states(STATES, mask, modes=("weightedmean",))
    np.testing.assert_allclose(vectors, [[(2 * 3 + 3 * 2) / (2 + 3), (2 * 4 + 0) / 5]], rtol=1e-6)


def test_modes_are_concatenated_in_the_order_given():
    vectors = pool_states(STATES, MASK, modes=("lasttoken", "cls"))
    assert vectors.tolist() == [[2, 0, 1, -2]]


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_pooled_vectors_match_sentence_transformers(mode):
    values = read_values("bert")
    length = values["length"][:, None]
    mask = np.arange(values["tokens"].shape[1]) < length
    with np.load(REFERENCE / "pooling.npz") as stored:
        whole, rest = stored[mode], stored[f"{mode} without prompt"]
    states = jnp.asarray(values["last"])
    pooled = pool_states(states, jnp.asarray(mask), modes=(mode,))
    assert relative_error(pooled, whole) < 1e-5
    mask = without_prompt(jnp.asarray(mask), jnp.full(len(mask), 3))
    pooled = pool_states(states, mask, modes=(mode,))
    assert relative_error(pooled, rest) < 1e-5
    # The largest values and the last token may come after the prompt.
    assert relative_error(whole, rest) > 1e-2 or mode in ("lasttoken", "max")


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_a_text_without_tokens_gives_zeros_with_a_finite_gradient(mode):
    def total(states):
        return pool_states(states, jnp.zeros((1, 4), bool), modes=(mode,)).sum()

    value, gradient = jax.value_and_grad(total)(STATES)
    assert value == 0
    assert (gradient == 0).all()


def test_pooling_sums_in_float32():
    states = jnp.full((1, 3_000, 2), 100.0, jnp.float16)  # the sum overflows float16
    mean = pool_states(states, jnp.ones((1, 3_000), bool), modes=("mean",))
    assert mean.dtype == jnp.float32
    assert mean.tolist() == [[100.0, 100.0]]


def test_an_unknown_mode_lists_the_known_ones():
    with pytest.raises(ValueError, match="pooling='first' is unknown; use one of cls, max"):
        pool_states(STATES, MASK, modes=("first",))
