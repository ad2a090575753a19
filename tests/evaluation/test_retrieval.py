"""Retrieval evaluation: BM25, dense scores, their fusion, and all together."""

import io
import math
import subprocess
import sys
from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError
from rich.console import Console

from jaxcl.evaluation.retrieval import (
    BM25,
    METHODS,
    METRICS,
    RetrievalResult,
    comparison,
    dense_scores,
    evaluate_retrieval,
    lexical_tokens,
    mask_name,
    reciprocal_rank_fusion,
)
from jaxcl.evaluation.retrieval_table import results_table
from jaxcl.metrics import mrr_metric, rank_of_key

WORDS = ["parse", "iso", "date", "open", "socket", "read", "line", "write", "file", "close"]


def some_pairs(*, num_queries=40, num_keys=50, num_features=8, seed=0):
    """Texts that share some words, embeddings that share a direction, and a few duplicate keys."""
    rng = np.random.default_rng(seed)
    key_texts = [" ".join(rng.choice(WORDS, 6)) for _ in range(num_keys)]
    key_vectors = rng.standard_normal((num_keys, num_features))
    key_texts[1], key_vectors[1] = key_texts[0], key_vectors[0]
    relevant = rng.permutation(num_keys)[:num_queries]
    query_texts = [" ".join(rng.choice(key_texts[row].split(), 3)) for row in relevant]
    query_vectors = key_vectors[relevant] + rng.standard_normal((num_queries, num_features))
    unit = [
        (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
        for vectors in (query_vectors, key_vectors)
    ]
    return query_texts, key_texts, *unit, relevant


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("parseIsoDate", ["parse", "iso", "date"]),
        ("parse_iso_date", ["parse", "iso", "date"]),
        ("__init__(self)", ["init", "self"]),
        ("HTTPResponse getURL", ["http", "response", "get", "url"]),
        ("utf8 base64encode", ["utf", "8", "base", "64", "encode"]),
        ("Größe des Café-Menüs", ["größe", "des", "café", "menüs"]),
        ("the the", ["the", "the"]),
        (" _ ... \n", []),
    ],
)
def test_identifiers_split_into_words(text, tokens):
    assert lexical_tokens(text) == tokens


def test_bm25_is_the_formula():
    texts = ["def parse_iso_date(s)", "parseDate date date", "open_socket(host, port, 80)", "..."]
    queries = ["parse a date", "date date", "socket 80"]
    documents = [lexical_tokens(text) for text in texts]
    mean_length = sum(len(document) for document in documents) / len(documents)

    def term_score(term, document):
        containing = sum(term in other for other in documents)
        idf = math.log(1 + (len(documents) - containing + 0.5) / (containing + 0.5))
        count = Counter(document)[term]
        return idf * count / (count + 1.5 * (1 - 0.75 + 0.75 * len(document) / mean_length))

    expected = [
        [
            sum(term_score(term, document) for term in lexical_tokens(query))
            for document in documents
        ]
        for query in queries
    ]
    scores = BM25(texts).scores(queries)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, rtol=1e-6)  # float32
    assert np.count_nonzero(scores) == 5


def test_queries_without_a_known_word_score_zero_and_rank_in_the_middle():
    index = BM25(["open socket", "parse date", "", "read line", "write file"])
    scores = index.scores(["", "...", "zebra", "_"])
    assert scores.tolist() == [[0.0] * 5] * 4
    assert rank_of_key(scores, np.arange(4)).tolist() == [(1 + 5) / 2] * 4


def test_a_pool_without_a_word_is_an_error():
    with pytest.raises(ValueError, match="none of the 2 key texts"):
        BM25(["", "..."])


def test_bm25_says_nothing_while_it_works(capfd, caplog):
    BM25(["open socket", "parse date"]).scores(["date"])
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_importing_the_evaluation_starts_no_device():
    # bm25s computes with JAX when it is imported: too early for jax.distributed.initialize.
    code = "import sys, jaxcl.evaluation.retrieval; sys.exit('bm25s' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_dense_scores_are_inner_products_of_any_floating_type():
    queries, keys = np.array([[0.6, 0.8]]), np.array([[1.0, 0.0], [0.6, -0.8]])
    expected = np.array([[0.6, 0.6 * 0.6 - 0.8 * 0.8]], np.float32)
    assert dense_scores(queries, keys).tolist() == expected.tolist()
    halves = dense_scores(jnp.ones((1, 2), jnp.bfloat16), jnp.ones((3, 2), jnp.bfloat16) / 2)
    assert halves.dtype == np.float32
    assert halves.tolist() == [[1.0, 1.0, 1.0]]


def test_equal_keys_get_equal_dense_scores_in_any_row():
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((37, 129)).astype(np.float32)
    scores = dense_scores(rng.standard_normal((33, 129)).astype(np.float32), np.tile(keys, (5, 1)))
    assert (scores.reshape(33, 5, 37) == scores[:, None, :37]).all()


def test_fusion_by_hand_with_a_tie():
    lexical = np.array([[2.0, 0.0, 0.0]])  # ranks 1, 2.5, 2.5
    dense = np.array([[0.1, 0.3, 0.2]])  # ranks 3, 1, 2
    expected = [[1 / 61 + 1 / 63, 1 / 62.5 + 1 / 61, 1 / 62.5 + 1 / 62]]
    np.testing.assert_allclose(reciprocal_rank_fusion([lexical, dense]), expected, rtol=1e-15)
    sharp = [[1 / 2 + 1 / 4, 1 / 3.5 + 1 / 2, 1 / 3.5 + 1 / 3]]
    np.testing.assert_allclose(reciprocal_rank_fusion([lexical, dense], k=1), sharp, rtol=1e-15)


def test_fusion_sees_ranks_only_and_not_the_order_of_the_tables():
    rng = np.random.default_rng(0)
    tables = [rng.standard_normal((9, 30)) for _ in range(3)]
    fused = reciprocal_rank_fusion(tables, k=20)
    rescaled = [np.exp(tables[2]), 5 * tables[0] - 3, tables[1]]
    assert (reciprocal_rank_fusion(rescaled, k=20) == fused).all()


def test_equal_sets_of_ranks_tie_in_the_fusion():
    num_keys = 30  # table j rotates the order by j keys, so that key i has ranks i, i + 1, i + 2
    ranks = np.stack([(np.arange(num_keys) + turn) % num_keys + 1.0 for turn in range(3)])
    tables = [ranks, ranks[[1, 2, 0]], ranks[[2, 0, 1]]]
    fused = reciprocal_rank_fusion([-table for table in tables])
    assert (fused == fused[0]).all()
    in_table_order = sum(1 / (60 + table) for table in tables)
    assert (in_table_order != in_table_order[0]).any()  # rounding would break the ties


def test_fusion_does_not_launder_a_nan():
    with pytest.raises(ValueError, match="1 of 2 scores are not finite"):
        reciprocal_rank_fusion([np.zeros((1, 2)), np.array([[0.0, math.nan]])])


def test_fusion_refuses_no_tables_other_shapes_and_a_negative_constant():
    with pytest.raises(ValueError, match="one or more tables"):
        reciprocal_rank_fusion([])
    with pytest.raises((ValueError, TypeCheckError)):
        reciprocal_rank_fusion([np.zeros((1, 2)), np.zeros((1, 3))])
    with pytest.raises(ValueError, match="k=-1"):
        reciprocal_rank_fusion([np.zeros((1, 2))], k=-1)
    for k in (math.nan, math.inf):  # with an infinite constant, all keys have the score 0
        with pytest.raises(ValueError, match="finite"):
            reciprocal_rank_fusion([np.zeros((1, 2))], k=k)


@pytest.mark.parametrize("tile", [1, 7, 39, 40, 41, 512])
def test_the_tile_does_not_change_a_bit(tile):
    *pairs, relevant = some_pairs()
    whole = evaluate_retrieval(*pairs, relevant=relevant, tile=40)
    tiled = evaluate_retrieval(*pairs, relevant=relevant, tile=tile)
    for method in METHODS:
        assert tiled[method].ranks.tobytes() == whole[method].ranks.tobytes()


def test_the_order_of_the_pool_does_not_matter():
    queries, keys, query_vectors, key_vectors, relevant = some_pairs()
    ordered = evaluate_retrieval(queries, keys, query_vectors, key_vectors, relevant=relevant)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(keys))
        shuffled = evaluate_retrieval(
            queries,
            [keys[row] for row in order],
            query_vectors,
            key_vectors[order],
            relevant=np.argsort(order)[relevant],
        )
        for method in METHODS:
            assert shuffled[method].ranks.tolist() == ordered[method].ranks.tolist()


def test_a_duplicate_of_the_relevant_key_costs_half_a_rank():
    texts = ["open socket", "read line", "open socket"]
    vectors = np.eye(2, dtype=np.float32)[[0, 1, 0]]
    results = evaluate_retrieval(["socket", "line"], texts, vectors[:2], vectors)
    for method in METHODS:
        assert results[method].ranks.tolist() == [(1 + 2) / 2, 1]


def test_the_methods_are_their_parts():
    queries, keys, query_vectors, key_vectors, relevant = some_pairs()
    lexical, dense = BM25(keys).scores(queries), dense_scores(query_vectors, key_vectors)
    fused = reciprocal_rank_fusion([lexical, dense], k=5)
    results = evaluate_retrieval(
        queries, keys, query_vectors, key_vectors, relevant=relevant, rrf_k=5, tile=7
    )
    for method, scores in zip(METHODS, (lexical, dense, fused), strict=True):
        assert results[method].ranks.tolist() == rank_of_key(scores, relevant).tolist()
        assert results[method].num_keys == 50


def test_query_i_has_the_relevant_key_i_by_default():
    queries, keys, query_vectors, key_vectors, _ = some_pairs(num_queries=20)
    told = evaluate_retrieval(queries, keys, query_vectors, key_vectors, relevant=np.arange(20))
    untold = evaluate_retrieval(queries, keys, query_vectors, key_vectors)
    assert all(told[method].ranks.tolist() == untold[method].ranks.tolist() for method in METHODS)


def test_methods_need_only_what_they_read():
    queries, keys, query_vectors, key_vectors, relevant = some_pairs()
    both = evaluate_retrieval(queries, keys, query_vectors, key_vectors, relevant=relevant)
    texts = evaluate_retrieval(queries, keys, None, None, relevant=relevant, methods=["bm25"])
    vectors = evaluate_retrieval(
        None, None, query_vectors, key_vectors, relevant=relevant, methods=["dense"]
    )
    assert list(texts) == ["bm25"]
    assert texts["bm25"].ranks.tolist() == both["bm25"].ranks.tolist()
    assert vectors["dense"].ranks.tolist() == both["dense"].ranks.tolist()


def test_progress_counts_every_query_once():
    *pairs, relevant = some_pairs()
    calls = []
    evaluate_retrieval(*pairs, relevant=relevant, tile=15, advance=calls.append)
    assert calls == [15, 15, 40 - 2 * 15]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_embedding_that_is_not_finite_is_an_error_that_names_its_row(bad):
    queries, keys, query_vectors, key_vectors, relevant = some_pairs()
    query_vectors[33, 2] = bad
    with pytest.raises(ValueError, match=r"1 of 40 rows of query_embeddings .* row 33"):
        evaluate_retrieval(queries, keys, query_vectors, key_vectors, relevant=relevant, tile=10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["bm52"]}, "one or more of bm25, dense, hybrid"),
        ({"methods": []}, "one or more of bm25, dense, hybrid"),
        ({"tile": 0}, "tile=0"),
        ({"tile": -1}, "tile=-1"),
        ({"query_texts": None}, "use query_texts and key_texts"),
        ({"key_embeddings": None}, "use embeddings of queries and keys"),
        ({"query_texts": ["date"]}, r"queries differ in number: \[1, 40\]"),
        ({"query_texts": [], "query_embeddings": None}, "no queries to evaluate"),
        ({"relevant": np.arange(40) + 11}, "query 39 is 50"),
        ({"relevant": np.arange(40) - 1}, "query 0 is -1"),
        ({"relevant": np.arange(39)}, "39 rows for 40 queries|relevant"),
    ],
)
def test_a_mistake_is_reported(changes, message):
    names = ("query_texts", "key_texts", "query_embeddings", "key_embeddings", "relevant")
    arguments = {**dict(zip(names, some_pairs(), strict=True)), **changes}
    with pytest.raises((ValueError, TypeCheckError), match=message):
        evaluate_retrieval(**arguments)


def test_a_summary_holds_every_metric_with_its_standard_error():
    summary = RetrievalResult(np.array([1.0, 2.0, 20.0, 200.0]), 300).summary()
    assert list(summary) == list(METRICS)
    assert summary["mrr@10"][0] == (1 + 1 / 2 + 0 + 0) / 4
    assert [summary[f"recall@{cutoff}"][0] for cutoff in (1, 10, 100)] == [1 / 4, 2 / 4, 3 / 4]
    assert math.isclose(summary["recall@10"][1], math.sqrt(4 * 0.5**2 / 3) / math.sqrt(4))


def test_the_comparison_is_paired_and_signed():
    results = {
        "bm25": RetrievalResult(np.array([2.0, 4.0]), 9),
        "dense": RetrievalResult(np.array([1.0, 4.0]), 9),
    }
    assert comparison(results, "dense", "bm25") == (0.25, 0.25)  # of +1/2 and 0
    assert comparison(results, "bm25", "dense") == (-0.25, 0.25)
    with pytest.raises(ValueError, match="'hybrid'; there are bm25, dense"):
        comparison(results, "hybrid", "bm25")


@pytest.mark.parametrize(
    ("source", "name", "masked"),
    [
        ("def f(n):\n    return f(n - 1)", "f", "def _(n):\n    return _(n - 1)"),
        ("def parse(s): return parse_all(s), _parse(s)", "parse", None),
        ("def load(self): return self.load()", "load", "def _(self): return self._()"),
        ("def größe(x): return x", "größe", "def _(x): return x"),
    ],
)
def test_a_masked_name_is_gone_as_a_whole_word_and_nothing_else_is(source, name, masked):
    expected = masked or source.replace("def parse(", "def _(")
    assert mask_name(source, name) == expected


def test_masking_takes_the_name_from_the_lexical_baseline():
    source = "def parse_iso_date(text): return parse_iso_date(text[1:])"
    assert "iso" in lexical_tokens(source)
    assert "iso" not in lexical_tokens(mask_name(source, "parse_iso_date"))


@pytest.mark.parametrize("name", ["", "a.b", "f("])
def test_only_a_bare_name_can_be_masked(name):
    with pytest.raises(ValueError, match="not an identifier"):
        mask_name("def f(): ...", name)


def test_the_table_has_a_row_per_split_variant_and_method_and_fits_a_terminal():
    rng = np.random.default_rng(0)
    by_method = {
        method: RetrievalResult(1.0 + rng.integers(0, 20, 300), 99_999) for method in METHODS
    }
    table = results_table({("stdlib", "plain"): by_method, ("stdlib", "name masked"): by_method})
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table)
    text = console.export_text()
    assert table.row_count == 2 * len(METHODS)
    assert "…" not in text
    assert text.count("99,999") == table.row_count
    mean, error = by_method["hybrid"].summary()["mrr@10"]
    assert f"{mean:.3f}±{error:.3f}".replace("0.", ".") in text
    mean, error = comparison(by_method, "hybrid", "bm25")
    assert f"{mean:+.3f} ({mean / error:+.1f})" in text


def test_hybrid_results_beat_their_parts_where_each_knows_half():
    queries, keys, query_vectors, key_vectors, relevant = some_pairs(num_queries=50, seed=3)
    results = evaluate_retrieval(queries, keys, query_vectors, key_vectors, relevant=relevant)
    means = {method: mrr_metric(results[method].ranks).mean() for method in METHODS}
    assert means["hybrid"] > max(means["bm25"], means["dense"])


def test_the_table_has_no_column_for_a_baseline_that_did_not_run():
    ranks = {name: RetrievalResult(np.ones(3), 9) for name in ("dense", "bm25")}
    without = results_table({("test", "plain"): {"dense": ranks["dense"]}})
    both = results_table({("a", "plain"): ranks, ("b", "plain"): {"dense": ranks["dense"]}})
    assert [column.header for column in without.columns][3:] == [
        *("keys", "mrr@10", "recall@1", "recall@10"),
    ]
    assert both.columns[-1].header == "vs bm25 (SEs)"
