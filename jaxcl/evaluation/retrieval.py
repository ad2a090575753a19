"""Retrieval evaluation over the whole pool: lexical, dense and hybrid.

`evaluate_retrieval` ranks every key for every query, in tiles of queries, by up to three methods:
BM25 on the texts, inner products of the embeddings, and the fusion of the two rankings.

When not to trust it: each query has one relevant key, and other keys that are known to answer it
are excluded from its ranking (`jaxcl.evaluation.known_positives`). Further keys may also answer it,
such as overloads, near duplicates, or the asynchronous version of a function. They count as errors,
and a better model ranks more of them highly. If similar functions are in the training data, the
metrics are too optimistic: split by package, not by row. Results on pools of different sizes are
not comparable. Standard errors are over queries only.
"""

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from jaxcl.evaluation.finite import check_finite
from jaxcl.evaluation.known_positives import KnownPositives, rank_last
from jaxcl.metrics import (
    mean_and_standard_error,
    mid_ranks,
    mrr_metric,
    ndcg_metric,
    paired_difference,
    rank_of_key,
    recall_at_k_metric,
)
from jaxcl.typing import Array, Float, Int

__all__ = [
    "BM25",
    "METHODS",
    "METRICS",
    "RetrievalResult",
    "comparison",
    "dense_scores",
    "evaluate_retrieval",
    "lexical_tokens",
    "mask_name",
    "reciprocal_rank_fusion",
]

METHODS = ("bm25", "dense", "hybrid")

METRICS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mrr@10": partial(mrr_metric, cutoff=10),
    "ndcg@10": partial(ndcg_metric, cutoff=10),
    "recall@1": partial(recall_at_k_metric, cutoff=1),
    "recall@10": partial(recall_at_k_metric, cutoff=10),
    "recall@100": partial(recall_at_k_metric, cutoff=100),
}
"""The metrics of a summary: name -> function from ranks to one value per query."""

_CAMEL_BOUNDARY = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_LETTERS_OR_DIGITS = re.compile(r"[^\W\d_]+|\d+")


class RetrievalResult(NamedTuple):
    """One method's ranks of the relevant keys.

    Attributes:
      ranks: one per query.
      num_keys: number of keys in the pool.
      num_left_out: number of keys excluded from rankings because they are known to answer the query
        too, summed over the queries.
    """

    ranks: Float[np.ndarray, " q"]
    num_keys: int
    num_left_out: int = 0

    def summary(self) -> dict[str, tuple[float, float]]:
        """Every metric of `METRICS` as `(mean, standard error)` over the queries."""
        return {
            name: mean_and_standard_error(metric(self.ranks)) for name, metric in METRICS.items()
        }


def evaluate_retrieval(
    query_texts: Sequence[str] | None,
    key_texts: Sequence[str] | None,
    query_embeddings: Float[Array | np.ndarray, "q d"] | None,
    key_embeddings: Float[Array | np.ndarray, "n d"] | None,
    *,
    relevant: Int[np.ndarray, " q"] | None = None,
    known: KnownPositives | None = None,
    methods: Sequence[str] = METHODS,
    others: Mapping[str, Callable[[slice], Float[np.ndarray, "t n"]]] = MappingProxyType({}),
    rrf_k: int | float = 60,
    tile: int = 512,
    advance: Callable[[int], object] = lambda queries: None,
) -> dict[str, RetrievalResult]:
    """Rank the relevant key of each query among all keys, by each method.

    The docstring of this module explains when not to trust the results.

    Args:
      query_texts: one per query; `None` if no method uses texts.
      key_texts: the texts of the pool, in the order of `key_embeddings`; `None` if no method uses
        texts.
      query_embeddings: one row per query; `None` if no method uses embeddings.
      key_embeddings: one row per key of the pool, which may have more keys than there are queries.
      relevant: row of each query's relevant key in the pool; by default, key i for query i.
      known: the keys that answer each query. All of them except the relevant key are excluded from
        the query's ranking. By default, no key is excluded.
      methods: `"bm25"` uses texts, `"dense"` embeddings, `"hybrid"` both.
      others: name of a further method -> a function that scores all keys for a range of queries.
      rrf_k: the constant of `reciprocal_rank_fusion`, for `"hybrid"`.
      tile: number of queries to score at a time. Memory is proportional to this number times the
        size of the pool; the result does not depend on it.
      advance: called after each tile with the number of its queries.

    Returns:
      A `RetrievalResult` for each method, in the order of `methods`.

    Raises:
      ValueError: if a method is unknown or lacks its inputs, the inputs differ in length, an
        embedding is not finite, `relevant` has a row outside the pool, or there are no queries.

    Example:
      >>> texts = ["parse an iso date", "open a socket"]
      >>> code = ["def parse_iso_date(s): ...", "def openSocket(host): ..."]
      >>> vectors = np.eye(2, dtype=np.float32)
      >>> results = evaluate_retrieval(texts, code, vectors, vectors)
      >>> {method: result.ranks.tolist() for method, result in results.items()}
      {'bm25': [1.0, 1.0], 'dense': [1.0, 1.0], 'hybrid': [1.0, 1.0]}
    """
    if not methods or not set(methods) <= {*METHODS, *others}:
        known_names = ", ".join((*METHODS, *others))
        raise ValueError(f"methods={methods!r}; give one or more of {known_names}")
    if tile < 1:
        raise ValueError(f"tile={tile}; use a tile of at least 1")
    num_queries = _common_length("queries", query_texts, query_embeddings)
    num_keys = _common_length("keys", key_texts, key_embeddings)
    relevant = _relevant_rows(relevant, num_queries=num_queries, num_keys=num_keys)
    scorers: dict[str, Callable[[slice], np.ndarray]] = {
        name: others[name] for name in methods if name in others
    }
    if {"bm25", "hybrid"} & set(methods):
        scorers["bm25"] = _lexical_scorer(query_texts, key_texts)
    if {"dense", "hybrid"} & set(methods):
        scorers["dense"] = _dense_scorer(query_embeddings, key_embeddings)

    if known is not None:
        known.check_sizes(num_queries=num_queries, num_keys=num_keys)
    ranks = {method: np.empty(num_queries) for method in methods}
    num_left_out = 0
    for start in range(0, num_queries, tile):
        rows = slice(start, min(start + tile, num_queries))
        tables = {name: scores_of(rows) for name, scores_of in scorers.items()}
        if known is not None:
            excluded = known.others(rows, relevant[rows])
            num_left_out += sum(map(len, excluded.values()))
            for scores in tables.values():
                rank_last(scores, excluded)
        if "hybrid" in methods:
            fused = [tables[name] for name in ("bm25", "dense")]
            tables["hybrid"] = reciprocal_rank_fusion(fused, k=rrf_k)
        for method in methods:
            ranks[method][rows] = rank_of_key(tables[method], relevant[rows])
        advance(rows.stop - rows.start)
    return {method: RetrievalResult(ranks[method], num_keys, num_left_out) for method in methods}


def comparison(
    results: Mapping[str, RetrievalResult], method: str, baseline: str
) -> tuple[float, float]:
    """The paired difference in MRR@10 of two methods, and its standard error.

    Both names are keys of `results`, which come from one call of `evaluate_retrieval`. The
    difference is positive if `method` is better than `baseline`.

    Example:
      >>> results = {
      ...     "bm25": RetrievalResult(np.array([2.0, 1.0]), 9),
      ...     "dense": RetrievalResult(np.array([1.0, 1.0]), 9),
      ... }
      >>> comparison(results, "dense", "bm25")
      (0.25, 0.25)
    """
    for name in (method, baseline):
        if name not in results:
            raise ValueError(f"no result of {name!r}; there are {', '.join(results)}")
    return paired_difference(mrr_metric(results[method].ranks), mrr_metric(results[baseline].ranks))


def lexical_tokens(text: str) -> list[str]:
    """Split a text into lower-case words and numbers, and identifiers into their parts.

    Splits occur at all characters except letters and digits, between letters and digits, and at the
    capitals of camelCase (for unaccented letters). The tokens of identifiers then match the words
    of a question, which makes BM25 a strong baseline on code.

    Example:
      >>> lexical_tokens("parseIsoDate(HTTPResponse, utf8_text)")
      ['parse', 'iso', 'date', 'http', 'response', 'utf', '8', 'text']
    """
    return _LETTERS_OR_DIGITS.findall(_CAMEL_BOUNDARY.sub(" ", text).lower())


class BM25:
    """An index of the pool's texts that scores them for a query: the lexical baseline.

    `score(q, d) = Σ_{t in q} idf_t · f_td / (f_td + k1 (1 - b + b L_d / L))`,
    `idf_t = ln(1 + (n - n_t + ½) / (n_t + ½))`

    where `n_t` of the `n` texts contain `t`, `f_td` is the count of `t` in `d`, `L_d` is the number
    of tokens of `d`, `L` is its mean over the pool, k1 = 1.5 and b = 0.75. A token that a
    query repeats adds its score each time. Tokens come from `lexical_tokens`; there is no stemming,
    and no stop words are dropped.

    Args:
      texts: the texts of the pool.

    Raises:
      ValueError: if no text of the pool has a token.

    Example:
      >>> index = BM25(["def parse_iso_date", "def open_socket"])
      >>> print(index.scores(["ISO date", ""]).round(3))
      [[0.521 0.   ]
       [0.    0.   ]]

    Reference:
      Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009;
      the variant is Lucene's, as named by Kamphuis et al., ECIR 2020.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        # Not at the top: the import runs a JAX computation, which must not happen before
        # jax.distributed.initialize.
        import bm25s

        # bm25s sets its own log level to DEBUG, and absl prints its messages.
        logging.getLogger("bm25s").setLevel(logging.WARNING)
        ids: dict[str, int] = {}
        rows = [[ids.setdefault(token, len(ids)) for token in lexical_tokens(t)] for t in texts]
        if not ids:
            raise ValueError(
                f"none of the {len(rows)} key texts has a word or a number to index; check "
                "that they are texts, or omit the methods that use them"
            )
        self._index = bm25s.BM25(k1=1.5, b=0.75, method="lucene", backend="numpy")
        # Without the empty token, which bm25s would number past the end of its table.
        self._index.index((rows, ids), create_empty_token=False, show_progress=False)

    def scores(self, queries: Sequence[str]) -> Float[np.ndarray, "q n"]:
        """The float32 scores of all texts for each query; 0 for a text without its tokens."""
        token_ids = [self._index.get_tokens_ids(lexical_tokens(query)) for query in queries]
        return np.stack([self._index.get_scores_from_ids(ids) for ids in token_ids])


def dense_scores(
    queries: Float[Array | np.ndarray, "q d"], keys: Float[Array | np.ndarray, "n d"]
) -> Float[np.ndarray, "q n"]:
    """Inner products of every query with every key, in float32: `s_ij = q_i · k_j`.

    Products are summed in float64 and then rounded. The last bit of a float32 product depends on
    how the matrices are blocked, so equal keys could get different scores, and ranks would depend
    on the size of the tile.

    Embeddings may have any floating type. For unit vectors, the scores are cosine similarities.

    Example:
      >>> print(dense_scores(np.array([[0.6, 0.8]]), np.eye(2)))
      [[0.6 0.8]]
    """
    queries, keys = np.asarray(queries, np.float64), np.asarray(keys, np.float64)
    if queries.ndim != 2 or keys.ndim != 2 or queries.shape[1] != keys.shape[1]:
        raise ValueError(
            f"queries have the shape {queries.shape} and keys {keys.shape}; give [q, d] and [n, d]"
        )
    return (queries @ keys.T).astype(np.float32)


def reciprocal_rank_fusion(
    score_tables: Sequence[Float[np.ndarray, "q n"]], *, k: int | float = 60
) -> Float[np.ndarray, "q n"]:
    """Combine several rankings of the same keys.

    `fused_ij = Σ_tables 1 / (k + rank_ij)`, with ranks from 1 and mid-ranks for ties.

    Only ranks are used, so the scales of the scores need not match.

    Args:
      score_tables: the scores of each method, `[q, n]`; higher is better.
      k: a smaller constant gives more weight to the first ranks; 60 in the paper. Choose it on
        validation queries, not on test queries.

    Returns:
      Fused scores in float64; higher is better.

    Raises:
      ValueError: if no table is given, shapes differ, `k` is negative, or a score is not finite.

    Example:
      >>> lexical, dense = np.array([[3.0, 0.0, 0.0]]), np.array([[0.1, 0.3, 0.2]])
      >>> reciprocal_rank_fusion([lexical, dense], k=1).round(3).tolist()
      [[0.75, 0.786, 0.619]]

    Reference:
      Cormack, Clarke and Büttcher, "Reciprocal rank fusion outperforms Condorcet and individual
      rank learning methods", SIGIR 2009.
    """
    shapes = {np.shape(table) for table in score_tables}
    if len(shapes) != 1:
        raise ValueError(
            f"fusion needs one or more tables of the same shape, but got shapes {sorted(shapes)}; "
            "score the same queries and keys with every method"
        )
    if not 0 <= k < np.inf:
        raise ValueError(f"k={k}; use a finite constant of at least 0, such as 60")
    shares = np.stack([1 / (k + mid_ranks(table)) for table in score_tables])
    shares.sort(axis=0)  # so that ranks (1, 2, 3) and (3, 1, 2) have the same sum
    return shares.sum(axis=0)


def mask_name(source: str, name: str) -> str:
    """Replace a function's own name by `_` everywhere in its source.

    This includes recursive calls, strings and comments. Longer identifiers that contain the name
    are unchanged. Names reveal much of the answer, so also report results with masked names.

    Example:
      >>> mask_name("def fact(n): return n * fact(n - 1) if n else factor", "fact")
      'def _(n): return n * _(n - 1) if n else factor'
    """
    if not name.isidentifier():
        raise ValueError(f"name={name!r} is not an identifier; give the function's bare name")
    return re.sub(rf"\b{name}\b", "_", source)


def _common_length(what: str, *sides: Sequence[str] | Array | np.ndarray | None) -> int:
    lengths = {len(side) for side in sides if side is not None}
    if len(lengths) > 1:
        raise ValueError(f"texts and embeddings of the {what} differ in number: {sorted(lengths)}")
    if lengths in (set(), {0}):
        raise ValueError(f"there are no {what} to evaluate; give at least one")
    return lengths.pop()


def _relevant_rows(
    relevant: Int[np.ndarray, " q"] | None, *, num_queries: int, num_keys: int
) -> Int[np.ndarray, " q"]:
    if relevant is None:
        relevant = np.arange(num_queries)
    if len(relevant) != num_queries:
        raise ValueError(
            f"relevant has {len(relevant)} rows for {num_queries} queries; give one per query"
        )
    outside = np.flatnonzero((relevant < 0) | (relevant >= num_keys))
    if outside.size:
        first = f"the relevant key of query {outside[0]} is {relevant[outside[0]]}"
        raise ValueError(f"the pool has {num_keys} keys, but {first}; give rows of the pool")
    return relevant


def _lexical_scorer(
    query_texts: Sequence[str] | None, key_texts: Sequence[str] | None
) -> Callable[[slice], np.ndarray]:
    if query_texts is None or key_texts is None:
        raise ValueError('"bm25" and "hybrid" use query_texts and key_texts; give both')
    index = BM25(key_texts)
    return lambda rows: index.scores(query_texts[rows])


def _dense_scorer(
    query_embeddings: Float[Array | np.ndarray, "q d"] | None,
    key_embeddings: Float[Array | np.ndarray, "n d"] | None,
) -> Callable[[slice], np.ndarray]:
    if query_embeddings is None or key_embeddings is None:
        raise ValueError('"dense" and "hybrid" use embeddings of queries and keys; give both')
    queries = _finite_rows("query_embeddings", query_embeddings)
    keys = _finite_rows("key_embeddings", key_embeddings)
    return lambda rows: dense_scores(queries[rows], keys)


def _finite_rows(name: str, embeddings: Float[Array | np.ndarray, "q d"]) -> np.ndarray:
    # Checked here, because a check of a tile would report the row number within the tile.
    rows = np.asarray(embeddings, np.float64)
    if rows.ndim != 2:
        raise ValueError(f"{name} have the shape {rows.shape}; give one vector per row, [n, d]")
    check_finite(rows, f"rows of {name}")
    return rows
