"""Attention of all transformers: its values, gradients, and what its backward pass keeps."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.models.attention import attend
from tests.helpers import relative_error, relative_errors

B, T, HEADS, WIDTH = 3, 5, 6, 4
EMPTY = 2
"""The row whose queries see no key."""

MASKS = {
    "all": np.ones((B, 1, 1, T), bool),
    "lengths": (np.arange(T) < np.array([T, 2, 0])[:, None])[:, None, None],
    "causal": np.tri(T, dtype=bool)[None, None] & np.ones((B, 1, 1, 1), bool),
}


def arguments(*, groups=HEADS, dtype=np.float64):
    rng = np.random.default_rng(0)
    sizes = [(B, T, HEADS, WIDTH), (B, T, groups, WIDTH), (B, T, groups, WIDTH), (1, HEADS, T, T)]
    return [jnp.asarray(rng.normal(size=size), dtype) for size in sizes]


def by_einsum(queries, keys, values, bias, seen, *, scale=WIDTH**-0.5):
    """The textbook form, with a copy of keys and values for each head."""
    copies = HEADS // keys.shape[2]
    keys, values = (jnp.repeat(side, copies, axis=2) for side in (keys, values))
    scores = scale * jnp.einsum("bqnc,bknc->bnqk", queries, keys) + bias
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(scores.dtype).min))
    return jnp.einsum("bnqk,bknc->bqnc", weights, values)


def values_and_gradients(function, given, seen, **options):
    def total(*given):
        mixed = function(*given, seen, **options)
        return (mixed * jnp.cos(jnp.arange(mixed.size)).reshape(mixed.shape)).sum()

    # Queries that see nothing are padding, whose outputs have no effect.
    outputs = function(*given, seen, **options)
    return outputs, jax.grad(total, range(4))(*given)


@pytest.mark.parametrize(
    ("groups", "mask", "scale"),
    [*itertools.product((1, 2, HEADS), ("all", "causal"), (None, 0.3)), (2, "lengths", None)],
)
def test_values_and_gradients_are_those_of_the_textbook_form(groups, mask, scale, x64):
    given, seen = arguments(groups=groups), jnp.asarray(MASKS[mask])
    if mask == "lengths":
        given, seen = [one[:EMPTY] for one in given[:3]] + given[3:], seen[:EMPTY]
    options = {} if scale is None else {"scale": scale}
    wanted = values_and_gradients(by_einsum, given, seen, **options)
    found = values_and_gradients(attend, given, seen, **options)
    assert max(relative_errors(found, wanted).values()) < 1e-12
    other = values_and_gradients(attend, given, seen, scale=0.31)
    assert relative_error(other[0], wanted[0]) > 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrow_types_agree_with_jax_s_attention(dtype):
    queries, keys, values, bias = arguments(groups=2, dtype=dtype)
    seen = jnp.asarray(MASKS["lengths"])
    wanted = jax.nn.dot_product_attention(queries, keys, values, bias, seen)
    found = attend(queries, keys, values, bias, seen)
    assert found.dtype == dtype
    assert relative_error(found[:EMPTY], wanted[:EMPTY]) < {"float32": 1e-6}.get(dtype, 1e-2)


def test_a_query_without_keys_gets_the_mean_of_all_values(x64):
    given = arguments()
    outputs, gradients = values_and_gradients(attend, given, jnp.asarray(MASKS["lengths"]))
    mean = given[2][EMPTY].mean(0)
    assert relative_error(outputs[EMPTY], np.broadcast_to(mean, outputs[EMPTY].shape)) < 1e-12
    assert all(np.isfinite(leaf).all() for leaf in gradients)


def test_the_backward_pass_keeps_one_matrix_per_head():
    given = arguments(dtype=np.float32)

    def kept(function):
        _, pull_back = jax.vjp(lambda *given: function(*given, jnp.asarray(MASKS["all"])), *given)
        matrices = [leaf for leaf in jax.tree.leaves(pull_back) if leaf.shape == (B, HEADS, T, T)]
        return sum(leaf.dtype == np.float32 and np.ptp(leaf) > 0 for leaf in matrices)

    assert kept(attend) == 1
    assert kept(by_einsum) > 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16])
def test_no_mask_is_a_mask_of_all_keys(dtype, x64):
    given, seen = arguments(dtype=dtype), jnp.asarray(MASKS["all"])
    wanted = values_and_gradients(attend, given, seen)
    found = values_and_gradients(attend, given, None)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_there_may_be_fewer_queries_than_keys(x64):
    queries, keys, values, bias = arguments(groups=2)
    seen = jnp.asarray(MASKS["lengths"])[:EMPTY]
    given = [one[:EMPTY] for one in (queries, keys, values)] + [bias]
    wanted = by_einsum(*given, seen)
    few = attend(given[0][:, 1:3], *given[1:3], bias[:, :, 1:3], seen)
    assert relative_error(few, wanted[:, 1:3]) < 1e-12
