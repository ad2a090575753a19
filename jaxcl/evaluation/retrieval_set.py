"""Retrieval over a whole corpus: every query ranks all documents.

When not to trust the metrics: documents without a label count as irrelevant. In a large corpus,
only a few of the relevant documents are labelled, mostly those found by older systems, which
favours these systems. Metrics on corpora of different sizes cannot be compared.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxcl.data.beir import Beir, read_beir
from jaxcl.evaluation.finite import check_finite
from jaxcl.evaluation.graded import GRADED_METRICS, GradedRanks, places_of
from jaxcl.evaluation.protocol import Encode
from jaxcl.evaluation.retrieval import BM25, METHODS, reciprocal_rank_fusion
from jaxcl.host.files import digest_of
from jaxcl.host.paths import AnyPath
from jaxcl.host.printable import counted
from jaxcl.host.processes import together
from jaxcl.host.progress import progress_bar, say
from jaxcl.typing import SIDES, Float, Int

__all__ = ["MAIN_METRIC", "RetrievalSet", "open_retrieval_set"]

MAIN_METRIC = "ndcg@10"
"""The metric that BEIR reports."""

_TILE_SCORES = 2**25
"""Scores in memory at a time, 128 MiB in float32."""
_BLOCK_DOCUMENTS = 16_384
"""Number of documents to convert to float64, or to read the texts of, at a time."""
_ENCODE_DOCUMENTS = 65_536
"""Number of documents to encode at a time; large, because `encode` sorts them by length."""

_Scores = Callable[[Int[np.ndarray, " q"]], Float[np.ndarray, "q n"]]
"""Indices of queries -> the scores of all documents for each."""


class RetrievalSet:
    """A corpus, and queries with labelled documents.

    Attributes:
      kind: `"retrieval"`.
      data: the corpus, the queries and the labels.
      metrics: names of the metrics, the main one first; for all of them, higher is better.
      fingerprint: a digest of the corpus, the queries and the labels.
      inputs: both sides.
      sizes: the numbers of `documents`, `queries` and `relevant` pairs, and the nonzero counts in
        `Beir.left_out`.
    """

    kind = "retrieval"
    inputs: tuple[str, ...] = SIDES
    metrics = (MAIN_METRIC, *(name for name in GRADED_METRICS if name != MAIN_METRIC))

    def __init__(self, data: Beir) -> None:
        self.data = data
        self.sizes = {
            "documents": len(data.corpus),
            "queries": len(data.query_ids),
            "relevant": len(data.grades),
            **{name: count for name, count in data.left_out.items() if count},
        }
        labels = [column.tolist() for column in (data.queries, data.documents, data.grades)]
        content = [data.corpus.fingerprint, data.query_ids, data.query_texts, *labels]
        self.fingerprint = digest_of(json.dumps(content).encode())

    @property
    def description(self) -> str:
        """The sizes of the set."""
        return (
            f"retrieval for {counted(self.sizes['queries'], 'query', 'queries')} from "
            f"{counted(self.sizes['documents'], 'document')}, with "
            f"{counted(self.sizes['relevant'], 'relevant pair')}"
        )

    def evaluate(self, encode: Encode) -> Mapping[str, float]:
        """Rank all documents for every query by inner products.

        Args:
          encode: embeds the texts; documents are keys.

        Returns:
          The mean of each metric of `GRADED_METRICS` over the queries, and the sizes.

        Raises:
          ValueError: as for `rank`.
        """
        ranks = self.rank(encode)["dense"]
        means = {name: float(metric(ranks).mean()) for name, metric in GRADED_METRICS.items()}
        return means | self.sizes

    def rank(
        self,
        encode: Encode | None,
        *,
        methods: Sequence[str] = ("dense",),
        rrf_k: int | float = 60,
        tile: int | None = None,
    ) -> dict[str, GradedRanks]:
        """Rank all documents for every query by each method.

        Scores of tied documents are equal bit for bit, since inner products are summed in float64
        and rounded to float32. Memory: the vectors of all documents, and `tile` rows of scores.
        With several processes, each ranks a part of the queries.

        Args:
          encode: embeds the texts; `None` if no method reads embeddings.
          methods: some of `jaxcl.evaluation.retrieval.METHODS`.
          rrf_k: the constant of reciprocal rank fusion, for `"hybrid"`.
          tile: number of queries whose scores are in memory at a time; the result does not depend
            on it. `None` chooses it by the size of the corpus.

        Returns:
          The ranks of the relevant documents, by method.

        Raises:
          ValueError: for an unknown method, vectors that are not finite, or a corpus without words
            for BM25.
        """
        if not methods or not set(methods) <= set(METHODS):
            raise ValueError(f"methods={methods!r}; give one or more of {', '.join(METHODS)}")
        scorers: dict[str, _Scores] = {}
        if {"bm25", "hybrid"} & set(methods):
            scorers["bm25"] = self._lexical_scores()
        if {"dense", "hybrid"} & set(methods):
            scorers["dense"] = self._dense_scores(encode)
        tile = tile or int(np.clip(_TILE_SCORES // len(self.data.corpus), 1, 512))
        parts = np.array_split(np.arange(len(self.data.query_ids)), jax.process_count())
        part = parts[jax.process_index()]
        tiles = [part[first : first + tile] for first in range(0, len(part), tile)]
        places = together(lambda: self._places(tiles, scorers, methods, rrf_k))
        if jax.process_count() > 1:  # a pair has zeros in all processes except one
            places = multihost_utils.process_allgather(places.astype(np.int32)).sum(0)
        return {
            method: self._ranks(*of_method)
            for method, of_method in zip(methods, places, strict=True)
        }

    def _ranks(self, better: Int[np.ndarray, " n"], tied: Int[np.ndarray, " n"]) -> GradedRanks:
        data = self.data
        return GradedRanks(
            queries=data.queries,
            grades=data.grades,
            better=np.where(data.documents >= 0, better, np.inf),
            tied=np.where(data.documents >= 0, tied, 1),
            num_queries=len(data.query_ids),
        )

    def _places(
        self,
        tiles: Sequence[Int[np.ndarray, " _"]],
        scorers: Mapping[str, _Scores],
        methods: Sequence[str],
        rrf_k: int | float,
    ) -> Int[np.ndarray, "methods two n"]:
        """`places_of` the relevant documents of some queries by method; zeros for other queries."""
        data = self.data
        places = np.zeros((len(methods), 2, len(data.grades)), np.int64)
        bounds = np.searchsorted(data.queries, np.arange(len(data.query_ids) + 1))
        with progress_bar("ranking documents for queries", sum(map(len, tiles))) as advance:
            for tile in tiles:
                tables = {
                    name: self._without_own(scores(tile), tile) for name, scores in scorers.items()
                }
                for row, query in enumerate(tile):
                    pairs = np.arange(bounds[query], bounds[query + 1])
                    pairs = pairs[data.documents[pairs] >= 0]
                    for number, method in enumerate(methods):
                        scores = _scores_of(tables, row, method, rrf_k)
                        places[number][:, pairs] = places_of(scores, data.documents[pairs])
                    advance()
        return places

    def _without_own(
        self, scores: Float[np.ndarray, "q n"], queries: Int[np.ndarray, " q"]
    ) -> Float[np.ndarray, "q n"]:
        """Give a document with the same id as a query the lowest score for that query."""
        own = self.data.own_documents[queries]
        rows = np.flatnonzero(own >= 0)
        if rows.size:
            lowest = scores[rows].min(1)
            scores = scores.copy()
            scores[rows, own[rows]] = lowest - np.maximum(1, np.abs(lowest))
        return scores

    def _lexical_scores(self) -> _Scores:
        texts = self.data.query_texts
        with progress_bar("indexing words for BM25", len(self.data.corpus)) as advance:
            index = BM25(self._texts(advance))
        return lambda queries: index.scores([texts[query] for query in queries])

    def _texts(self, advance: Callable[[int], None]) -> Iterator[str]:
        """Yield the texts of all documents, read block by block to save memory."""
        corpus = self.data.corpus
        for first in range(0, len(corpus), _BLOCK_DOCUMENTS):
            rows = np.arange(first, min(first + _BLOCK_DOCUMENTS, len(corpus)))
            yield from corpus.read(rows)
            advance(len(rows))

    def _dense_scores(self, encode: Encode | None) -> _Scores:
        if encode is None:
            raise ValueError('"dense" and "hybrid" read embeddings; give encode')
        vectors = encode("query", self.data.query_texts)
        check_finite(vectors, "embeddings of queries")
        keys = self._embedded_corpus(encode)

        def scores(queries: Int[np.ndarray, " q"]) -> Float[np.ndarray, "q n"]:
            wide = vectors[queries].astype(np.float64)
            table = np.empty((len(wide), len(keys)), np.float32)
            for first in range(0, len(keys), _BLOCK_DOCUMENTS):
                block = slice(first, first + _BLOCK_DOCUMENTS)
                table[:, block] = wide @ keys[block].astype(np.float64).T
            return table

        return scores

    def _embedded_corpus(self, encode: Encode) -> Float[np.ndarray, "n d"]:
        corpus = self.data.corpus
        keys = np.empty((0, 0), np.float32)
        for first in range(0, len(corpus), _ENCODE_DOCUMENTS):
            rows = np.arange(first, min(first + _ENCODE_DOCUMENTS, len(corpus)))
            vectors = encode("key", corpus.read(rows))
            check_finite(vectors, "embeddings of documents", first=first)
            if first == 0:
                keys = np.empty((len(corpus), vectors.shape[1]), np.float32)
            keys[rows] = vectors
        return keys


def open_retrieval_set(path: AnyPath) -> RetrievalSet:
    """Open a BEIR folder, or one of its qrels files, and print a line for each kind of problem.

    Raises:
      ValueError, OSError: as for `jaxcl.data.beir.read_beir`.
    """
    data = read_beir(path)
    if jax.process_index() == 0:
        for name, (one, several) in _REMARKS.items():
            if count := data.left_out[name]:
                say(f"{path}: {(one if count == 1 else several).format(count=count)}")
    return RetrievalSet(data)


_REMARKS = {
    "queries_without_relevant": (
        "1 query has no relevant document, so its metrics are 0",
        "{count:,} queries have no relevant document, so their metrics are 0",
    ),
    "unknown_queries": (
        "1 query of the qrels has no text; it is left out",
        "{count:,} queries of the qrels have no text; they are left out",
    ),
    "unknown_documents": (
        "1 relevant document is not in the corpus, and counts as not found",
        "{count:,} relevant documents are not in the corpus, and count as not found",
    ),
    "own_documents": (
        "1 document has the id of a query, and is left out of that query's ranking",
        "{count:,} documents have the id of a query, and are left out of that query's ranking",
    ),
}
"""Name in `left_out` -> the message for one case, and for several."""


def _scores_of(
    tables: Mapping[str, Float[np.ndarray, "q n"]], row: int, method: str, rrf_k: int | float
) -> Float[np.ndarray, " n"]:
    if method != "hybrid":
        return tables[method][row]
    return reciprocal_rank_fusion([table[row : row + 1] for table in tables.values()], k=rrf_k)[0]
