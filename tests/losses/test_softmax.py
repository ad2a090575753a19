from math import exp, log, log1p

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.losses import (
    ExplicitNegatives,
    Masks,
    decoupled_infonce_loss,
    hard_infonce_loss,
    infonce_loss,
)
from jaxcl.negatives.memory_bank import init_bank, read_bank
from tests.helpers import loss_arguments, unit_vectors

pytestmark = pytest.mark.usefixtures("x64")

QUERIES = np.array([[1.0, 0.0], [0.6, 0.8]])
KEYS = np.array([[1.0, 0.0], [0.0, 1.0]])
# At temperature 1: queries with keys [[1, 0], [.6, .8]], queries with each other .6, keys 0.


def infonce(**options):
    sides = jnp.asarray(QUERIES), jnp.asarray(KEYS)
    return infonce_loss(*sides, temperature=1.0, **loss_arguments(**options))


def explicit(vectors, **columns):
    return {"explicit": ExplicitNegatives(vectors, **columns)}


def bank_of(bank):
    return {"bank": read_bank(bank)}


def cross_entropy(positive, *negatives):
    return -log(exp(positive) / (exp(positive) + sum(map(exp, negatives))))


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("direction", "negatives"),
    [
        ("query_to_key", (0, 0.6)),
        ("key_to_query", (0.6, 0)),
        ("query_to_query", (0.6, 0.6)),
        ("key_to_key", (0, 0)),
    ],
)
def test_each_direction_by_hand(direction, negatives):
    wanted = [cross_entropy(1, negatives[0]), cross_entropy(0.8, negatives[1])]
    np.testing.assert_allclose(infonce(directions=(direction,)), wanted, rtol=1e-12)


def test_several_directions_are_a_mean_of_softmaxes_or_one_softmax():
    both = ("query_to_key", "key_to_query")
    separate = [
        (cross_entropy(1, 0) + cross_entropy(1, 0.6)) / 2,
        (cross_entropy(0.8, 0.6) + cross_entropy(0.8, 0)) / 2,
    ]
    np.testing.assert_allclose(infonce(directions=both), separate, rtol=1e-12)
    joint = [cross_entropy(1, 1, 0, 0.6), cross_entropy(0.8, 0.8, 0.6, 0)]
    np.testing.assert_allclose(infonce(directions=both, partition="joint"), joint, rtol=1e-12)


def test_hardness_adds_to_the_scores_of_negatives_alone():
    loss = infonce(directions=("query_to_key",), hardness=2.0)
    wanted = [cross_entropy(1, 0), cross_entropy(0.8, 0.6 + 2 * 0.6)]
    np.testing.assert_allclose(loss, wanted, rtol=1e-12)


def test_a_margin_excludes_negatives_as_similar_as_the_positive():
    # Query 1: its positive .8, its negative .6.
    one_way = {"directions": ("query_to_key",)}
    kept, dropped = cross_entropy(0.8, 0.6), 0.0
    for options, wanted in (
        ({"margin": 0.1}, kept),
        ({"margin": 0.3}, dropped),
        ({"relative_margin": 0.2}, kept),
        ({"relative_margin": 0.3}, dropped),
    ):
        loss = infonce(**one_way, **options)
        np.testing.assert_allclose(loss[1], wanted, rtol=1e-12, err_msg=str(options))
        np.testing.assert_allclose(loss[0], cross_entropy(1, 0), rtol=1e-12)


def test_a_guide_decides_instead_of_the_model():
    guides = jnp.eye(2), jnp.array([[1.0, 0.0], [2.0, 1.0]])  # [[1, 2], [0, 1]]
    loss = infonce(directions=("query_to_key",), margin=0.0, guides=guides)
    np.testing.assert_allclose(loss, [0, cross_entropy(0.8, 0.6)], rtol=1e-12)


def test_explicit_negatives_are_negatives_of_every_query():
    negatives = jnp.array([[[0.0, 1.0], [1.0, 0.0]], [[0.0, -1.0], [0.0, 0.0]]])
    valid = jnp.array([[True, True], [True, False]])  # ragged: row 1 has one
    loss = infonce(directions=("query_to_key",), negatives=explicit(negatives, valid=valid))
    wanted = [cross_entropy(1, 0, 0, 1, 0), cross_entropy(0.8, 0.6, 0.8, 0.6, -0.8)]
    np.testing.assert_allclose(loss, wanted, rtol=1e-12)


def test_hardness_tells_own_explicit_negatives_from_those_of_other_rows():
    negatives = jnp.array([[[0.6, 0.8]], [[0.8, 0.6]]])
    # Queries with the negatives: [[.6, .8], [1, .96]]; with the other key: 0 and .6.
    one_way = {"directions": ("query_to_key",), "negatives": explicit(negatives)}
    loss = infonce(**one_way, hardness=2.0)
    wanted = [cross_entropy(1, 0, 0.6, 3 * 0.8), cross_entropy(0.8, 3 * 0.6, 0.96, 3 * 1)]
    np.testing.assert_allclose(loss, wanted, rtol=1e-12)
    loss = infonce(**one_way, negative_hardness=2.0)
    wanted = [cross_entropy(1, 0, 3 * 0.6, 0.8), cross_entropy(0.8, 0.6, 3 * 0.96, 1)]
    np.testing.assert_allclose(loss, wanted, rtol=1e-12)


def test_explicit_negatives_of_other_rows_are_negatives_of_keys():
    negatives = jnp.array([[[0.6, 0.8]], [[0.8, 0.6]]])
    loss = infonce(directions=("key_to_key",), negatives=explicit(negatives))
    wanted = [cross_entropy(1, 0, 0.8), cross_entropy(0.8, 0, 0.8)]
    np.testing.assert_allclose(loss, wanted, rtol=1e-12)


def test_explicit_negatives_too_are_left_out_by_a_margin():
    negatives = jnp.array([[[0.6, 0.8]], [[0.8, 0.6]]])
    loss = infonce(directions=("query_to_key",), negatives=explicit(negatives), margin=0.1)
    np.testing.assert_allclose(
        loss, [cross_entropy(1, 0, 0.6, 0.8), cross_entropy(0.8, 0.6)], rtol=1e-12
    )


def test_no_query_has_its_own_key_among_the_explicit_negatives():
    negatives = jnp.asarray(KEYS)[::-1, None]  # row 0 has mined row 1's key, and row 1 row 0's
    loss = infonce(
        directions=("query_to_key",),
        negatives=explicit(negatives, ids=jnp.array([[8], [7]])),
        ids=jnp.array([7, 8]),
    )
    np.testing.assert_allclose(
        loss, [cross_entropy(1, 0, 0), cross_entropy(0.8, 0.6, 0.6)], rtol=1e-12
    )


def test_no_query_has_its_own_group_among_the_explicit_negatives():
    negatives = jnp.asarray(KEYS)[::-1, None]
    loss = infonce(
        directions=("query_to_key",),
        negatives=explicit(negatives, groups=jnp.array([[7], [9]])),
        groups=jnp.array([7, 8]),
    )
    # Row 0's own negative, row 7, is masked; its other one is row 1's.
    wanted = [cross_entropy(1, 0, 1), cross_entropy(0.8, 0.6, 0.8, 0.6)]
    np.testing.assert_allclose(loss, wanted, rtol=1e-12)


def test_a_guide_masks_explicit_negatives_too():
    negatives = jnp.array([[[0.6, 0.8]], [[0.8, 0.6]]])
    guides = jnp.eye(2), jnp.eye(2)
    for judged, wanted in (
        ([[[0.5, 0.0]], [[0.0, 0.0]]], [cross_entropy(1, 0, 0.6, 0.8), None]),
        ([[[2.0, 0.0]], [[0.0, 2.0]]], [cross_entropy(1, 0, 0.8), cross_entropy(0.8, 0.6, 1)]),
    ):
        loss = infonce(
            directions=("query_to_key",),
            negatives=explicit(negatives, guides=jnp.array(judged)),
            guides=guides,
            margin=0.0,
        )
        np.testing.assert_allclose(loss[0], wanted[0], rtol=1e-12)
        if wanted[1] is not None:
            np.testing.assert_allclose(loss[1], wanted[1], rtol=1e-12)


@pytest.mark.parametrize(("concentration", "positive_share"), [(0, 0), (2, 0), (0, 0.1), (2, 0.1)])
def test_hard_and_debiased_negatives_by_the_papers_formula(concentration, positive_share):
    rows = 6
    queries, keys = unit_vectors(0, rows, 4), unit_vectors(1, rows, 4)
    loss = hard_infonce_loss(
        queries,
        keys,
        temperature=0.5,
        concentration=float(concentration),
        positive_share=float(positive_share),
        directions=("query_to_key",),
    )
    powers = np.exp(np.asarray(queries @ keys.T) / 0.5)
    for row in range(rows):
        negatives = np.delete(powers[row], row)
        importance = negatives**concentration
        reweighted = (importance * negatives).sum() / importance.mean()
        count, positive = rows - 1, powers[row, row]
        total = (reweighted - positive_share * count * positive) / (1 - positive_share)
        total = max(total, count * exp(-1 / 0.5))
        np.testing.assert_allclose(loss[row], -log(positive / (positive + total)), rtol=1e-12)


def test_where_all_mass_would_be_positive_the_least_is_left():
    queries = keys = jnp.eye(3)
    loss = hard_infonce_loss(queries, keys, temperature=0.5, concentration=0.0, positive_share=0.9)
    np.testing.assert_allclose(loss, -log(exp(2) / (exp(2) + 2 * exp(-2))), rtol=1e-12)


def test_the_decoupled_denominator_leaves_the_positive_out():
    loss = decoupled_infonce_loss(
        jnp.asarray(QUERIES), jnp.asarray(KEYS), temperature=1.0, directions=("query_to_key",)
    )
    np.testing.assert_allclose(loss, [0 - 1, 0.6 - 0.8], rtol=1e-12)


@pytest.mark.parametrize("loss_fn", [infonce_loss, decoupled_infonce_loss, hard_infonce_loss])
def test_one_row_costs_nothing(loss_fn):
    assert loss_fn(unit_vectors(0, 1, 4), unit_vectors(1, 1, 4)).tolist() == [0.0]


def test_a_pair_far_ahead_keeps_its_last_digits():
    sides = jnp.eye(2)
    loss = infonce_loss(sides, sides, temperature=0.02, directions=("query_to_key",))
    np.testing.assert_allclose(loss, log1p(exp(-50)), rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": ("both",)}, "give one or more of query_to_key, key_to_query"),
        ({"directions": ()}, "give one or more"),
        ({"directions": ("query_to_key",) * 2}, "each once"),
        ({"partition": "all"}, "'all' is unknown; use one of separate, anchor, joint"),
        ({"exchange": "star"}, "'star' is unknown"),
        ({"guides": (jnp.eye(2), jnp.eye(2))}, "give margin or relative_margin"),
        ({"margin": 0.1, "relative_margin": 0.1}, "choose one"),
        (
            {"negatives": explicit(jnp.ones((2, 1, 2))), "directions": ("key_to_query",)},
            "no direction that uses them; add key_to_key or query_to_key",
        ),
        (
            {"negatives": explicit(jnp.ones((2, 1, 2)), ids=jnp.ones((2, 1), int))},
            r"ids need masks.ids to compare with; give both",
        ),
        ({"negative_hardness": 1.0}, "add some to negatives, or set it to 0"),
        ({"hardness": -1.0}, r"hardness=-1\.0; set it to at least 0"),
        (
            {"negatives": explicit(jnp.ones((2, 1, 2)), valid=jnp.ones((2, 2), bool))},
            r"valid have the shape \(2, 2\), not \(2, 1\)",
        ),
        (
            {"negatives": explicit(jnp.ones((2, 1, 2)), guides=jnp.ones((2, 1, 2)))},
            "masks.guides are None; give both",
        ),
        (
            {"negatives": explicit(jnp.ones((2, 1, 2)), groups=jnp.ones((2, 1), int))},
            r"groups need masks.groups to compare with",
        ),
    ],
)
def test_a_mistake_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        infonce(**options)


def test_sides_of_different_shapes_are_an_error():
    with pytest.raises(Exception, match=r"shape|axis|dimension"):
        infonce_loss(jnp.eye(3), jnp.eye(3)[:2])
    with pytest.raises(Exception, match=r"shape|axis|dimension"):
        infonce(negatives=explicit(jnp.ones((2, 1, 3))))


def small_bank():
    """Four keys of rows 7 to 10 and groups 1 to 4; the third slot was never written."""
    vectors = jnp.array([[0.0, 1.0], [0.8, 0.6], [5.0, 5.0], [-1.0, 0.0]])
    bank = init_bank(4, 2, dtype=jnp.float64)
    return bank._replace(
        vectors=bank.vectors.at[:4].set(vectors),
        ids=bank.ids.at[:4].set(jnp.array([7, 8, 9, 10], jnp.int32)),
        groups=bank.groups.at[:4].set(jnp.array([1, 2, 3, 4], jnp.int32)),
        written=bank.written.at[:4].set(jnp.array([3, 4, -1, 5], jnp.int32)),
    )


def test_a_bank_s_keys_are_negatives_except_for_a_query_s_own_row_and_group():
    # Queries with the bank: [[0, .8, –, −1], [.8, .96, –, −.6]].
    labels = {"ids": jnp.array([7, 1]), "groups": jnp.array([0, 2])}
    loss = infonce(directions=("query_to_key",), negatives=bank_of(small_bank()), **labels)
    wanted = [cross_entropy(1, 0, 0.8, -1), cross_entropy(0.8, 0.6, 0.8, -0.6)]
    np.testing.assert_allclose(loss, wanted, rtol=1e-12)
    loss = infonce(negatives=bank_of(small_bank()), ids=labels["ids"], margin=0.05)
    one_way = [cross_entropy(1, 0, 0.8, -1), cross_entropy(0.8, 0.6, -0.6)]
    other_way = infonce(directions=("key_to_query",), ids=labels["ids"], margin=0.05)
    np.testing.assert_allclose(loss, (np.array(one_way) + other_way) / 2, rtol=1e-12)


def test_a_copy_of_the_positive_in_a_bank_only_shrinks_a_query_s_gradient():
    queries, keys = jnp.asarray(QUERIES), jnp.asarray(KEYS)
    bank = small_bank()
    twins = bank._replace(vectors=bank.vectors.at[1].set(keys[0]).at[3].set(keys[0]))

    def gradient(bank):
        def loss(queries):
            losses = infonce_loss(
                queries,
                keys,
                temperature=1.0,
                directions=("query_to_key",),
                masks=Masks(ids=jnp.arange(2)),
                negatives=bank_of(bank),
            )
            return losses[0]

        return jax.grad(loss)(queries)[0]

    without = gradient(twins._replace(written=twins.written.at[jnp.array([1, 3])].set(-1)))
    # The other similarities of the first query: with the batch's second key, and with slot 0.
    others = exp(QUERIES[0] @ KEYS[1]) + exp(0.0)
    positive = exp(QUERIES[0] @ KEYS[0])
    share = (positive + others) / (3 * positive + others)
    np.testing.assert_allclose(gradient(twins), share * without, rtol=1e-12)


def test_a_bank_that_does_not_fit_is_named():
    for options, message in (
        ({}, r"negatives\['bank'\].ids need masks.ids"),
        (
            {"ids": jnp.arange(2), "directions": ("key_to_query",)},
            "no direction that uses them; add query_to_key",
        ),
        (
            {"ids": jnp.arange(2), "margin": 0.0, "guides": (jnp.eye(2), jnp.eye(2))},
            "have no guides",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            infonce(negatives=bank_of(small_bank()), **options)
    with pytest.raises(
        ValueError,
        match=r"negatives\['wide'\] have the shape \(\d+, 5\); expected \(any number, 2\)",
    ):
        infonce(negatives={"wide": read_bank(init_bank(4, 5))}, ids=jnp.arange(2))
