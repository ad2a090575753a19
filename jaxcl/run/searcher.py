"""A search in one pool of documents, keys or images, as `jaxcl.search.open_search` returns it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxcl.run.corpus_index import query_vectors
from jaxcl.run.embedding_model import EmbeddingModel
from jaxcl.run.hits import Hit
from jaxcl.run.vector_search import Ranking, VectorSearch
from jaxcl.typing import Float

__all__ = [
    "Search",
    "check_query",
    "check_reads",
    "check_top",
    "check_without_corpus",
    "embedded_queries",
    "image_ranker",
    "text_ranker",
]


class Search:
    """A search in one pool of documents, keys or images, as returned by `open_search`.

    Attributes:
      kept: measured shares of the exact ranking, as in `jaxcl.run.corpus_index.CorpusIndex.kept`.
      of_images: whether the pool holds images; then the record of a hit has an `"image"`.
    """

    def __init__(
        self,
        rank: Callable[[Sequence[str], int], list[Ranking]],
        records: Callable[[Sequence[int]], list[dict[str, Any]]],
        kept: Mapping[str, float] | None = None,
        *,
        rank_images: Callable[[Sequence[Any], int], list[Ranking]] | None = None,
        of_images: bool = False,
    ):
        self._rank, self._rank_images = rank, rank_images
        self._records = records
        self.kept = kept or {}
        self.of_images = of_images

    def __call__(self, query: str | None = None, top: int = 10, *, image: Any = None) -> list[Hit]:
        """Return the best hits for one query.

        Args:
          query: a text to search for.
          top: number of hits; a smaller pool gives fewer.
          image: instead of a text, an image to search for, as `EmbeddingModel.encode` accepts it.

        Raises:
          ValueError: as for `batch`, if not exactly one of text and image is given, or if the model
            does not embed images.
        """
        if (query is None) == (image is None):
            raise ValueError("give either a text or an image to search for")
        if query is not None:
            return self.batch([query], top)[0]
        check_top(top)
        if self._rank_images is None:
            raise ValueError("the model does not embed images; give a text")
        return self._hits(self._rank_images([image], top))[0]

    def batch(self, queries: Sequence[str], top: int = 10) -> list[list[Hit]]:
        """Return the best hits for each of several queries, faster than one query at a time.

        Args:
          queries: texts to search for.
          top: number of hits per query; a smaller pool gives fewer.

        Returns:
          The hits for each query, best first. Hits with equal scores are in the order of the pool.

        Raises:
          ValueError: for an empty query, or if `top` is less than 1.
        """
        check_top(top)
        if isinstance(queries, str):
            raise ValueError("batch takes a list of queries; for one query, call the search itself")
        for query in queries:
            check_query(query)
        return self._hits(self._rank(queries, top) if queries else [])

    def _hits(self, rankings: Sequence[Ranking]) -> list[list[Hit]]:
        return [
            [
                Hit(float(score), record)
                for score, record in zip(
                    ranking.scores, self._records(ranking.rows.tolist()), strict=True
                )
            ]
            for ranking in rankings
        ]


def embedded_queries(
    model: EmbeddingModel, queries: Sequence[str], dim: int | None
) -> Float[np.ndarray, "q _"]:
    """The embeddings of texts, ready for inner products.

    Raises:
      ValueError: if an embedding is not finite.
    """
    vectors = query_vectors(model, model.encode(list(queries)), dim)
    if not np.isfinite(vectors).all():
        raise ValueError("the embedding of a query is not finite; check the model")
    return vectors


def text_ranker(
    model: EmbeddingModel, search: VectorSearch, dim: int | None = None
) -> Callable[[Sequence[str], int], list[Ranking]]:
    """Make the function that ranks a pool for texts."""
    return lambda queries, top: search.best(embedded_queries(model, queries, dim), top)


def image_ranker(
    model: EmbeddingModel, search: VectorSearch, dim: int | None = None
) -> Callable[[Sequence[Any], int], list[Ranking]] | None:
    """Make the function that ranks a pool for images; `None` if the model does not embed images."""
    if "image" not in model.modality.values():
        return None

    def rank(images: Sequence[Any], top: int) -> list[Ranking]:
        vectors = query_vectors(model, model.encode(images=list(images)), dim)
        if not np.isfinite(vectors).all():
            raise ValueError("the embedding of an image is not finite; check the model")
        return search.best(vectors, top)

    return rank


def check_reads(model: EmbeddingModel, queries: str | None) -> None:
    """Raise a `ValueError` if a model does not embed queries of a modality; `None` for any."""
    if queries is None or queries in model.modality.values():
        return
    if queries == "text":
        raise ValueError(
            f"{model.source} does not embed texts, only images; search with --image FILE, or in a "
            "program with image=…"
        )
    raise ValueError(f"{model.source} does not embed images, only texts; search for a text")


def check_without_corpus(options: Mapping[str, Any]) -> None:
    """Raise a `ValueError` if an option for a corpus is set."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name}={value} has no effect without a corpus; leave it out")


def check_query(query: str) -> None:
    """Raise a `ValueError` for a query that is empty or not Unicode."""
    if not query.strip():
        raise ValueError("the query is empty; give a text, or leave it out to be prompted for one")
    try:
        query.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the query {query!r} is not Unicode; set the terminal, or LANG, to UTF-8"
        ) from error


def check_top(top: int) -> None:
    """Raise a `ValueError` for a number of hits below 1."""
    if top < 1:
        raise ValueError(f"--top={top} must be at least 1")
