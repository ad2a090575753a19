"""Searches over vectors equal a brute-force search, for each precision and any sizes."""

import numpy as np
import pytest

from jaxcl.run import vector_search
from jaxcl.run.host_vectors import quantized
from jaxcl.run.vector_search import PRECISIONS, VectorSearch, best_rows, share_kept

NUM_KEYS = 300


def unit_vectors(num_rows, dim, *, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(num_rows, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def search_of(keys, precision, rescore):
    codes = None if precision == "float32" else quantized(keys, precision)
    return VectorSearch(keys, codes, precision, rescore)


def brute_force(scores, top):
    """Rows by descending score, then by row."""
    return sorted(range(len(scores)), key=lambda row: (-scores[row], row))[:top]


def exact_scores(query, keys):
    return [np.float32(np.dot(query.astype(np.float64), key.astype(np.float64))) for key in keys]


def coarse_scores(precision, query, keys):
    """The scores of a precision by their definition, in Python's integers."""
    if precision == "float32":
        return exact_scores(query, keys)
    if precision == "int8":
        codes = [[round(127 * float(value)) for value in key] for key in keys]
        code = [round(127 * float(value)) for value in query]
        return [sum(a * b for a, b in zip(code, other, strict=True)) for other in codes]
    return [sum((a > 0) == (b > 0) for a, b in zip(query, key, strict=True)) for key in keys]


@pytest.fixture(params=[1, 7, 1024])
def block_numbers(request, monkeypatch):
    """Keys and queries in blocks: of one row, of sizes that do not divide, and all at once."""
    monkeypatch.setattr(vector_search, "_BLOCK_NUMBERS", request.param * 24)
    monkeypatch.setattr(vector_search, "_TABLE_NUMBERS", request.param * NUM_KEYS)


@pytest.mark.parametrize("rescore", [1, 3])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dim", [24, 65])
@pytest.mark.usefixtures("block_numbers")
def test_a_search_is_candidates_by_codes_and_their_exact_order(precision, rescore, dim):
    keys, queries = unit_vectors(NUM_KEYS, dim), unit_vectors(5, dim, seed=1)
    rankings = search_of(keys, precision, rescore).best(queries, 8)
    assert len(rankings) == len(queries)
    for query, ranking in zip(queries, rankings, strict=True):
        candidates = sorted(brute_force(coarse_scores(precision, query, keys), 8 * rescore))
        exact = exact_scores(query, keys[candidates])
        wanted = [candidates[place] for place in brute_force(exact, 8)]
        assert ranking.rows.tolist() == wanted
        np.testing.assert_allclose(ranking.scores, (keys @ query)[wanted], atol=1e-6)


@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_rescoring_all_keys_is_the_exact_ranking_and_fewer_is_not(precision):
    keys, queries = unit_vectors(NUM_KEYS, 40), unit_vectors(6, 40, seed=1)
    exact = VectorSearch(keys).best(queries, 10)
    full = search_of(keys, precision, NUM_KEYS).best(queries, 10)
    for one, other in zip(exact, full, strict=True):
        assert one.rows.tolist() == other.rows.tolist()
        assert one.scores.tolist() == other.scores.tolist()
    binary = search_of(keys, "binary", 1).best(queries, 10)
    pairs = zip(exact, binary, strict=True)
    assert any(one.rows.tolist() != other.rows.tolist() for one, other in pairs)


def test_integer_products_of_wide_vectors_do_not_overflow():
    keys = np.ones((3, 4096), np.float32)
    keys[1, 0], keys[2] = 126 / 127, -1
    search = search_of(keys, "int8", 1)
    # 4096 · 127² is above 2²⁴, the largest range of exact integers in float32.
    assert search._coarse(keys[:1])[0].tolist() == [
        4096 * 127**2,
        4095 * 127**2 + 127 * 126,
        -4096 * 127**2,
    ]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_equal_keys_are_ordered_by_row(precision):
    keys = unit_vectors(4, 16)[[3, 1, 1, 0, 1]]
    [ranking] = search_of(keys, precision, 2).best(keys[1:2], 3)
    assert ranking.rows.tolist() == [1, 2, 4]
    assert len(set(ranking.scores.tolist())) == 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_larger_top_than_there_are_keys_returns_all_keys(precision):
    keys = unit_vectors(5, 16)
    search = search_of(keys, precision, 4)
    [ranking] = search.best(keys[:1], 100)
    assert sorted(ranking.rows.tolist()) == [0, 1, 2, 3, 4]
    assert search.best(keys[:0], 3) == []


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_first_of_all_scores_are_the_best_and_the_others_follow(precision):
    keys, queries = unit_vectors(NUM_KEYS, 24), unit_vectors(4, 24, seed=1)
    search = search_of(keys, precision, 3)
    table = search.scores(queries, 7)
    for scores, ranking, query in zip(table, search.best(queries, 7), queries, strict=True):
        order = best_rows(scores, NUM_KEYS)
        assert order[:7].tolist() == ranking.rows.tolist()
        rest = order[7 * (1 if precision == "float32" else 3) :]
        coarse = np.array(coarse_scores(precision, query, keys))
        assert (np.diff(coarse[rest]) <= 0).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_scores_tell_candidates_apart_that_are_almost_equal(precision):
    query = np.array([0.6, 0.8], np.float32)
    keys = np.tile(query, (3, 1)) + np.array([[0], [1e-5], [2e-5]], np.float32)
    search = search_of(keys, precision, 3)
    [scores], [ranking] = search.scores(query[None], 3), search.best(query[None], 3)
    assert best_rows(scores, 3).tolist() == ranking.rows.tolist() == [2, 1, 0]


def test_keys_may_be_mapped_to_memory(tmp_path):
    keys = unit_vectors(50, 24)
    np.save(tmp_path / "keys.npy", keys)
    np.save(tmp_path / "codes.npy", quantized(keys, "binary"))
    mapped = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("keys", "codes")]
    [one] = VectorSearch(*mapped, "binary", 2).best(keys[:1], 5)
    [other] = search_of(keys, "binary", 2).best(keys[:1], 5)
    assert one.rows.tolist() == other.rows.tolist()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 9])
def test_best_rows_equal_a_sort(count):
    scores = np.array([1, 3, 3, 0, 3, 1])
    assert best_rows(scores, count).tolist() == brute_force(scores.tolist(), count)


def test_the_share_kept_leaves_out_each_query_s_own_key():
    reference = [np.array([0, 1, 2]), np.array([2, 1, 3])]
    # The first search finds 1 of {1, 2}, the second both of {2, 3}.
    rankings = [np.array([0, 1, 7]), np.array([3, 2, 8])]
    assert share_kept(rankings, reference, own=[0, 1], top=2) == (1 / 2 + 2 / 2) / 2
    assert share_kept([np.array([0])], [np.array([0])], own=[0], top=2) == 1


def test_rescoring_raises_the_share_kept_and_int8_keeps_more_than_binary():
    keys = unit_vectors(NUM_KEYS, 64)
    reference = [ranking.rows for ranking in VectorSearch(keys).best(keys[:50], 11)]

    def share(precision, rescore):
        rankings = search_of(keys, precision, rescore).best(keys[:50], 11)
        rows = [ranking.rows for ranking in rankings]
        return share_kept(rows, reference, own=range(50), top=10)

    assert share("binary", 1) < share("binary", 4) < share("binary", NUM_KEYS) == 1
    assert share("binary", 1) < share("int8", 1) <= 1
