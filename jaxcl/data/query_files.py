"""Read queries with their positives, given as texts, document ids or relevance judgements."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxcl.data.documents import QUERY_FIELDS as QUERY_TEXT_FIELDS
from jaxcl.data.documents import read_documents
from jaxcl.data.text_files import read_records, text_of
from jaxcl.host.paths import AnyPath

__all__ = ["QueryFile", "read_judged_queries", "read_queries"]

QUERY_FIELDS = ("query", "anchor", "question")
POSITIVE_FIELDS = (
    *("positives", "positive", "pos", "key", "answer", "answers", "passage", "document"),
)
ID_FIELDS = ("positive_ids", "positive_id", "pos_ids", "pos_id")


class QueryFile(NamedTuple):
    """Distinct queries with all of their positives, in the order of the file.

    Records with the same query become one query, because the positives of one record would
    otherwise be negatives of the other.

    Attributes:
      queries: the texts of the queries.
      positives: the distinct positives of each query, as texts or document ids.
      by_id: whether positives are document ids.
      own_ids: for each query, the ids of documents that are the query itself; empty for a file
        without ids.
      where: the place of each query's first record, for messages.
      records: the number of records read.
      fields: a line that names the fields that were read.
    """

    queries: list[str]
    positives: list[list[str]]
    by_id: bool
    own_ids: list[list[str]]
    where: list[str]
    records: int
    fields: str


class _Fields(NamedTuple):
    """The fields of a record. The field of the positives holds ids if `by_id` is true."""

    query: str
    positives: str
    by_id: bool
    unused: tuple[str, ...]

    def __str__(self) -> str:
        kind = "ids of positives" if self.by_id else "positives"
        line = f"queries from {self.query!r}, {kind} from {self.positives!r}"
        return line + (f", not used: {', '.join(self.unused)}" if self.unused else "")


def read_queries(
    path: AnyPath, *, query_field: str | None = None, positive_field: str | None = None
) -> QueryFile:
    """Read queries with their positives.

    Args:
      path: a file of `jaxcl.data.text_files.TEXT_FILES` except plain text. A record holds a query,
        and a positive or a list of them.
      query_field: the field of the queries; `None` takes the one of `QUERY_FIELDS` that the first
        record has.
      positive_field: the field of the positives; `None` takes the one of `POSITIVE_FIELDS` or
        `ID_FIELDS` that the first record has. Only fields in `ID_FIELDS` hold document ids.

    Raises:
      ValueError: if no field is recognised, several fields could be meant, or a record lacks a
        text, has an empty text, or has no positives; the message names the line.
      OSError: if the file cannot be read.
    """
    fields: _Fields | None = None
    rows: dict[str, int] = {}
    positives: list[dict[str, None]] = []
    where_first = []
    records = 0
    for where, record in read_records(path):
        if fields is None:
            fields = _fields_of(record, query_field, positive_field, where)
        records += 1
        query = _filled(text_of(record, fields.query, where), fields.query, where)
        row = rows.setdefault(query, len(rows))
        if row == len(positives):
            positives.append({})
            where_first.append(where)
        positives[row].update(dict.fromkeys(_positives_of(record, fields, where)))
    if fields is None:
        raise ValueError(f"{path} has no queries")
    lists = [list(distinct) for distinct in positives]
    own_ids: list[list[str]] = [[] for _ in rows]
    return QueryFile(list(rows), lists, fields.by_id, own_ids, where_first, records, str(fields))


def read_judged_queries(
    path: AnyPath, qrels: Mapping[str, Mapping[str, int]], *, query_field: str | None = None
) -> QueryFile:
    """Read queries with ids, whose positives are given by BEIR's qrels.

    Args:
      path: a file that `jaxcl.data.documents.read_documents` reads, such as `queries.jsonl`.
      qrels: query id -> document id -> relevance; documents with a relevance above 0 are positives.
      query_field: the field of the texts; `None` takes the first common name in the first record.

    Returns:
      The queries that have a positive; `records` counts all queries of the file.

    Raises:
      ValueError: if a query of the qrels is not in the file, or no query has a positive.
      OSError: if the file cannot be read.
    """
    documents = read_documents(path, text_field=query_field, text_fields=QUERY_TEXT_FIELDS)
    present = set(documents.ids)
    if unknown := next((name for name in qrels if name not in present), None):
        raise ValueError(f"the qrels name query {unknown!r}, which {path} lacks")
    rows: dict[str, int] = {}
    positives: list[dict[str, None]] = []
    own_ids: list[list[str]] = []
    for name, query in zip(documents.ids, documents.read(range(len(documents))), strict=True):
        relevant = [document for document, grade in qrels.get(name, {}).items() if grade > 0]
        if not relevant:
            continue
        _filled(query, "the text", f"{path}: query {name!r}")
        row = rows.setdefault(query, len(rows))
        if row == len(positives):
            positives.append({})
            own_ids.append([])
        positives[row].update(dict.fromkeys(relevant))
        own_ids[row].append(name)
    if not rows:
        raise ValueError(f"no query of {path} has a document of relevance above 0 in the qrels")
    lists = [list(distinct) for distinct in positives]
    where = [f"the qrels of query {names[0]!r}" for names in own_ids]
    fields = "queries by their ids, positives from the qrels"
    return QueryFile(list(rows), lists, True, own_ids, where, len(documents), fields)


def _fields_of(
    record: Mapping[str, Any], query_field: str | None, positive_field: str | None, where: str
) -> _Fields:
    query = _one_of(record, query_field, QUERY_FIELDS, "queries", "--query-field", where)
    positives = _one_of(
        record,
        positive_field,
        [name for name in (*POSITIVE_FIELDS, *ID_FIELDS) if name != query],
        "positives",
        "--positive-field",
        where,
    )
    unused = tuple(str(name) for name in record if name not in (query, positives))
    return _Fields(query, positives, positives in ID_FIELDS, unused)


def _one_of(
    record: Mapping[str, Any],
    chosen: str | None,
    known: Sequence[str],
    content: str,
    flag: str,
    where: str,
) -> str:
    """The chosen field, or the only known field that a record has."""
    if chosen is not None:
        if chosen not in record:
            raise ValueError(f"{where} has no field {chosen!r}; it has {_listed(record)}")
        return chosen
    present = [name for name in known if name in record]
    if len(present) > 1:
        raise ValueError(
            f"{where} has several fields that could hold {content}: {_listed(present)}; choose one "
            f"with {flag}"
        )
    if not present:
        raise ValueError(
            f"{where}: none of the fields {_listed(record)} is known to hold {content}; name it "
            f"with {flag}, or call it one of {_listed(known)}"
        )
    return present[0]


def _positives_of(record: Mapping[str, Any], fields: _Fields, where: str) -> Iterator[str]:
    name = fields.positives
    values = record.get(name)
    several = values if isinstance(values, list) else [values]
    if not several or several == [None]:
        raise ValueError(f"{where}: {name} is empty; each query needs a positive")
    for value in several:
        if fields.by_id and isinstance(value, int) and not isinstance(value, bool):
            yield str(value)
        else:
            yield _filled(text_of({name: value}, name, where), name, where)


def _filled(text: str, field: str, where: str) -> str:
    if not text.strip():
        raise ValueError(f"{where}: {field} is empty; give a text, or remove the record")
    return text


def _listed(names: Any) -> str:
    return ", ".join(map(str, names)) or "(none)"
