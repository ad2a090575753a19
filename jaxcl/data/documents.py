"""Documents with ids, such as a corpus to search or a list of queries, from a file.

The texts stay in Arrow's compact form, so they take about as much memory as their file takes on
disk.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxcl.data.text_files import read_records, text_of
from jaxcl.host.paths import AnyPath

__all__ = ["Documents", "read_documents"]

ID_FIELDS = ("_id", "id", "doc_id", "docid", "document_id", "pid", "qid", "query_id")
TEXT_FIELDS = ("text", "document", "passage", "contents", "content", "body", "key", "query")
QUERY_FIELDS = ("query", *TEXT_FIELDS)
"""Common names of the text field of queries."""
TITLE_FIELD = "title"
_BLOCK = 10_000


class Documents:
    """Texts with ids, in the order of a file; `read_documents` opens one.

    Attributes:
      ids: the ids, all different. Without ids in the file, the documents are numbered from `"0"`.
      texts: a `pyarrow.ChunkedArray` of the texts; `read` returns some of them as strings.
      fingerprint: a hash of ids and texts; equal fingerprints mean equal documents in equal order.
      modality: `"text"`.
    """

    modality = "text"

    def __init__(self, ids: Sequence[str], texts: Any, *, fingerprint: str) -> None:
        self.ids = ids
        self.texts = texts
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.texts)

    def read(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The texts of the given rows, in the order given.

        Raises:
          IndexError: for a row that does not exist.
        """
        return self.texts.take(np.asarray(rows, np.int64)).to_pylist()


def read_documents(
    path: AnyPath,
    *,
    id_field: str | None = None,
    text_field: str | None = None,
    text_fields: Sequence[str] = TEXT_FIELDS,
    advance: Callable[[int], None] = lambda documents: None,
) -> Documents:
    """Read the documents of a file.

    If a record has a title and a text, the document is both, joined by a space, as in BEIR.

    Args:
      path: a file of `jaxcl.data.text_files.TEXT_FILES`, which may be compressed with gzip.
      id_field: the field of the ids, which are texts or integers; `None` takes the first of
        `ID_FIELDS` that the first record has. Lines of plain text have no ids.
      text_field: the field of the texts; `None` takes the first of `text_fields`.
      text_fields: the names to try for the field of the texts.
      advance: called with the number of documents read since the last call.

    Returns:
      The documents.

    Raises:
      ValueError: if there are no documents, or a record has no text, no id, or the id of an
        earlier record; the message names the line.
      OSError: if the file cannot be read.

    Reference: Thakur et al. 2021, BEIR, for the fields of `corpus.jsonl`.
    """
    import pyarrow  # not at the top, because the import is slow

    digest = hashlib.sha256()
    rows: dict[str, int] = {}
    chunks = []
    for block in _blocks(_documents(path, id_field, text_field, text_fields)):
        for where, name, text in block:
            if name in rows:
                raise ValueError(
                    f"{where}: the id {name!r} is also that of document {rows[name] + 1}"
                )
            rows[name] = len(rows)
            digest.update(f"{len(name)} {len(text)} {name} {text}\n".encode())
        chunks.append(pyarrow.array([text for _, _, text in block], pyarrow.large_string()))
        advance(len(block))
    if not rows:
        raise ValueError(f"{path} has no documents")
    texts = pyarrow.chunked_array(chunks)
    return Documents(list(rows), texts, fingerprint=digest.hexdigest())


def _documents(
    path: AnyPath, id_field: str | None, text_field: str | None, text_fields: Sequence[str]
) -> Iterator[tuple[str, str, str]]:
    """Yield the place of each document, its id and its text."""
    for number, (where, record) in enumerate(read_records(path)):
        if number == 0:
            has_ids = id_field is not None or any(name in record for name in ID_FIELDS)
            id_field = id_field or _field(record, ID_FIELDS)
            text_field = text_field or _field(record, text_fields)
            if text_field is None:
                raise ValueError(
                    f"{where}: none of the fields {', '.join(map(str, record)) or '(none)'} is "
                    f"known to hold texts; name the field, or call it one of "
                    f"{', '.join(text_fields)}"
                )
        name = _id_of(record, str(id_field), where) if has_ids else str(number)
        yield where, name, _text(record, str(text_field), where)


def _field(record: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in record), None)


def _id_of(record: Mapping[str, Any], field: str, where: str) -> str:
    value = record.get(field)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    name = text_of(record, field, where)
    if not name:
        raise ValueError(f"{where}: {field} is empty; each document needs an id")
    return name


def _text(record: Mapping[str, Any], field: str, where: str) -> str:
    text = text_of(record, field, where)
    if field == TITLE_FIELD or record.get(TITLE_FIELD) in (None, ""):
        return text
    return f"{text_of(record, TITLE_FIELD, where)} {text}".strip()


def _blocks(
    documents: Iterator[tuple[str, str, str]],
) -> Iterator[list[tuple[str, str, str]]]:
    block = []
    for document in documents:
        block.append(document)
        if len(block) == _BLOCK:
            yield block
            block = []
    if block:
        yield block
