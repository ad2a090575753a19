"""Read queries, a corpus and relevance judgements from a folder with the layout of BEIR.

    corpus.jsonl    {"_id": "d1", "title": "…", "text": "…"}; the title may be missing
    queries.jsonl   {"_id": "q1", "text": "…"}
    qrels/test.tsv  query id, document id and relevance, separated by tabs, below a header

Every file may be compressed with gzip. A qrels file may also have the four columns of TREC, have no
header, or hold JSON lines with the fields `query-id`, `corpus-id` and `score` (1 if it is missing).

Without the folder `qrels/`, each record of `queries.jsonl` names its relevant documents in a field
`positives` (a list) or `positive`, by id or by text. A file of held-out pairs can therefore be
evaluated over a corpus without conversion:

    queries.jsonl   {"query": "…", "positive": "the text of a document in corpus.jsonl"}

Reference: Thakur et al., "BEIR: A Heterogeneous Benchmark for Zero-shot Evaluation of Information
Retrieval Models", NeurIPS 2021.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np

from jaxcl.data.documents import QUERY_FIELDS, TEXT_FIELDS, Documents, read_documents
from jaxcl.data.text_files import read_records
from jaxcl.host.paths import AnyPath
from jaxcl.host.printable import counted
from jaxcl.host.progress import progress_bar
from jaxcl.typing import Int

__all__ = ["Beir", "is_beir", "qrels_file", "read_beir", "read_qrels"]

_QRELS_FIELDS = (
    ("query-id", "query_id", "qid"),
    ("corpus-id", "corpus_id", "document_id", "doc_id", "docid"),
    ("score", "relevance", "grade"),
)
_POSITIVES_FIELDS = ("positives", "positive")
_QRELS_SUFFIXES = (".tsv", ".jsonl", ".tsv.gz", ".jsonl.gz")
_BLOCK = 10_000
_MOST_GRADE = 2**31 - 1


class Beir(NamedTuple):
    """A corpus, the judged queries, and their relevant documents.

    Attributes:
      corpus: the documents.
      query_ids: the ids of the queries that have judgements, in the order of their file.
      query_texts: the text of each of these queries.
      queries: for each pair of a query and a relevant document, the query's index in `query_ids`;
        ascending.
      documents: the row in `corpus` of each pair's document; −1 if it is not in the corpus.
      grades: the relevance of each pair, at least 1.
      own_documents: for each query, the row of the document with the same id, which is the query
        itself and is therefore excluded from its ranking; −1 if there is no such document, it is
        judged relevant, or there are no qrels.
      left_out: name -> number of queries or documents without a match; `read_beir` lists the names.
    """

    corpus: Documents
    query_ids: list[str]
    query_texts: list[str]
    queries: Int[np.ndarray, " n"]
    documents: Int[np.ndarray, " n"]
    grades: Int[np.ndarray, " n"]
    own_documents: Int[np.ndarray, " q"]
    left_out: Mapping[str, int]


def is_beir(path: AnyPath) -> bool:
    """Whether a path is a folder with the layout of BEIR, or a qrels file in such a folder."""
    folder = path.parent.parent if path.parent.name == "qrels" else path
    return any((folder / f"corpus.jsonl{suffix}").exists() for suffix in ("", ".gz"))


def read_beir(path: AnyPath) -> Beir:
    """Read a folder with the layout of BEIR.

    Args:
      path: the folder, or a qrels file in it. If a folder is given, the qrels file is `test`, else
        `dev`, else the only file in `qrels/`.

    Returns:
      The content of the folder. `left_out` counts

      - `queries_without_judgements`: queries that the qrels do not name, which are not ranked;
      - `queries_without_relevant`: queries without a relevant document, which are ranked and score
        0, as in trec_eval;
      - `unknown_queries`: judged queries that are not in `queries.jsonl`, which are not ranked;
      - `unknown_documents`: relevant documents missing from the corpus, which count as not found;
      - `own_documents`: documents that are left out because they have the id of the query.

    Raises:
      ValueError: if a line is damaged (the message gives its number), a document is judged twice,
        the qrels file is missing or ambiguous, or all of its queries or documents are unknown.
      OSError: if a file cannot be read.
    """
    is_qrels = path.parent.name == "qrels"
    folder = path.parent.parent if is_qrels else path
    source = queries_path = _file(folder, "queries.jsonl")
    by_id = is_qrels or (folder / "qrels").exists()
    if by_id:
        source = path if is_qrels else qrels_file(folder)
        judged = read_qrels(source)
    queries = _read_documents(queries_path, QUERY_FIELDS)
    corpus = _read_documents(_file(folder, "corpus.jsonl"))
    rows = {name: row for row, name in enumerate(corpus.ids)}
    if not by_id:
        judged = _read_positives(queries_path, queries.ids, corpus, rows)
    numbers = [number for number, name in enumerate(queries.ids) if name in judged]
    ids = [queries.ids[number] for number in numbers]
    if not ids:
        raise ValueError(
            f"{source} has judgements for {counted(len(judged), 'query', 'queries')}, but "
            f"{folder} has none of them; the first id there is {next(iter(judged))!r}, and the ids "
            f"of queries are like {queries.ids[0]!r}"
        )
    if not any(document in rows for name in ids for document in judged[name]):
        raise ValueError(
            f"none of the documents in {source} is in the corpus, whose ids are like "
            f"{corpus.ids[0]!r}"
        )
    pairs = _relevant_pairs([judged[name] for name in ids], rows)
    own_documents = [
        rows.get(name, -1) if by_id and judged[name].get(name, 0) <= 0 else -1 for name in ids
    ]
    return Beir(
        corpus=corpus,
        query_ids=ids,
        query_texts=queries.read(numbers),
        queries=pairs[:, 0],
        documents=pairs[:, 1],
        grades=pairs[:, 2],
        own_documents=np.array(own_documents, np.int64),
        left_out={
            "queries_without_judgements": len(queries) - len(ids),
            "queries_without_relevant": len(ids) - len(np.unique(pairs[:, 0])),
            "unknown_queries": len(judged) - len(ids),
            "unknown_documents": int((pairs[:, 1] < 0).sum()),
            "own_documents": sum(row >= 0 for row in own_documents),
        },
    )


def qrels_file(folder: AnyPath, split: str | None = None) -> AnyPath:
    """Find the qrels file of a split.

    Args:
      folder: the folder with `qrels/`.
      split: the split, such as `"dev"`; `None` takes `test`, else `dev`, else the only file.

    Raises:
      ValueError: if there is no such file, or more than one.
    """
    qrels = folder / "qrels"
    if not qrels.is_dir():
        raise ValueError(f"{folder} has no folder qrels/ with judgements, such as qrels/test.tsv")
    files = sorted(file for file in qrels.iterdir() if file.name.endswith(_QRELS_SUFFIXES))
    if not files:
        raise ValueError(f"{qrels} has no file of judgements; write {qrels / 'test.tsv'}")
    by_split = collections.defaultdict(list)
    for file in files:
        by_split[file.name.split(".")[0]].append(file)
    if split is not None:
        chosen = by_split[split]
    else:
        chosen = by_split["test"] or by_split["dev"] or files
    if len(chosen) != 1:
        names = ", ".join(file.name for file in chosen or files)
        many = "several files" if chosen else "no file"
        wanted = "" if split is None else f" of the split {split!r}"
        raise ValueError(
            f"{qrels} has {many} of judgements{wanted}; give the path of one of {names}"
        )
    return chosen[0]


def _relevant_pairs(
    judged: Sequence[Mapping[str, int]], rows: Mapping[str, int]
) -> Int[np.ndarray, "n 3"]:
    """The number of the query, the row of the document and the grade of each relevant pair."""
    pairs = [
        (query, rows.get(document, -1), grade)
        for query, of_query in enumerate(judged)
        for document, grade in of_query.items()
        if grade > 0
    ]
    return np.array(pairs, np.int64).reshape(-1, 3)


def _file(folder: AnyPath, name: str) -> AnyPath:
    files = [file for file in (folder / name, folder / f"{name}.gz") if file.exists()]
    if not files:
        raise ValueError(f"{folder} has no {name} or {name}.gz")
    if len(files) > 1:
        raise ValueError(f"{folder} has both {name} and {name}.gz; remove one of them")
    return files[0]


def _read_documents(path: AnyPath, text_fields: Sequence[str] = TEXT_FIELDS) -> Documents:
    with progress_bar(f"reading {path.name}", None) as advance:
        return read_documents(path, text_fields=text_fields, advance=advance)


def read_qrels(path: AnyPath) -> dict[str, dict[str, int]]:
    """Read relevance judgements as query id -> document id -> relevance.

    Raises:
      ValueError: if a line is damaged (the message gives its number), or a document is judged
        twice.
      OSError: if the file cannot be read.
    """
    judged: dict[str, dict[str, int]] = collections.defaultdict(dict)
    is_table = PurePath(path.name.removesuffix(".gz")).suffix != ".jsonl"
    for where, (query, document, grade) in _rows(path) if is_table else _records(path):
        if document in judged[query]:
            raise ValueError(f"{where}: document {document!r} is judged twice for {query!r}")
        judged[query][document] = _grade(grade, where)
    if not judged:
        raise ValueError(f"{path} has no judgements")
    return dict(judged)


def _read_positives(
    path: AnyPath, ids: Sequence[str], corpus: Documents, rows: Mapping[str, int]
) -> dict[str, dict[str, int]]:
    """Read positives as query id -> document id -> relevance, which is always 1."""
    positives = {}
    for name, (where, record) in zip(ids, read_records(path, kind=".jsonl"), strict=True):
        field = next((known for known in _POSITIVES_FIELDS if known in record), None)
        if field is None:
            raise ValueError(
                f"{where}: there is no field {' or '.join(_POSITIVES_FIELDS)}, and no folder "
                f"{path.parent / 'qrels'} with judgements; add one of them"
            )
        values = record[field] if isinstance(record[field], list) else [record[field]]
        if not all(isinstance(value, str) for value in values):
            raise ValueError(f"{where}: {field} is {values!r:.80}; give ids or texts of documents")
        positives[name] = values
    wanted = {value for values in positives.values() for value in values if value not in rows}
    documents = collections.defaultdict(list)  # documents with the same text are all relevant
    for first in range(0, len(corpus), _BLOCK):
        block = range(first, min(first + _BLOCK, len(corpus)))
        for row, text in zip(block, corpus.read(block), strict=True):
            if text in wanted:
                documents[text].append(corpus.ids[row])
    return {
        name: {document: 1 for value in values for document in documents.get(value) or [value]}
        for name, values in positives.items()
    }


def _rows(path: AnyPath) -> Iterator[tuple[str, Sequence[Any]]]:
    """Yield the place of each row of a table, with its query id, document id and relevance."""
    for number, (where, record) in enumerate(read_records(path, kind=".txt")):
        line = record["text"]
        columns = line.split("\t") if "\t" in line else line.split()
        if number == 0 and columns and columns[-1].lower() in _QRELS_FIELDS[2]:
            continue
        if len(columns) == 4:  # TREC's format, whose second column is unused
            del columns[1]
        if len(columns) == 3:
            yield where, columns
        elif columns:
            raise ValueError(
                f"{where} has {len(columns)} columns; give a query id, a document id and the "
                "relevance, separated by tabs"
            )


def _records(path: AnyPath) -> Iterator[tuple[str, Sequence[Any]]]:
    """Yield the place of each JSON line, with its query id, document id and relevance."""
    for where, record in read_records(path, kind=".jsonl"):
        values = []
        for names in _QRELS_FIELDS:
            field = next((name for name in names if name in record), None)
            if field is None and names[0] != "score":
                raise ValueError(f"{where} has none of the fields {', '.join(names)}")
            values.append(1 if field is None else record[field])
        ids = values[:2]
        if not all(isinstance(name, str | int) and not isinstance(name, bool) for name in ids):
            raise ValueError(f"{where}: the ids {ids!r:.80} are not texts or integers")
        yield where, [*map(str, ids), values[2]]


def _grade(value: Any, where: str) -> int:
    try:
        number = float(value)
        if number.is_integer() and abs(number) <= _MOST_GRADE and not isinstance(value, bool):
            return int(number)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{where}: the relevance {value!r:.80} is not an integer")
