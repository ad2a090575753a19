"""Searches the pool of a trained run: every split's keys, ranked for one query.

    python -m jaxcl.search --workdir DIR [--hybrid] [--top 10] [--json] parse an ISO 8601 date

Without a query it asks for one after the other. It changes nothing of the run, so it may look on
while the run still trains; all it adds is `search_index.npz`, the pool's embeddings, which it
makes again when there is a newer checkpoint.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from jaxcl.data.row_files import DAMAGED
from jaxcl.data.sources import PairSource
from jaxcl.evaluation.retrieval import BM25, dense_scores, reciprocal_rank_fusion
from jaxcl.host.progress import progress_bar, say
from jaxcl.run.checkpoint import CheckpointError
from jaxcl.run.trained import open_trained
from jaxcl.settings.build import Program
from jaxcl.step.embedder import make_embedder, pad_texts
from jaxcl.typing import Float, PyTree

__all__ = ["Hit", "Search", "main", "open_search"]

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
    """Runs `open_search` for a person: an error that is theirs comes as one line."""
    arguments = _arguments(argv)
    show = _show_as_json if arguments.json else _show_as_text
    try:
        if arguments.top < 1:
            raise ValueError(f"--top={arguments.top} shows nothing; give 1 or more")
        query = " ".join(arguments.query)
        if arguments.query and not query.strip():
            raise ValueError(
                "the query is empty; say what to look for, or leave it out to be asked"
            )
        search = open_search(arguments.workdir, hybrid=arguments.hybrid)
        for asked in [query] if query else _asked(prompt="" if arguments.json else "search> "):
            show(search(asked, arguments.top))
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, CheckpointError) as error:
        say(f"error: {error}")
        sys.exit(1)


def open_search(workdir: Path, *, hybrid: bool = False) -> Search:
    """Opens a run for searching; nothing of it is changed, and only the index is written.

    Args:
      workdir: of a run that has saved a checkpoint; it may still be training.
      hybrid: fuse the embedder's ranking with that of BM25, by the run's `evaluation.rrf_k`.

    Returns:
      The search. Scores are cosines, or sums of reciprocal ranks if `hybrid`.

    Raises:
      ValueError: if there is no run, it has no checkpoint, or its data are gone.
      CheckpointError: if no checkpoint can be read.
    """
    workdir = Path(workdir)
    config, sources, tokenizer, program, params, made_from = open_trained(workdir)
    keys = _read_index(workdir / INDEX_FILE, made_from)
    if keys is None:
        keys = _embed_pool(config, program, params, tokenizer, sources)
        _write_index(workdir / INDEX_FILE, made_from, keys)
    lexical = BM25(list(itertools.chain(*_key_texts(sources)))) if hybrid else None
    # Compiled for one query: in the pool's batches all the other rows would be padding.
    embed = make_embedder(program.towers.encode, program.mesh, batch_size=1)

    def search(query: str, top: int) -> list[Hit]:
        scores = dense_scores(embed(params, "query", _tokens(config, tokenizer, [query])), keys)
        if lexical is not None:
            tables = [lexical.scores([query]), scores]
            scores = reciprocal_rank_fusion(tables, k=config.evaluation.rrf_k)
        best = np.argsort(-scores[0], kind="stable")[:top]  # stable: of equals, the lowest row
        return [Hit(float(scores[0, row]), _record(sources, int(row))) for row in best]

    return search


def _read_index(path: Path, made_from: Mapping[str, Any]) -> Float[np.ndarray, "n d"] | None:
    """The pool's embeddings, or None where they are absent, damaged, or made from other things."""
    try:
        with path.open("rb") as file, np.load(file) as index:  # np.load leaks it on an error
            if json.loads(str(index["made_from"])) == made_from:
                return index["keys"]
    except DAMAGED:
        return None
    return None


def _write_index(path: Path, made_from: Mapping[str, Any], keys: Float[np.ndarray, "n d"]) -> None:
    """Keeps the embeddings, whole or not at all; where that cannot be, the search goes on."""
    # A name of its own: two searches may begin at once.
    unfinished = path.with_name(f"{path.name}.unfinished-{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            np.savez(file, keys=keys, made_from=np.array(json.dumps(made_from)))
        unfinished.replace(path)
    except OSError as error:
        say(f"the next search embeds the pool again: cannot write {path} ({error.strerror})")
        with contextlib.suppress(OSError):
            unfinished.unlink()


def _embed_pool(
    config: ConfigDict,
    program: Program,
    params: PyTree,
    tokenizer: Tokenizer,
    sources: Mapping[str, PairSource],
) -> Float[np.ndarray, "n d"]:
    parts = []
    with progress_bar("embedding the pool", sum(map(len, sources.values()))) as advance:
        for texts in _key_texts(sources):
            tokens = _tokens(config, tokenizer, texts, side="key")
            parts.append(program.embed(params, "key", tokens, advance=advance))
    return np.concatenate(parts)


def _key_texts(sources: Mapping[str, PairSource]) -> Iterator[list[str]]:
    for source in sources.values():
        for first in range(0, len(source), _CHUNK_ROWS):
            rows = np.arange(first, min(first + _CHUNK_ROWS, len(source)))
            yield [record["key"] for record in source.read(rows)]


def _tokens(
    config: ConfigDict, tokenizer: Tokenizer, texts: Sequence[str], *, side: str = "query"
) -> np.ndarray:
    return pad_texts(
        tokenizer,
        texts,
        max_tokens=config.data.max_tokens[side],
        add_cls=config.data.add_cls,
        distinct=config.data.distinct_tokens,
    )


def _record(sources: Mapping[str, PairSource], row: int) -> dict[str, Any]:
    """The row of the pool, which is all splits end to end."""
    for source in sources.values():
        if row < len(source):
            return source.read([row])[0]
        row -= len(source)
    raise IndexError("beyond the pool")


def _asked(*, prompt: str) -> Iterator[str]:
    """Queries as they are typed, up to an empty line, Ctrl-D or Ctrl-C."""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while query := input(prompt).strip():
            yield query


def _show_as_json(hits: Sequence[Hit]) -> None:
    print(json.dumps([_as_json(hit) for hit in hits], ensure_ascii=False, default=str), flush=True)


def _as_json(hit: Hit) -> dict[str, Any]:
    rest = {name: v for name, v in hit.record.items() if name not in ("query", "key", "group")}
    key = hit.record["key"]
    query = hit.record["query"]
    return {"score": hit.score, "query": query, **rest, "first_line": _first_line(key), "key": key}


def _show_as_text(hits: Sequence[Hit]) -> None:
    for rank, (score, record) in enumerate(hits, start=1):
        name = ":".join(_present(record, "package", "qualified_name"))
        place = ":".join(_present(record, "file", "line"))
        print(f"{rank:3}  {score:.4f}  " + "  ".join(filter(None, (name, place))))
        print(f"     {_first_line(record['key'])}", flush=True)


def _present(record: Mapping[str, Any], *fields: str) -> list[str]:
    return [str(record[field]) for field in fields if field in record]


def _first_line(text: str) -> str:
    """The line of a function's def, or else the first that is not blank."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next(filter(_DEFINITION.match, lines), lines[0] if lines else "")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jaxcl.search", description="Searches the pool of a trained run."
    )
    parser.add_argument("query", nargs="*", help="what to look for; left out, it is asked for")
    parser.add_argument("--workdir", type=Path, required=True, help="of the run that was trained")
    parser.add_argument("--top", type=int, default=10, help="hits to show (default: 10)")
    parser.add_argument("--hybrid", action="store_true", help="rank by BM25 as well")
    parser.add_argument("--json", action="store_true", help="print a JSON list for each query")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    main()
