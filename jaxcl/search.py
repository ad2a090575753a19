"""Searches the keys of all splits with the model of a run, or with any other model.

    python -m jaxcl.search --workdir runs/code_search --top 3 parse an ISO 8601 date
    python -m jaxcl.search --model models/minilm --config configs/code_search.py parse a date

Without a query, the command prompts for queries. The pool is the data of the run, or of a config.
The run may still be training, and stays unchanged except for `search_index.npz`, the embeddings of
the pool, which is rebuilt for a newer checkpoint. The index of a config's pool is in the user's
cache.

In a program or a notebook, call `search`, or `open_search` for many queries:

    search(Path("runs/code_search"), "parse an ISO 8601 date", top=3)
"""

import contextlib
import itertools
import json
import os
import re
from argparse import Namespace
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxcl.data.prepare import open_sources
from jaxcl.data.row_prompts import RowPrompts
from jaxcl.data.sources import PairSource
from jaxcl.evaluation.retrieval import BM25, dense_scores, reciprocal_rank_fusion
from jaxcl.host.command import run_command
from jaxcl.host.command_flags import CommandParser, add_workdir_flag, user_path
from jaxcl.host.files import digest_of, write_npz
from jaxcl.host.npz import read_npz
from jaxcl.host.output import check_output
from jaxcl.host.paths import AnyPath, as_path
from jaxcl.host.printable import printable
from jaxcl.host.progress import progress_bar, say
from jaxcl.host.user_folders import cache_folder, shared_folder
from jaxcl.run.embedding_model import EmbeddingModel
from jaxcl.run.encode_rows import encode_rows
from jaxcl.run.host_vectors import for_inner_products
from jaxcl.run.load_model import is_run, load, model_of_run
from jaxcl.run.opened import open_run
from jaxcl.settings.command_line import add_config_flags, changed_fields, optional_config_of
from jaxcl.settings.parts import Trust
from jaxcl.settings.read import read_data_settings
from jaxcl.typing import Float

__all__ = ["Hit", "Search", "main", "open_search", "search"]

INDEX_FILE = "search_index.npz"
_CHUNK_ROWS = 4096
_DEFINITION = re.compile(r"\s*(async\s+)?def\s")


class Hit(NamedTuple):
    """One row that was found: its score, and the row with its texts and metadata."""

    score: float
    record: dict[str, Any]


Search = Callable[[str, int], list[Hit]]
"""`(query, top) -> hits`, best first; among equal scores the lower row of the pool first."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = CommandParser("jaxcl.search", __doc__)
    parser.add_argument("query", nargs="*", help="what to look for; left out, it is asked for")
    add_workdir_flag(parser, required=False)
    parser.add_argument(
        "--model",
        metavar="PATH",
        type=user_path,
        help="instead of a run: any model that jaxcl.load accepts",
    )
    add_config_flags(parser, required=False)
    parser.add_argument("--top", type=int, default=10, help="hits to show (default: 10)")
    parser.add_argument("--hybrid", action="store_true", help="rank by BM25 as well")
    parser.add_argument("--json", action="store_true", help="print a JSON list for each query")
    run_command(parser, _run, argv)


def _run(arguments: Namespace) -> None:
    show = _show_as_json if arguments.json else _show_as_text
    _check_top(arguments.top)
    query = " ".join(arguments.query)
    if arguments.query:
        _check_query(query)
    if (arguments.workdir is None) == (arguments.model is None):
        raise ValueError("give either --workdir with a run, or --model")
    ranked = open_search(
        arguments.workdir or arguments.model,
        config=optional_config_of(arguments),
        changed=changed_fields(arguments),
        hybrid=arguments.hybrid,
        trust=arguments.trust,
    )
    for asked in [query] if query else _asked(prompt="" if arguments.json else "search> "):
        show(ranked(asked, arguments.top))
        check_output()


def search(
    path: str | os.PathLike[str],
    query: str,
    *,
    top: int = 10,
    config: ConfigDict | None = None,
    hybrid: bool = False,
    trust: Trust = (),
) -> list[Hit]:
    """Search a pool for one query; `open_search` is faster for several.

    Args:
      path, config: as `open_search`.
      query: what to look for.
      top: the number of hits.
      hybrid: whether BM25's ranking is fused with the embedder's.
      trust: packages whose code the run may name.

    Raises:
      ValueError, CheckpointError: as `open_search`, and if `top` is less than 1.
    """
    _check_top(top)
    return open_search(path, config=config, hybrid=hybrid, trust=trust)(query, top)


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
    path: str | os.PathLike[str],
    *,
    config: ConfigDict | None = None,
    changed: Collection[str] = (),
    hybrid: bool = False,
    trust: Trust = (),
) -> Search:
    """Open a run or another model for searching; only the index of a run is written.

    The index holds the pool's embeddings and its rows. With an index of the newest checkpoint the
    data that the run was trained on are not needed.

    Args:
      path: the workdir of a run that has saved a checkpoint, which may still be training; with a
        config, any model that `jaxcl.load` accepts.
      config: the config of the data to search; `None` for the run's own data.
      changed: dotted names of the fields that the user changed; one without effect is an error.
      hybrid: fuse the embedder's ranking with BM25's, with the constant `evaluation.rrf_k`.
      trust: packages whose code the run may name.

    Returns:
      The search. Scores are inner products of `jaxcl.run.host_vectors.for_inner_products`, which
      are cosines for most models; with `hybrid`, they are sums of reciprocal ranks.

    Raises:
      ValueError: if there is no model, a run has no checkpoint, or there is no index and the data
        are missing.
      CheckpointError: if no checkpoint can be read.
    """
    pool = _pool_of_run(path, trust) if config is None else _pool_of(path, config, changed, trust)
    model, index = pool.model, _read_index(pool.index_file, pool.made_from)
    if index is None:
        index = _build_index(model, *pool.sources())
        _write_index(pool.index_file, pool.made_from, index)
    lexical = BM25([row["key"] for row in index.rows]) if hybrid else None
    keys = for_inner_products(model.similarity_function, "key", index.keys)

    def ranked(query: str, top: int) -> list[Hit]:
        _check_query(query)
        vector = for_inner_products(model.similarity_function, "query", model.encode([query]))
        scores = dense_scores(vector, keys)
        if lexical is not None:
            scores = reciprocal_rank_fusion([lexical.scores([query]), scores], k=pool.rrf_k)
        best = np.argsort(-scores[0], kind="stable")[:top]  # stable: of equals, the lowest row
        return [Hit(float(scores[0, row]), index.rows[row]) for row in best]

    return ranked


class _Pool(NamedTuple):
    """A model and the texts that it searches.

    Attributes:
      model: embeds queries and keys.
      sources: a function that opens the splits, and gives the prompts of their rows where they
        replace the model's.
      index_file: path of the index.
      made_from: identifies the content of the index, in JSON types.
      rrf_k: the constant of reciprocal rank fusion.
    """

    model: EmbeddingModel
    sources: Callable[[], tuple[Mapping[str, PairSource], Mapping[str, RowPrompts]]]
    index_file: AnyPath
    made_from: Mapping[str, Any]
    rrf_k: int


def _pool_of_run(path: str | os.PathLike[str], trust: Trust) -> _Pool:
    workdir = as_path(path)
    if workdir.is_dir() and not is_run(workdir):
        raise ValueError(f"{workdir} is not a run with its own data; name the data with a config")
    run = open_run(workdir, trust=trust)
    run.check_texts("jaxcl.search")
    rrf_k = run.settings.evaluation.rrf_k

    def opened() -> tuple[Mapping[str, PairSource], Mapping[str, RowPrompts]]:
        sources = run.sources()
        return sources, run.prompts(sources)

    return _Pool(model_of_run(run), opened, run.workdir / INDEX_FILE, run.made_from, rrf_k)


def _pool_of(
    path: str | os.PathLike[str], config: ConfigDict, changed: Collection[str], trust: Trust
) -> _Pool:
    """The pool of a config; its index must stay out of the model's folder."""
    settings = read_data_settings(config, changed=changed)
    data_dir, open_source = shared_folder(settings.run.data_dir), settings.parts.source
    sources = open_sources(settings.data, data_dir=data_dir, open_source=open_source)
    model = load(path, trust=trust)
    fingerprints = {role: source.fingerprint for role, source in sources.items()}
    made_from = {"model": model.made_from, "fingerprints": fingerprints}
    name = digest_of(json.dumps(made_from, sort_keys=True).encode())
    index_file = cache_folder() / "search" / f"{name}.npz"
    return _Pool(model, lambda: (sources, {}), index_file, made_from, settings.evaluation.rrf_k)


class _Index(NamedTuple):
    """The pool: all splits end to end.

    Attributes:
      keys: their keys, embedded.
      rows: their texts and metadata.
    """

    keys: Float[np.ndarray, "n d"]
    rows: Sequence[dict[str, Any]]


def _read_index(path: AnyPath, made_from: Mapping[str, Any]) -> _Index | None:
    """The index, or None where it is absent, damaged, or made from other things."""
    try:
        index = read_npz(path, ["made_from", "keys", "rows"])
        if json.loads(str(index["made_from"])) != made_from:
            return None
        keys, rows = index["keys"], json.loads(index["rows"].tobytes())
    except (ValueError, RecursionError):
        return None
    fits = keys.ndim == 2 and isinstance(rows, list) and len(keys) == len(rows)
    return _Index(keys, rows) if fits else None


def _write_index(path: AnyPath, made_from: Mapping[str, Any], index: _Index) -> None:
    """Keeps the index, whole or not at all; where that cannot be, the search goes on."""
    text = json.dumps(index.rows, ensure_ascii=False, default=_plain).encode()
    try:
        write_npz(
            path,
            keys=index.keys,
            rows=np.frombuffer(text, np.uint8),
            made_from=np.array(json.dumps(made_from)),
        )
    except OSError as error:
        say(f"the next search embeds the pool again: cannot write {path} ({error.strerror})")


def _plain(value: Any) -> Any:
    """What JSON has no type for: NumPy's numbers, and anything else as text."""
    return value.item() if isinstance(value, np.generic) else str(value)


def _build_index(
    model: EmbeddingModel, sources: Mapping[str, PairSource], prompts: Mapping[str, RowPrompts]
) -> _Index:
    rows: list[dict[str, Any]] = []
    ends = [0]
    for source in sources.values():
        for first in range(0, len(source), _CHUNK_ROWS):
            rows += source.read(np.arange(first, min(first + _CHUNK_ROWS, len(source))))
        ends.append(len(rows))
    texts = [row["key"] for row in rows]
    with progress_bar("embedding the pool", len(rows)) as advance:
        if not prompts:  # all splits at once, which sorts texts by length better
            return _Index(model.encode(texts, side="key", progress=advance), rows)
        keys = [
            encode_rows(
                model, texts[first:end], side="key", prompts=prompts.get(split), progress=advance
            )
            for split, (first, end) in zip(sources, itertools.pairwise(ends), strict=True)
        ]
    return _Index(np.concatenate(keys), rows)


def _asked(*, prompt: str) -> Iterator[str]:
    """Queries as they are typed, up to an empty line, Ctrl-D or Ctrl-C."""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while query := input(prompt).strip():
            yield query


def _show_as_json(hits: Sequence[Hit]) -> None:
    text = json.dumps([_as_json(hit) for hit in hits], ensure_ascii=False, default=str)
    print(printable(text))


def _as_json(hit: Hit) -> dict[str, Any]:
    rest = {name: v for name, v in hit.record.items() if name not in ("query", "key", "group")}
    key = hit.record["key"]
    query = hit.record["query"]
    return {"score": hit.score, "query": query, **rest, "first_line": _first_line(key), "key": key}


def _show_as_text(hits: Sequence[Hit]) -> None:
    for rank, (score, record) in enumerate(hits, start=1):
        name = ":".join(_present(record, "package", "qualified_name"))
        place = ":".join(_present(record, "file", "line"))
        head = f"{rank:3}  {score:.4f}  " + "  ".join(filter(None, (name, place)))
        print(printable(f"{head}\n     {_first_line(record['key'])}"))


def _present(record: Mapping[str, Any], *fields: str) -> list[str]:
    return [" ".join(str(record[field]).split()) for field in fields if field in record]


def _first_line(text: str) -> str:
    """The line of a function's def, or else the first that is not blank."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next(filter(_DEFINITION.match, lines), lines[0] if lines else "")


if __name__ == "__main__":
    main()
