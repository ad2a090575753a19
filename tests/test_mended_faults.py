"""Faults that users found in the library, each as a test of the correct outcome."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl import assignment, negatives
from jaxcl.data.row_negatives import read_negatives
from jaxcl.data.sources import InMemoryPairs
from jaxcl.data.tokenizer import train_tokenizer
from jaxcl.evaluation.retrieval import reciprocal_rank_fusion
from jaxcl.grad_cache import chunked
from jaxcl.losses import (
    ExplicitNegatives,
    Masks,
    decoupled_infonce_loss,
    hard_infonce_loss,
    infonce_loss,
    matryoshka,
    running_estimate_loss,
)
from jaxcl.metrics import mid_ranks, paired_difference
from jaxcl.negatives import OwnNegatives
from jaxcl.ops.nearest import nearest
from jaxcl.ops.pairs import PairLabels
from tests.helpers import relative_error, unit_vectors

# The checks of the test suite would refuse some inputs before the library sees them.
pytestmark = pytest.mark.usefixtures("unchecked_annotations")

LONGEST_TOKEN = 256  # characters, far above any word

nested_infonce = matryoshka(infonce_loss, dims=(4, 8))


def sides(rows: int, dim: int = 8):
    return tuple(unit_vectors(seed, rows, dim, dtype=jnp.float32) for seed in (0, 1))


# Integer scores


def test_ranks_of_unsigned_scores_are_those_of_the_same_floats():
    scores = np.array([[0, 1, 5, 3]], np.uint8)
    assert mid_ranks(scores).tolist() == [[4, 3, 1, 2]]


def test_fusion_of_unsigned_scores_puts_the_greatest_first():
    fused = reciprocal_rank_fusion([np.array([[0, 1, 5, 3]], np.uint8)], k=1)
    np.testing.assert_allclose(fused, [[1 / (1 + rank) for rank in (4, 3, 1, 2)]])


def test_a_difference_of_unsigned_values_may_be_negative():
    values, baseline = np.array([0, 1], np.uint8), np.array([1, 1], np.uint8)
    assert paired_difference(values, baseline)[0] == (-1 + 0) / 2


# Labels that int32 cannot hold


def test_groups_beyond_int32_are_refused():
    with pytest.raises(ValueError, match="int32"):
        InMemoryPairs(["a", "b"], ["c", "d"], groups=np.array([2**40, 2**41]))


def test_groups_that_are_not_integers_are_refused():
    with pytest.raises((TypeError, ValueError), match="group"):
        InMemoryPairs(["a", "b"], ["c", "d"], groups=[0.2, 0.9])


LARGE_IDS = np.array([1, 2**31 + 1, 2**32 + 1, 2**33 + 1, 5, 6])


def test_ids_beyond_int32_are_refused_by_losses():
    with pytest.raises(ValueError, match="int32"):
        infonce_loss(*sides(6), masks=Masks(ids=LARGE_IDS))


def test_labels_beyond_int32_are_refused_by_the_search():
    labels = PairLabels(different=(LARGE_IDS,))
    with pytest.raises(ValueError, match="int32"):
        nearest(*sides(6), count=6, query_labels=labels, table_labels=labels)


# Half precision


def test_a_zero_row_in_float16_leaves_the_nested_loss_finite():
    queries, keys = (side.astype(jnp.float16) for side in sides(12))
    assert np.isfinite(nested_infonce(queries.at[0].set(0), keys)).all()


# Global settings and contexts of JAX


@pytest.mark.parametrize("name", ["assign", "assign_topics"])
def test_rows_are_assigned_with_64_bit_types_enabled(name):
    rows = np.asarray(sides(12)[0])
    with jax.enable_x64(True):
        if name == "assign":
            assert sorted(assignment.assign(rows, rows, block_size=4).tolist()) == list(range(12))
        else:
            topics = assignment.assign_topics(rows, rows, num_topics=3)
            assert np.bincount(topics).tolist() == [4, 4, 4]


def found_nearest(queries, keys):
    return nearest(queries, keys, count=2).similarities


def mined(queries, keys):
    labels = PairLabels(different=(jnp.arange(len(keys)),))
    return negatives.mine_negatives(
        queries,
        keys,
        keys,
        rule=negatives.MiningRule(1, (0, 2), sampling="top"),
        row_keys=jax.random.split(jax.random.key(0), len(keys)),
        query_labels=labels,
        table_labels=labels,
    ).rows


def drawn(queries, keys):
    budgets = negatives.TierBudgets(mixed=2, hardest=2)
    row_keys = jax.random.split(jax.random.key(0), len(keys))
    tiers = negatives.draw_tiers(
        budgets, queries, keys, row_keys=row_keys, ids=jnp.arange(len(keys))
    )
    return jax.tree.leaves(tiers)[0]


def assigned(queries, keys):
    return assignment.assign(np.asarray(queries), np.asarray(keys), block_size=2)


@pytest.mark.parametrize(
    "function",
    [
        *(infonce_loss, decoupled_infonce_loss, hard_infonce_loss, nested_infonce),
        *(found_nearest, mined, drawn, assigned),
    ],
)
def test_implicit_rank_promotion_may_be_an_error(function):
    queries, keys = sides(6)
    with jax.numpy_rank_promotion("raise"):  # before a program is compiled
        found = function(queries, keys)
    np.testing.assert_array_equal(found, function(queries, keys))


def nothing_explicit(queries, keys):
    none = ExplicitNegatives(keys[:, None], valid=jnp.zeros((len(keys), 1), bool))
    masks = Masks(groups=jnp.zeros(len(keys), int))
    return infonce_loss(queries, keys, masks=masks, negatives={"explicit": none}).sum()


def nothing_in_a_tier(queries, keys):
    tier = OwnNegatives(keys[:, None], valid=jnp.zeros((len(keys), 1), bool))
    masks = Masks(groups=jnp.zeros(len(keys), int))
    return infonce_loss(queries, keys, masks=masks, negatives={"nearest": tier}).sum()


def nothing_below_the_margin(queries, keys):
    explicit = {"explicit": ExplicitNegatives(keys[:, None])}
    return infonce_loss(queries, keys, masks=Masks(margin=10.0), negatives=explicit).sum()


@pytest.mark.parametrize("loss", [nothing_explicit, nothing_in_a_tier, nothing_below_the_margin])
def test_rows_without_negatives_pass_through_no_nan(loss):
    queries, keys = sides(4)
    with jax.debug_nans(True):
        value, gradient = jax.value_and_grad(loss)(queries, keys)
    assert value == 0
    assert not gradient.any()


def test_rows_are_assigned_within_the_mesh_of_another_program():
    rows = np.asarray(sides(12)[0])
    mesh = jax.make_mesh((6,), ("data",), devices=jax.devices()[:6])
    with jax.set_mesh(mesh):
        assert sorted(assignment.assign(rows, rows, block_size=4).tolist()) == list(range(12))


@pytest.mark.usefixtures("x64")
def test_tiles_have_the_second_derivative_of_the_whole_block():
    queries, keys = (unit_vectors(seed, 5, 8) for seed in (0, 1))

    def second(implementation):
        loss_fn = functools.partial(infonce_loss, implementation=implementation)
        gradient = jax.grad(lambda side: loss_fn(side, keys).mean())
        return jax.jvp(gradient, (queries,), (keys,))[1]

    assert relative_error(second("tiled"), second("reference")) < 1e-10


# Long words


def test_the_tokenizer_learns_from_short_pieces_of_a_very_long_word():
    word = "acgt" * 500
    tokenizer = train_tokenizer(["some words", word], vocabulary_size=500)
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(word)]
    assert max(map(len, pieces)) <= LONGEST_TOKEN  # training takes quadratic time
    assert max(map(len, tokenizer.get_vocab())) <= LONGEST_TOKEN


# Nested losses


def cut(vectors, dim):
    part = vectors[..., :dim]
    return part / jnp.linalg.norm(part, axis=-1, keepdims=True)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["explicit", "tier"])
def test_a_nested_loss_cuts_negatives_as_it_cuts_rows(kind):
    queries, keys, others = (unit_vectors(seed, 4, 8) for seed in (0, 1, 2))

    def further(vectors):
        if kind == "explicit":
            return {"negatives": {"explicit": ExplicitNegatives(vectors[:, None])}}
        return {"negatives": {"bank": negatives.SharedNegatives(vectors)}}

    found = nested_infonce(queries, keys, **further(others))
    wanted = sum(
        infonce_loss(cut(queries, dim), cut(keys, dim), **further(cut(others, dim)))
        for dim in (4, 8)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_a_loss_that_returns_estimates_cannot_be_nested():
    nested_estimate = matryoshka(running_estimate_loss, dims=(4, 8))
    with pytest.raises(ValueError, match="running_estimate_loss"):
        nested_estimate(*sides(4), estimates=jnp.full((4, 2), -jnp.inf))


# Small inputs


@pytest.mark.parametrize("temperature", [-0.1, 0.0])
def test_temperatures_that_are_not_positive_are_refused(temperature):
    with pytest.raises(ValueError, match="temperature"):
        infonce_loss(*sides(4), temperature=temperature)


def test_filled_up_rows_do_not_write_to_the_bank():
    rows, groups = jnp.array([-1, 0]), jnp.zeros(2, int)
    bank = negatives.update_instances(negatives.init_bank(4, 8), sides(2)[0], rows, groups)
    assert np.flatnonzero(np.asarray(bank.written) >= 0).tolist() == [0]


def sourced_rows(sources):
    return assignment.SourcedRows(sources, batch_size=2, seed=0)


def test_a_step_may_be_a_numpy_integer():
    rows_of = sourced_rows(np.array([0, 1]))
    np.testing.assert_array_equal(rows_of(np.int64(5)), rows_of(5))


def test_sources_may_be_a_list():
    np.testing.assert_array_equal(sourced_rows([0, 1])(0), sourced_rows(np.array([0, 1]))(0))


def test_a_step_below_0_is_refused():
    with pytest.raises(ValueError, match="step"):
        assignment.uniform_rows(-1, num_rows=6, batch_size=2, seed=0)


def test_embeddings_may_have_another_byte_order():
    queries, keys = sides(4)
    swapped = (np.asarray(side).astype(">f4") for side in (queries, keys))
    np.testing.assert_array_equal(infonce_loss(*swapped), infonce_loss(queries, keys))


def test_embeddings_that_are_lists_are_refused_by_name():
    with pytest.raises((TypeError, ValueError), match="queries"):
        infonce_loss(*(side.tolist() for side in sides(4)))


def test_an_empty_table_has_no_nearest_rows():
    assert nearest(sides(4)[0], jnp.zeros((0, 8)), count=1).rows.tolist() == [[-1]] * 4


def test_no_query_finds_nothing():
    assert nearest(jnp.zeros((0, 8)), sides(4)[0], count=1).rows.shape == (0, 1)


def test_a_loss_of_no_rows_is_empty():
    assert infonce_loss(jnp.zeros((0, 8)), jnp.zeros((0, 8))).shape == (0,)


def test_no_rows_make_no_chunk():
    encode = chunked(lambda params, rows: params * rows, chunk_size=2)
    assert encode(1.0, jnp.zeros((0, 8))).shape == (0, 8)


# Files


def test_teacher_scores_that_are_not_finite_are_refused_when_they_are_read(tmp_path):
    scores = np.full((4, 3), np.nan)
    np.savez(tmp_path / "file.npz", rows=np.zeros((4, 2), int), teacher_scores=scores)
    with pytest.raises(ValueError, match="teacher_scores"):
        read_negatives(tmp_path / "file.npz", num_rows=4, scored=True)
