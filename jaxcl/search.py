"""Searches a corpus, or the data of a run, with any model.

    python -m jaxcl.search --model models/minilm --corpus docs.jsonl parse an ISO 8601 date
    python -m jaxcl.search --workdir runs/code_search --top 3 parse an ISO 8601 date
    python -m jaxcl.search --model models/minilm --config configs/code_search.py parse a date

Without a query, the command prompts for queries. It ranks

- the documents of `--corpus`: lines of a `.txt` file, or records with a text, and optionally an id
  and a title, of `.jsonl`, `.csv`, `.tsv` or `.parquet`. They are embedded once. The index is kept
  in the user's cache, or in `--index DIR`, and updated for a changed model or corpus. `--dim` cuts
  the vectors; `--precision int8` or `binary` searches small codes first, and ranks the best of them
  by exact scores. The share of the exact ranking that they keep is printed.
- otherwise, the keys of all splits of the run or config. The run may still be training, and stays
  unchanged except for `search_index.npz`, its index, which is rebuilt for a newer checkpoint.

In a program or a notebook, call `search`, or `open_search` for many queries:

    docs = open_search("models/minilm", corpus="docs.jsonl")
    docs("parse an ISO 8601 date", top=3)
    docs.batch(["parse a date", "open a socket"], top=3)
"""

import contextlib
import os
from argparse import Namespace
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxcl.data.documents import Documents, read_documents
from jaxcl.evaluation.retrieval import BM25, reciprocal_rank_fusion
from jaxcl.host.command import run_command
from jaxcl.host.command_flags import CommandParser, add_workdir_flag, user_path
from jaxcl.host.output import check_output
from jaxcl.host.paths import as_path, local_path
from jaxcl.host.progress import progress_bar, say
from jaxcl.host.user_folders import cache_folder
from jaxcl.run.corpus_index import (
    CorpusIndex,
    check_options,
    kept_in_words,
    open_index,
    place_of,
    query_vectors,
)
from jaxcl.run.embedding_model import EmbeddingModel
from jaxcl.run.hits import Hit, show_as_json, show_as_text
from jaxcl.run.host_vectors import for_inner_products
from jaxcl.run.load_model import is_run, load, model_of_run
from jaxcl.run.opened import open_run
from jaxcl.run.pool_index import pool_index, pool_of_data, pool_of_run
from jaxcl.run.vector_search import PRECISIONS, RESCORE, Ranking, VectorSearch, best_rows
from jaxcl.settings.command_line import add_config_flags, changed_fields, optional_config_of
from jaxcl.settings.parts import Trust
from jaxcl.settings.read import read_data_settings

__all__ = ["Hit", "Search", "main", "open_search", "search"]

_RRF_K = 60
_BLOCK_TEXTS = 4096


class Search:
    """A search for queries in one pool, as returned by `open_search`.

    Attributes:
      kept: measured shares of the exact ranking, as `jaxcl.run.corpus_index.CorpusIndex.kept`.
    """

    def __init__(
        self,
        rank: Callable[[Sequence[str], int], list[Ranking]],
        records: Callable[[Sequence[int]], list[dict[str, Any]]],
        kept: Mapping[str, float] | None = None,
    ):
        self._rank = rank
        self._records = records
        self.kept = kept or {}

    def __call__(self, query: str, top: int = 10) -> list[Hit]:
        """The best hits for one query, as `batch`."""
        return self.batch([query], top)[0]

    def batch(self, queries: Sequence[str], top: int = 10) -> list[list[Hit]]:
        """The best hits for each query, which is faster than one query at a time.

        Args:
          queries: what to look for.
          top: the number of hits; fewer if the pool is smaller.

        Returns:
          For each query its hits, best first; of equal scores, the lower row of the pool first.

        Raises:
          ValueError: for an empty query, or if `top` is less than 1.
        """
        _check_top(top)
        if isinstance(queries, str):
            raise ValueError("batch takes a list of queries; call the search itself for one query")
        for query in queries:
            _check_query(query)
        return [
            [
                Hit(float(score), record)
                for score, record in zip(
                    ranking.scores, self._records(ranking.rows.tolist()), strict=True
                )
            ]
            for ranking in (self._rank(queries, top) if queries else [])
        ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = CommandParser("jaxcl.search", __doc__)
    parser.add_argument("query", nargs="*", help="what to look for; prompts for it if left out")
    add_workdir_flag(parser, required=False)
    parser.add_argument(
        "--model",
        metavar="PATH",
        type=user_path,
        help="instead of a run: any model that jaxcl.load accepts",
    )
    _add_corpus_flags(parser)
    add_config_flags(parser, required=False)
    parser.add_argument("--top", type=int, default=10, help="hits to show (default: 10)")
    parser.add_argument("--hybrid", action="store_true", help="rank by BM25 as well")
    parser.add_argument("--json", action="store_true", help="print a JSON list for each query")
    run_command(parser, _run, argv, interrupted="interrupted; the same command resumes")


def _add_corpus_flags(parser: CommandParser) -> None:
    parser.add_argument("--corpus", metavar="FILE", type=user_path, help="the documents to search")
    parser.add_argument("--id-field", metavar="NAME", help="field of the documents' ids")
    parser.add_argument("--text-field", metavar="NAME", help="field of the documents' texts")
    parser.add_argument("--index", metavar="DIR", help="folder for the index of the corpus")
    parser.add_argument("--dim", type=int, help="search by this many first dimensions")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="type of the vectors that are searched first (default: float32)",
    )
    defaults = ", ".join(f"{number} for {precision}" for precision, number in RESCORE.items())
    parser.add_argument(
        "--rescore",
        type=int,
        metavar="N",
        help=f"candidates per hit that are ranked by exact scores (default: {defaults})",
    )


def _run(arguments: Namespace) -> None:
    show = show_as_json if arguments.json else show_as_text
    _check_top(arguments.top)
    query = " ".join(arguments.query)
    if arguments.query:
        _check_query(query)
    if (arguments.workdir is None) == (arguments.model is None):
        raise ValueError("give either --workdir with a run, or --model")
    opened = open_search(
        arguments.workdir or arguments.model,
        corpus=arguments.corpus,
        config=optional_config_of(arguments),
        changed=changed_fields(arguments),
        hybrid=arguments.hybrid,
        index=arguments.index,
        id_field=arguments.id_field,
        text_field=arguments.text_field,
        dim=arguments.dim,
        precision=arguments.precision,
        rescore=arguments.rescore,
        trust=arguments.trust,
    )
    for line in kept_in_words(opened.kept, arguments.dim, arguments.precision):
        say(line)
    for asked in [query] if query else _asked(prompt="" if arguments.json else "search> "):
        show(asked, opened(asked, arguments.top))
        check_output()


def search(
    path: str | os.PathLike[str],
    query: str,
    *,
    top: int = 10,
    corpus: str | os.PathLike[str] | None = None,
    config: ConfigDict | None = None,
    hybrid: bool = False,
    trust: Trust = (),
) -> list[Hit]:
    """Search for one query; `open_search` is faster for several.

    Args:
      path, corpus, config, hybrid, trust: as `open_search`.
      query: what to look for.
      top: the number of hits.

    Raises:
      ValueError, CheckpointError: as `open_search`, and if `top` is less than 1.
    """
    _check_top(top)
    opened = open_search(path, corpus=corpus, config=config, hybrid=hybrid, trust=trust)
    return opened(query, top)


def _check_query(query: str) -> None:
    if not query.strip():
        raise ValueError("the query is empty; say what to look for, or leave it out to be asked")
    try:
        query.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the query {query!r} is not Unicode; set the terminal, or LANG, to UTF-8"
        ) from error


def _check_top(top: int) -> None:
    if top < 1:
        raise ValueError(f"--top={top} shows nothing; give 1 or more")


def open_search(
    path: str | os.PathLike[str] | EmbeddingModel,
    *,
    corpus: str | os.PathLike[str] | None = None,
    config: ConfigDict | None = None,
    changed: Collection[str] = (),
    hybrid: bool = False,
    index: str | os.PathLike[str] | None = None,
    id_field: str | None = None,
    text_field: str | None = None,
    dim: int | None = None,
    precision: str = "float32",
    rescore: int | None = None,
    trust: Trust = (),
) -> Search:
    """Open a corpus, a run's data or a config's data for searching with a model.

    The model and the data stay unchanged; only an index is written. With an index of the newest
    checkpoint, a run's data need not be there.

    Args:
      path: the workdir of a run that has saved a checkpoint, which may still be training; with a
        corpus or config, any path that `jaxcl.load` accepts; with a corpus, also a loaded model.
      corpus: a file of documents for `jaxcl.data.documents.read_documents`.
      config: the config of the data to search. Without corpus and config, a run's own data.
      changed: dotted names of the fields that the user changed; one without effect is an error.
      hybrid: fuse the embedder's ranking with BM25's, with the constant `evaluation.rrf_k` of the
        run or config, or 60.
      index: the folder for the index of a corpus; by default, the user's cache.
      id_field, text_field: as `read_documents`.
      dim: search a corpus by this many first dimensions, normalised again.
      precision: how a corpus is searched: `"float32"` ranks all documents by exact scores. `"int8"`
        and `"binary"` find candidates by codes of a quarter, or a thirty-second, of the size, and
        rank the candidates by exact scores.
      rescore: the number of candidates per hit; by default, 2 for `"int8"` and 20 for `"binary"`.
      trust: packages whose code the run may name.

    Returns:
      The search. Scores are inner products of `jaxcl.run.host_vectors.for_inner_products`, which
      are cosines for most models; with `hybrid`, they are sums of reciprocal ranks.

    Raises:
      ValueError: if there is no model, a run has no checkpoint, an option is out of range or has no
        effect, a document is not valid, or there is no index and the data are missing.
      CheckpointError: if no checkpoint can be read.
      OSError: if the corpus cannot be read, or its index cannot be written.
    """
    if corpus is None:
        given = {"index": index, "id_field": id_field, "text_field": text_field, "dim": dim}
        given |= {"rescore": rescore, "precision": None if precision == "float32" else precision}
        _check_without_corpus(given)
        if isinstance(path, EmbeddingModel):
            raise ValueError("a model comes without data; give a corpus to search")
        return _search_of_pool(path, config, changed, hybrid=hybrid, trust=trust)
    if config is not None:
        raise ValueError("both a corpus and a config name data to search; give one of them")
    model, rrf_k = _open_model(path, trust)
    rescore = check_options(model, dim, precision, rescore)
    fields = {"id_field": id_field, "text_field": text_field}
    with progress_bar("reading documents", None) as advance:
        documents = read_documents(
            as_path(corpus), id_field=id_field, text_field=text_field, advance=advance
        )
    try:
        opened = open_index(
            model,
            documents,
            cache_folder() / "search" if index is None else local_path(index),
            place=place_of(as_path(corpus), model, fields),
            dim=dim,
            precision=precision,
            rescore=rescore,
        )
    except OSError as error:
        raise OSError(f"cannot write the index ({error}); choose a folder with --index") from error
    return _search_of_corpus(model, documents, opened, dim, rrf_k if hybrid else None)


def _search_of_corpus(
    model: EmbeddingModel,
    documents: Documents,
    index: CorpusIndex,
    dim: int | None,
    rrf_k: int | None,
) -> Search:
    def records(rows: Sequence[int]) -> list[dict[str, Any]]:
        texts = documents.read(rows)
        return [
            {"id": documents.ids[row], "text": text} for row, text in zip(rows, texts, strict=True)
        ]

    def texts() -> Iterator[str]:
        with progress_bar("indexing words for BM25", len(documents)) as advance:
            for first in range(0, len(documents), _BLOCK_TEXTS):
                rows = np.arange(first, min(first + _BLOCK_TEXTS, len(documents)))
                yield from documents.read(rows)
                advance(len(rows))

    return Search(_rank(model, index.search, dim, texts(), rrf_k), records, index.kept)


def _search_of_pool(
    path: str | os.PathLike[str],
    config: ConfigDict | None,
    changed: Collection[str],
    *,
    hybrid: bool,
    trust: Trust,
) -> Search:
    if config is None:
        pool = pool_of_run(path, trust=trust)
    else:
        pool = pool_of_data(path, read_data_settings(config, changed=changed), trust=trust)
    index = pool_index(pool)
    keys = for_inner_products(pool.model.similarity_function, "key", index.keys)
    texts = (row["key"] for row in index.rows)
    rank = _rank(pool.model, VectorSearch(keys), None, texts, pool.rrf_k if hybrid else None)
    return Search(rank, lambda rows: [index.rows[row] for row in rows])


def _rank(
    model: EmbeddingModel,
    search: VectorSearch,
    dim: int | None,
    texts: Iterable[str],
    rrf_k: int | None,
) -> Callable[[Sequence[str], int], list[Ranking]]:
    """A function that ranks the rows of a pool; with `rrf_k`, by BM25 on the texts as well."""
    lexical = None if rrf_k is None else BM25(texts)

    def rank(queries: Sequence[str], top: int) -> list[Ranking]:
        vectors = query_vectors(model, model.encode(list(queries)), dim)
        if not np.isfinite(vectors).all():
            raise ValueError("the embedding of a query is not finite; check the model")
        if lexical is None or rrf_k is None:
            return search.best(vectors, top)
        rankings = []
        for query, vector in zip(queries, vectors, strict=True):  # a table of scores is large
            tables = [lexical.scores([query]), search.scores(vector[None], top)]
            fused = reciprocal_rank_fusion(tables, k=rrf_k)[0]
            rows = best_rows(fused, top)
            rankings.append(Ranking(rows, fused[rows]))
        return rankings

    return rank


def _open_model(
    path: str | os.PathLike[str] | EmbeddingModel, trust: Trust
) -> tuple[EmbeddingModel, int]:
    """A model, and the constant of reciprocal rank fusion to use with it."""
    if isinstance(path, EmbeddingModel):
        return path, _RRF_K
    if is_run(path):
        run = open_run(as_path(path), trust=trust)
        return model_of_run(run), run.settings.evaluation.rrf_k
    return load(path, trust=trust), _RRF_K


def _check_without_corpus(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name}={value} is for a corpus; give one, or leave {name} out")


def _asked(*, prompt: str) -> Iterator[str]:
    """Queries as they are typed, up to an empty line, Ctrl-D or Ctrl-C."""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while query := input(prompt).strip():
            yield query


if __name__ == "__main__":
    main()
