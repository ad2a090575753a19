"""Hard negatives of NumPy arrays agree with a full sort, on any mesh and in any blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.negatives import MiningRule, mine_hard_negatives
from jaxcl.ops.mesh import make_mesh
from tests.helpers import unit_vectors

KEYS, QUERIES, DIM = 83, 21, 6
TOP = MiningRule(per_query=4, rank_range=(0, 8), sampling="top")


def vectors(seed=0):
    queries, keys = (
        np.asarray(unit_vectors(2 * seed + side, rows, DIM, dtype=jnp.float32))
        for side, rows in enumerate((QUERIES, KEYS))
    )
    return queries, keys


def several_positives(seed=0):
    """Up to twenty positives per query, so that blocks need room for different numbers.

    The twenty of one query are its nearest keys, after which a short search would find nothing.
    """
    rng = np.random.default_rng(seed)
    counts = [1, 2, 0, *rng.integers(1, 5, QUERIES - 3)]
    positives = [rng.permutation(KEYS)[:count].tolist() for count in counts]
    queries, keys = vectors(seed)
    positives[2] = np.argsort(-keys @ queries[2])[:20].tolist()
    return positives


def by_sorting(queries, keys, positives, rule, *, allowed=None, judges=None):
    """Rows, ranks, lowest positive scores and numbers of masked keys, by a loop over queries."""
    judged = queries @ keys.T if judges is None else judges[0] @ judges[1].T
    for query, scores in enumerate(queries @ keys.T):
        others = np.ones(len(keys), bool) if allowed is None else allowed[query].copy()
        others[positives[query]] = False
        order = np.flatnonzero(others)
        order = order[np.argsort(-scores[order], kind="stable")]
        lowest = judged[query, positives[query]].min()
        first, last = rule.rank_range
        ranks = range(first, min(last, len(order)))
        margin = (rule.margin or 0) + (rule.relative_margin or 0) * abs(lowest)
        kept = [
            rank
            for rank in ranks
            if (not margin or judged[query, order[rank]] <= lowest - margin)
            and (rule.min_score is None or judged[query, order[rank]] >= rule.min_score)
            and (rule.max_score is None or judged[query, order[rank]] <= rule.max_score)
        ]
        yield order[kept[: rule.per_query]], kept[: rule.per_query], lowest, len(ranks) - len(kept)


def check(mined, expected):
    for query, (rows, ranks, lowest, masked) in enumerate(expected):
        present = mined.rows[query] >= 0
        assert mined.rows[query][present].tolist() == list(rows)
        assert mined.ranks[query][present].tolist() == list(ranks)
        assert mined.positive_scores[query] == pytest.approx(lowest, abs=1e-6)
        assert mined.masked[query] == masked
        assert (mined.scores[query][~present] == -np.inf).all()
        assert (mined.ranks[query][~present] == -1).all()


RULES = {
    "ranks": TOP,
    "later ranks": TOP._replace(rank_range=(3, 12)),
    "margin": TOP._replace(margin=0.2),
    "relative margin": TOP._replace(relative_margin=0.3),
    "limits": TOP._replace(min_score=0.5, max_score=0.7),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize(("devices", "block_rows"), [(1, 4096), (8, 5)])
def test_the_hard_negatives_agree_with_a_full_sort(rule, devices, block_rows):
    queries, keys = vectors()
    positives = several_positives()
    mesh = make_mesh({"data": devices}, devices=jax.devices()[:devices])
    mined = mine_hard_negatives(
        queries, keys, positives=positives, rule=rule, block_rows=block_rows, mesh=mesh
    )
    check(mined, by_sorting(queries, keys, positives, rule))
    if rule not in (TOP, RULES["later ranks"]):
        counts = (mined.rows >= 0).sum(1)
        assert counts.min() < 4  # ragged
        assert mined.masked.sum() > 0
    else:
        assert mined.masked.sum() == 0


def test_the_guide_decides_about_margins_but_not_ranks():
    queries, keys = vectors()
    guides = vectors(seed=7)
    positives = several_positives()
    rule = TOP._replace(margin=0.3)
    mined = mine_hard_negatives(
        queries,
        keys,
        positives=positives,
        rule=rule,
        guide_queries=guides[0],
        guide_keys=guides[1],
    )
    check(mined, by_sorting(queries, keys, positives, rule, judges=guides))
    scores = guides[0] @ guides[1].T
    present = mined.rows >= 0
    wanted = np.take_along_axis(scores, np.where(present, mined.rows, 0), 1)
    np.testing.assert_allclose(mined.scores[present], wanted[present], atol=1e-6)
    unguided = mine_hard_negatives(queries, keys, positives=positives, rule=rule)
    assert (unguided.rows != mined.rows).any()


def test_masked_keys_are_never_mined():
    queries, keys = vectors()
    rng = np.random.default_rng(1)
    query_groups, key_groups = rng.integers(0, 3, QUERIES), rng.integers(0, 3, KEYS)
    candidates = rng.random(KEYS) < 0.7
    excluded = [rng.permutation(KEYS)[:count].tolist() for count in rng.integers(0, 4, QUERIES)]
    positives = rng.integers(0, KEYS, QUERIES)
    allowed = (query_groups[:, None] != key_groups) & candidates
    for query, rows in enumerate(excluded):
        allowed[query, rows] = False
    mined = mine_hard_negatives(
        queries,
        keys,
        positives=positives,
        rule=TOP,
        excluded=excluded,
        candidates=candidates,
        query_groups=query_groups,
        key_groups=key_groups,
        block_rows=8,
    )
    check(mined, by_sorting(queries, keys, positives[:, None], TOP, allowed=allowed))


def test_the_margin_is_measured_from_the_least_similar_positive():
    # cosines 1.0, 0.9, 0.5, 0.45 and 0.3; positives 1.0 and 0.5
    cosines = np.array([1.0, 0.9, 0.5, 0.45, 0.3])
    keys = np.stack([cosines, np.sqrt(1 - cosines**2)], 1)
    query = np.array([[1.0, 0.0]])
    for rule, rows in (
        (TOP._replace(margin=0.1), [4]),  # at most 0.5 - 0.1 = 0.4
        (TOP._replace(relative_margin=0.1), [3, 4]),  # at most 0.5 - 0.1 · 0.5 = 0.45
        (TOP, [1, 3, 4]),
    ):
        rule = rule._replace(relative_margin=rule.relative_margin and 0.0999)
        mined = mine_hard_negatives(query, keys, positives=[[0, 2]], rule=rule)
        assert mined.rows[0].tolist() == rows + [-1] * (4 - len(rows))
        assert mined.masked.tolist() == [3 - len(rows)]


def test_ties_are_ordered_by_row():
    keys = np.tile(np.eye(3), (7, 1))  # rows 0, 3, 6 … are one vector
    rule = TOP._replace(rank_range=(0, 9), per_query=9)
    mined = mine_hard_negatives(np.eye(3)[:1], keys, positives=[3], rule=rule)
    assert mined.rows[0].tolist() == [0, 6, 9, 12, 15, 18, 1, 2, 4]


def test_random_draws_depend_on_the_seed_and_not_on_blocks_or_devices():
    queries, keys = vectors()
    rule = MiningRule(per_query=3, rank_range=(1, 20))
    one = make_mesh({"data": 1}, devices=jax.devices()[:1])
    options = {"positives": np.arange(QUERIES), "rule": rule}
    first = mine_hard_negatives(queries, keys, **options)
    second = mine_hard_negatives(queries, keys, **options, block_rows=4, mesh=one)
    other = mine_hard_negatives(queries, keys, **options, seed=1)
    np.testing.assert_array_equal(first.rows, second.rows)
    assert (first.rows != other.rows).any()


def test_any_form_of_rows_and_vectors_gives_the_same():
    queries, keys = vectors()
    expected = mine_hard_negatives(
        queries, keys, positives=[[row] for row in range(QUERIES)], rule=TOP
    )
    padded = np.stack([np.arange(QUERIES), np.full(QUERIES, -1)], 1)
    for positives in (range(QUERIES), np.arange(QUERIES), jnp.arange(QUERIES), padded):
        mined = mine_hard_negatives(
            jnp.asarray(queries), keys.astype(np.float64), positives=positives, rule=TOP
        )
        for ours, theirs in zip(mined, expected, strict=True):
            assert isinstance(ours, np.ndarray)
            np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_queries_without_positives_have_no_positive_score():
    queries, keys = vectors()
    mined = mine_hard_negatives(queries[:2], keys, positives=[[], [3]], rule=TOP)
    assert np.isnan(mined.positive_scores).tolist() == [True, False]
    assert (mined.rows >= 0).all()


def test_no_queries_have_no_negatives():
    queries, keys = vectors()
    mined = mine_hard_negatives(queries[:0], keys, positives=[], rule=TOP)
    assert mined.rows.shape == mined.scores.shape == (0, 4)


def test_missing_negatives_are_padded():
    queries, keys = vectors()
    mined = mine_hard_negatives(queries[:1], keys[:3], positives=[1], rule=TOP)
    assert sorted(mined.rows[0].tolist()) == [-1, -1, 0, 2]


def with_nan(array):
    array = array.copy()
    array[3] = np.nan
    return array


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positives": [0, 1]}, "positives has 2 entries; give one for each of the 21 queries"),
        ({"positives": [KEYS] * QUERIES}, "positives holds row 83, but there are 83 keys"),
        (
            {"positives": [[]] * QUERIES, "rule": TOP._replace(margin=0.1)},
            "query 0 has no positives, but margins are relative to them",
        ),
        ({"queries": with_nan(vectors()[0])}, "queries: the vector of row 3 is not finite"),
        ({"keys": with_nan(vectors()[1])}, "keys: the vector of row 3 is not finite"),
        ({"keys": vectors()[1][:, :5]}, "queries have 6 features, but their keys have 5"),
        ({"candidates": np.ones(3, bool)}, r"candidates has the shape \(3,\)"),
        ({"query_groups": np.arange(QUERIES)}, "query_groups and key_groups together"),
        (
            {"guide_queries": vectors()[0], "guide_keys": vectors()[1]},
            "a guide decides about margins and limits, but the rule has none",
        ),
        (
            {
                "guide_queries": vectors()[0],
                "guide_keys": vectors()[1][:5],
                "rule": TOP._replace(margin=0.1),
            },
            "guide_keys has 5 rows; give one for each of 83",
        ),
        ({"rule": TOP._replace(rank_range=(90, 99))}, "there are 83 keys, none of rank 90"),
        (
            {"rule": TOP._replace(min_score=0.5, max_score=0.4)},
            "min_score=0.5 is greater than max_score=0.4",
        ),
        ({"block_rows": 0}, "block_rows=0; give at least 1"),
        ({"query_groups": np.arange(QUERIES) + 2**40, "key_groups": np.arange(KEYS)}, "int32"),
    ],
)
def test_a_mistake_is_named(changes, message):
    queries, keys = vectors()
    given = {"queries": queries, "keys": keys, "positives": np.arange(QUERIES), "rule": TOP}
    with pytest.raises(ValueError, match=message):
        mine_hard_negatives(**(given | changes))


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize("name", ["queries", "keys"])
def test_integers_are_not_embeddings(name):
    queries, keys = vectors()
    given = {"queries": queries, "keys": keys, "positives": np.arange(QUERIES), "rule": TOP}
    with pytest.raises(ValueError, match=f"{name} has the type int64; give floats"):
        mine_hard_negatives(**(given | {name: given[name].astype(np.int64)}))


def test_fractions_are_not_row_numbers():
    queries, keys = vectors()
    with pytest.raises(TypeError, match="positives has the type float64; give integers"):
        mine_hard_negatives(queries, keys, positives=[0.5] * QUERIES, rule=TOP)
