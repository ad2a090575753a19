"""Searches a corpus, or the data of a run, with any model.

    python -m jaxcl.search --model models/minilm --corpus docs.jsonl parse an ISO 8601 date
    python -m jaxcl.search --workdir runs/code_search --top 3 parse an ISO 8601 date
    python -m jaxcl.search --model models/minilm --config configs/code_search.py parse a date

Without a query, the command prompts for queries.

With `--corpus`, it ranks documents: the lines of a `.txt` file, or the records of a `.jsonl`,
`.csv`, `.tsv` or `.parquet` file, which have a text and optionally an id and a title. Documents are
embedded once; the index is kept in the user's cache, or in `--index DIR`, and updated when the
model or the corpus changes. `--dim` truncates the vectors. `--precision int8` or `binary` searches
small codes first, and ranks the candidates by exact scores. The command prints how much of the
exact ranking these options keep.

Without `--corpus`, it ranks the keys of all splits of the run or config. The run may still be
training; the command changes only its index, `search_index.npz`, rebuilt for a newer checkpoint.

With a model of images, the corpus may be a folder of images, and the data of a run may hold images:

    python -m jaxcl.search --model models/clip --corpus photos --sheet cats a cat on a mat
    python -m jaxcl.search --workdir runs/image_text --image cat.jpg

The hits are also shown as a contact sheet, a PNG and an HTML page that needs no network.

In a program or a notebook, call `search`, or `open_search` for many queries:

    docs = open_search("models/minilm", corpus="docs.jsonl")
    docs("parse an ISO 8601 date", top=3)
    docs.batch(["parse a date", "open a socket"], top=3)
"""

import os
from argparse import Namespace
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxcl.data.documents import Documents, read_documents
from jaxcl.evaluation.retrieval import BM25, reciprocal_rank_fusion
from jaxcl.host.command import run_command
from jaxcl.host.command_flags import CommandParser, add_workdir_flag, user_path
from jaxcl.host.output import check_output
from jaxcl.host.paths import AnyPath, as_path, local_path
from jaxcl.host.progress import progress_bar, say
from jaxcl.host.user_folders import cache_folder
from jaxcl.run.corpus_index import (
    CorpusIndex,
    check_options,
    describe_kept,
    open_index,
    paths_digest,
)
from jaxcl.run.embedding_model import EmbeddingModel
from jaxcl.run.hit_sheet import write_hits
from jaxcl.run.hits import Hit, show_as_json, show_as_text, typed_queries
from jaxcl.run.host_vectors import for_inner_products
from jaxcl.run.image_documents import ImageFolder, ImageRows
from jaxcl.run.image_search import (
    read_image_folder,
    read_query_image,
    search_of_images,
    search_of_rows,
    side_of_images,
)
from jaxcl.run.load_model import is_run, load, model_of_run
from jaxcl.run.opened import open_run
from jaxcl.run.pool_index import (
    open_run_with_data,
    pool_index,
    pool_of_data,
    pool_of_run,
    sources_of,
)
from jaxcl.run.searcher import (
    Search,
    check_query,
    check_reads,
    check_top,
    check_without_corpus,
    embedded_queries,
    image_ranker,
    text_ranker,
)
from jaxcl.run.vector_search import PRECISIONS, RESCORE, Ranking, VectorSearch, best_rows
from jaxcl.settings.command_line import add_config_flags, changed_fields, optional_config_of
from jaxcl.settings.derived import origin_of
from jaxcl.settings.parts import Trust
from jaxcl.settings.read import read_data_settings

__all__ = ["Hit", "Search", "main", "open_search", "search"]

_RRF_K = 60
_BLOCK_TEXTS = 4096


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = CommandParser("jaxcl.search", __doc__)
    parser.add_argument("query", nargs="*", help="the query; if left out, the command prompts")
    add_workdir_flag(parser, required=False)
    model_help = "instead of --workdir: any model that jaxcl.load accepts"
    parser.add_argument("--model", metavar="PATH", type=user_path, help=model_help)
    _add_corpus_flags(parser)
    add_config_flags(parser, required=False)
    parser.add_argument("--image", metavar="FILE", type=user_path, help="instead of a text")
    sheet_help = "write the images to NAME.png and NAME.html (for a run: WORKDIR/sheets/search)"
    parser.add_argument("--sheet", metavar="NAME", type=user_path, help=sheet_help)
    parser.add_argument("--top", type=int, default=10, help="number of hits (default: 10)")
    parser.add_argument("--hybrid", action="store_true", help="fuse the ranking with BM25's")
    parser.add_argument("--json", action="store_true", help="print a JSON list for each query")
    run_command(parser, _run, argv, interrupted="interrupted; the same command resumes")


def _add_corpus_flags(parser: CommandParser) -> None:
    parser.add_argument("--corpus", metavar="FILE", type=user_path, help="the documents to search")
    parser.add_argument("--id-field", metavar="NAME", help="field of the documents' ids")
    parser.add_argument("--text-field", metavar="NAME", help="field of the documents' texts")
    index_help = "folder for the corpus index (default: in the user's cache)"
    parser.add_argument("--index", metavar="DIR", help=index_help)
    parser.add_argument("--dim", type=int, help="number of leading dimensions to search with")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="type of the vectors for the first search (default: float32)",
    )
    defaults = ", ".join(f"{number} for {precision}" for precision, number in RESCORE.items())
    parser.add_argument(
        "--rescore",
        type=int,
        metavar="N",
        help=f"number of candidates per hit to rank by exact scores (default: {defaults})",
    )


def _run(arguments: Namespace) -> None:
    show = show_as_json if arguments.json else show_as_text
    check_top(arguments.top)
    query = " ".join(arguments.query)
    if arguments.query:
        check_query(query)
    if arguments.query and arguments.image is not None:
        raise ValueError("a query and --image are both given; leave one of them out")
    image = None if arguments.image is None else read_query_image(arguments.image)
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
        queries="text" if image is None else "image",
        trust=arguments.trust,
    )
    for line in describe_kept(opened.kept, arguments.dim, arguments.precision):
        say(line)
    sheet = _sheet_of(arguments, opened)
    typed = typed_queries(prompt="" if arguments.json else "search> ")
    for text in [query] if query or image is not None else typed:
        hits = opened(text or None, arguments.top, image=image)
        show(text, hits)
        check_output()
        if sheet is not None:
            write_hits(sheet, text if image is None else image, hits)
            say(f"the images are in {sheet}.png and {sheet}.html")


def _sheet_of(arguments: Namespace, opened: Search) -> AnyPath | None:
    """The path of the contact sheet without its suffix; `None` for no sheet."""
    if not opened.of_images:
        if arguments.sheet is not None:
            raise ValueError(f"--sheet={arguments.sheet} has no effect on a search over texts")
        return None
    if arguments.sheet is None and arguments.workdir is not None and arguments.corpus is None:
        return origin_of(arguments.workdir)[0] / "sheets" / "search"
    return arguments.sheet


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
    """Search for one query. For several queries, `open_search` is faster.

    Args:
      path, corpus, config, hybrid, trust: as for `open_search`.
      query: text to search for.
      top: number of hits; a smaller pool gives fewer.

    Raises:
      ValueError, CheckpointError: as for `open_search`, and if `top` is less than 1.
    """
    check_top(top)
    options: dict[str, Any] = {"corpus": corpus, "config": config, "hybrid": hybrid}
    return open_search(path, **options, queries="text", trust=trust)(query, top)


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
    queries: str | None = None,
    trust: Trust = (),
) -> Search:
    """Open a corpus, a run's data or a config's data to search it with a model.

    The model and the data stay unchanged; only an index is written. If a run has an index for its
    newest checkpoint, its data may be missing, unless they hold images. If a side of a run holds
    images, these images are searched.

    Args:
      path: the workdir of a run that has saved a checkpoint, which may still be training; with a
        corpus or config, any path that `jaxcl.load` accepts; with a corpus, also a loaded model.
      corpus: a file of documents for `jaxcl.data.documents.read_documents`, or a folder of images.
      config: the config of the data to search. Without corpus and config, a run's own data.
      changed: dotted names of the fields that the user changed; one without effect is an error.
      hybrid: whether to fuse the model's ranking with BM25's, by reciprocal rank fusion with the
        constant `evaluation.rrf_k` of the run or config, or else 60.
      index: folder for the index of a corpus; by default, in the user's cache.
      id_field, text_field: as for `read_documents`.
      dim: number of leading dimensions to search a corpus with; vectors are normalised again.
      precision: how to search a corpus. `"float32"` ranks all documents by exact scores. `"int8"`
        and `"binary"` find candidates by codes of a quarter or a thirty-second of the size, and
        rank the candidates by exact scores.
      rescore: number of candidates per hit; by default, 2 for `"int8"` and 20 for `"binary"`.
      queries: `"text"` or `"image"`; it is an error at once if the model does not embed these.
      trust: packages from which parts named `package.module:function` may be imported.

    Returns:
      The search. Its scores are inner products of `jaxcl.run.host_vectors.for_inner_products`,
      which are cosines for most models. With `hybrid`, they are sums of reciprocal ranks.

    Raises:
      ValueError: if there is no model, a run has no checkpoint, an option is out of range or has no
        effect, a document is not valid, or both the index and the data are missing.
      CheckpointError: if no checkpoint can be read.
      OSError: if the corpus cannot be read, or its index cannot be written.
    """
    if corpus is None:
        options = {"index": index, "id_field": id_field, "text_field": text_field, "dim": dim}
        options |= {"rescore": rescore, "precision": None if precision == "float32" else precision}
        check_without_corpus(options)
        if isinstance(path, EmbeddingModel):
            raise ValueError("a loaded model comes without data; give a corpus to search")
        return _search_of_pool(path, config, changed, queries, hybrid=hybrid, trust=trust)
    if config is not None:
        raise ValueError("a corpus and a config are both given; leave one of them out")
    model, rrf_k = _open_model(path, trust)
    check_reads(model, queries)
    rescore = check_options(model, dim, precision, rescore)
    fields: dict[str, Any] = {"id_field": id_field, "text_field": text_field}
    folder = cache_folder() / "search" if index is None else local_path(index)
    documents: Documents | ImageFolder
    if not as_path(corpus).is_dir():
        with progress_bar("reading documents", None) as advance:
            documents = read_documents(
                as_path(corpus), id_field=id_field, text_field=text_field, advance=advance
            )
    try:
        if as_path(corpus).is_dir():
            options = fields | {"hybrid": hybrid or None}
            documents = read_image_folder(as_path(corpus), options, folder)
        opened = open_index(
            model,
            documents,
            folder,
            paths=paths_digest(as_path(corpus), model, fields),
            dim=dim,
            precision=precision,
            rescore=rescore,
        )
    except OSError as error:
        raise OSError(f"cannot write the index ({error}); set another --index folder") from error
    if isinstance(documents, ImageFolder):
        return search_of_images(model, documents, opened, dim)
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

    rank_images = None if rrf_k is not None else image_ranker(model, index.search, dim)
    rank = _rank(model, index.search, dim, texts(), rrf_k)
    return Search(rank, records, index.kept, rank_images=rank_images)


def _search_of_pool(
    path: str | os.PathLike[str],
    config: ConfigDict | None,
    changed: Collection[str],
    queries: str | None,
    *,
    hybrid: bool,
    trust: Trust,
) -> Search:
    if config is None:
        run = open_run_with_data(path, trust=trust)
        if (side := side_of_images(run.settings)) is not None:
            rows, model = ImageRows(run.sources(), side), model_of_run(run)
            return search_of_rows(model, rows, run.workdir, queries, hybrid=hybrid)
        pool = pool_of_run(run)
    else:
        settings = read_data_settings(config, changed=changed)
        if (side := side_of_images(settings)) is not None:
            rows = ImageRows(sources_of(settings), side)
            model, origin = load(path, trust=trust), as_path(path)
            return search_of_rows(model, rows, origin, queries, hybrid=hybrid)
        pool = pool_of_data(path, settings, trust=trust)
    check_reads(pool.model, queries)
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
    """Make the function that ranks the rows of a pool, fused with BM25 if `rrf_k` is given."""
    if rrf_k is None:
        return text_ranker(model, search, dim)
    lexical = BM25(texts)

    def rank(queries: Sequence[str], top: int) -> list[Ranking]:
        vectors = embedded_queries(model, queries, dim)
        rankings = []
        for query, vector in zip(queries, vectors, strict=True):  # the scores of all rows are large
            tables = [lexical.scores([query]), search.scores(vector[None], top)]
            fused = reciprocal_rank_fusion(tables, k=rrf_k)[0]
            rows = best_rows(fused, top)
            rankings.append(Ranking(rows, fused[rows]))
        return rankings

    return rank


def _open_model(
    path: str | os.PathLike[str] | EmbeddingModel, trust: Trust
) -> tuple[EmbeddingModel, int]:
    """Open a model, and return it with the constant of reciprocal rank fusion to use."""
    if isinstance(path, EmbeddingModel):
        return path, _RRF_K
    if is_run(path):
        run = open_run(as_path(path), trust=trust)
        return model_of_run(run), run.settings.evaluation.rrf_k
    return load(path, trust=trust), _RRF_K


if __name__ == "__main__":
    main()
