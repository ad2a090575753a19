"""Searches the pool of a trained run: every split's keys, ranked for one query.

    python -m jaxcl.search --workdir runs/code_search --top 3 parse an ISO 8601 date

Without a query it asks for one after the other. It changes nothing of the run, which may still be
training; it only adds `search_index.npz`, the pool's embeddings, and rebuilds it when there is a
newer checkpoint.

In a program or a notebook, call `search`, or `open_search` for many queries:

    search(Path("runs/code_search"), "parse an ISO 8601 date", top=3)
"""

import contextlib
import json
import re
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxcl.evaluation.retrieval import BM25, dense_scores, reciprocal_rank_fusion
from jaxcl.host.command import run_command
from jaxcl.host.command_flags import CommandParser, add_workdir_flag
from jaxcl.host.files import write_npz
from jaxcl.host.npz import read_npz
from jaxcl.host.output import check_output
from jaxcl.host.paths import AnyPath, as_path
from jaxcl.host.printable import printable
from jaxcl.host.progress import progress_bar, say
from jaxcl.run.opened import OpenedRun, open_run
from jaxcl.settings.parts import Trust
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
    add_workdir_flag(parser)
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
    ranked = open_search(arguments.workdir, hybrid=arguments.hybrid, trust=arguments.trust)
    for asked in [query] if query else _asked(prompt="" if arguments.json else "search> "):
        show(ranked(asked, arguments.top))
        check_output()


def search(
    workdir: AnyPath, query: str, *, top: int = 10, hybrid: bool = False, trust: Trust = ()
) -> list[Hit]:
    """Search the pool of a run for one query; `open_search` is faster for several.

    Args:
      workdir: the folder of a run that has saved a checkpoint.
      query: what to look for.
      top: the number of hits.
      hybrid: whether BM25's ranking is fused with the embedder's.
      trust: packages whose code the run may name.

    Raises:
      ValueError, CheckpointError: as `open_search`, and if `top` is less than 1.
    """
    _check_top(top)
    return open_search(workdir, hybrid=hybrid, trust=trust)(query, top)


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


def open_search(workdir: AnyPath, *, hybrid: bool = False, trust: Trust = ()) -> Search:
    """Opens a run for searching; nothing of it is changed, and only the index is written.

    The index holds the pool's embeddings and its rows. With an index of the newest checkpoint the
    data that the run was trained on are not needed.

    Args:
      workdir: of a run that has saved a checkpoint; it may still be training.
      hybrid: fuse the embedder's ranking with that of BM25, by the run's `evaluation.rrf_k`.
      trust: packages whose code the run may name.

    Returns:
      The search. Scores are cosines, or sums of reciprocal ranks if `hybrid`.

    Raises:
      ValueError: if there is no run, it has no checkpoint, or there is no index and its data are
        gone.
      CheckpointError: if no checkpoint can be read.
    """
    workdir = as_path(workdir)
    run = open_run(workdir, trust=trust)
    run.check_texts("jaxcl.search")
    index = _read_index(workdir / INDEX_FILE, run.made_from)
    if index is None:
        index = _build_index(run)
        _write_index(workdir / INDEX_FILE, run.made_from, index)
    lexical = BM25([row["key"] for row in index.rows]) if hybrid else None
    # Compiled for one query: in the pool's batches all the other rows would be padding.
    encoder, rrf_k = run.encoder.for_batches_of(1), run.settings.evaluation.rrf_k

    def ranked(query: str, top: int) -> list[Hit]:
        _check_query(query)
        scores = dense_scores(encoder.encode("query", [query]), index.keys)
        if lexical is not None:
            scores = reciprocal_rank_fusion([lexical.scores([query]), scores], k=rrf_k)
        best = np.argsort(-scores[0], kind="stable")[:top]  # stable: of equals, the lowest row
        return [Hit(float(scores[0, row]), index.rows[row]) for row in best]

    return ranked


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


def _build_index(run: OpenedRun) -> _Index:
    sources = run.sources()
    rows: list[dict[str, Any]] = []
    parts = []
    with progress_bar("embedding the pool", sum(map(len, sources.values()))) as advance:
        for source in sources.values():
            for first in range(0, len(source), _CHUNK_ROWS):
                chunk = source.read(np.arange(first, min(first + _CHUNK_ROWS, len(source))))
                keys = [record["key"] for record in chunk]
                parts.append(run.encoder.encode("key", keys, advance=advance))
                rows.extend(chunk)
    return _Index(np.concatenate(parts), rows)


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
