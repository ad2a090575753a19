"""The hits of a search, functions that print them, and queries typed at a prompt."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxcl.data.snippets import snippet
from jaxcl.host.printable import printable

__all__ = ["Hit", "show_as_json", "show_as_text", "typed_queries"]

_DEFINITION = re.compile(r"\s*(async\s+)?def\s")


class Hit(NamedTuple):
    """A document or row in the results of a search.

    Attributes:
      score: the score for the query; higher is better.
      record: the id and text of a document, or the texts and metadata of a row.
    """

    score: float
    record: dict[str, Any]


def show_as_json(query: str, hits: Sequence[Hit]) -> None:
    """Print a query's hits as one line of JSON, a list of objects."""
    text = json.dumps([_as_json(query, hit) for hit in hits], ensure_ascii=False, default=str)
    print(printable(text))


def show_as_text(query: str, hits: Sequence[Hit]) -> None:
    """Print two lines for each hit: its rank, score and name, then an extract of its text.

    A hit without a text, such as an image of a folder, whose name is its path, has one line.
    """
    for rank, (score, record) in enumerate(hits, start=1):
        extract = _extract(record, query)
        head = f"{rank:3}  {score:.4f}  {_name(record)}"
        print(printable(f"{head}\n     {extract}" if extract else head))


def typed_queries(*, prompt: str) -> Iterator[str]:
    """Yield queries as they are typed, up to an empty line, Ctrl-D or Ctrl-C."""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while query := input(prompt).strip():
            yield query


def _as_json(query: str, hit: Hit) -> dict[str, Any]:
    record, extract = hit.record, _extract(hit.record, query)
    if _is_document(record):
        return {
            "score": hit.score,
            "id": record["id"],
            "snippet": extract,
            "text": record["text"],
        }
    metadata = {name: v for name, v in record.items() if name not in ("query", "key", "group")}
    return {
        "score": hit.score,
        "query": record["query"],
        **metadata,
        "first_line": extract,
        "key": record["key"],
    }


def _is_document(record: Mapping[str, Any]) -> bool:
    return "key" not in record  # rows of a run's data have a key


def _name(record: Mapping[str, Any]) -> str:
    """The id of a document, or the name and location of a row if it has them."""
    if _is_document(record):
        return _one_line(record["id"])
    name = ":".join(_present(record, "package", "qualified_name"))
    location = ":".join(_present(record, "file", "line"))
    return "  ".join(filter(None, (name, location)))


def _extract(record: Mapping[str, Any], query: str) -> str:
    if _is_document(record):
        return snippet(record["text"], query)
    return _first_line(record["key"])


def _present(record: Mapping[str, Any], *fields: str) -> list[str]:
    return [_one_line(record[field]) for field in fields if field in record]


def _one_line(value: Any) -> str:
    return " ".join(str(value).split())


def _first_line(text: str) -> str:
    """The line with the def of a function, or else the first line that is not blank."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next(filter(_DEFINITION.match, lines), lines[0] if lines else "")
