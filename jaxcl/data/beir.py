"""Reads queries, a corpus and relevance judgements from a folder with the layout of BEIR.

    corpus.jsonl    {"_id": "d1", "title": "…", "text": "…"}; the title may be missing
    queries.jsonl   {"_id": "q1", "text": "…"}
    qrels/test.tsv  query id, document id and relevance, separated by tabs, below a header

Every file may be compressed with gzip. Qrels may also have the four columns of TREC, no header, or
be JSON lines with the fields `query-id`, `corpus-id` and `score`, which is 1 if it is missing.

Without the folder `qrels/`, each record of `queries.jsonl` names its relevant documents in a field
`positives` (a list) or `positive`, by their ids or their texts. So a file of held-out pairs can be
evaluated over a corpus as it is:

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
      query_ids: of the queries that have judgements, in the order of their file.
      query_texts: their texts.
      queries: the numbers of these queries, one per pair of a query and a relevant document, in
        ascending order.
      documents: the row in `corpus` of each pair's document; −1 if the corpus lacks it.
      grades: relevance of each pair, at least 1.
      own_documents: for each query, the row of the document with the query's id, which its ranking
        leaves out, since it is the query itself; −1 if there is none, it is judged as relevant, or
        there are no qrels.
      left_out: name -> number of the queries, documents and judgements that do not fit together, as
        in `read_beir`.
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
    """Whether a path is a folder of this layout, or a file of qrels in it."""
    folder = path.parent.parent if path.parent.name == "qrels" else path
    return any((folder / f"corpus.jsonl{suffix}").exists() for suffix in ("", ".gz"))


def read_beir(path: AnyPath) -> Beir:
    """Read a folder.

    Args:
      path: the folder, whose qrels are `test`, else `dev`, else the only file of `qrels/`; or a
        file of qrels in it.

    Returns:
      Its content. `left_out` counts

      - `queries_without_judgements`: queries that the qrels do not name, which are not ranked;
      - `queries_without_relevant`: queries whose judged documents are all not relevant, which are
        ranked with a value of 0, as by trec_eval;
      - `unknown_queries`: queries of the qrels that `queries.jsonl` lacks, which are not ranked;
      - `unknown_documents`: relevant documents that the corpus lacks, which count as not found;
      - `own_documents`: documents that are left out since they have the id of their query.

    Raises:
      ValueError: for a damaged line, with its number, a document judged twice, a missing choice of
        qrels, or qrels whose queries or documents are all unknown.
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
    kept = [number for number, name in enumerate(queries.ids) if name in judged]
    ids = [queries.ids[number] for number in kept]
    if not ids:
        raise ValueError(
            f"{source} has judgements for {len(judged):,} queries, but {folder} has none of "
            f"them; the first has the id {next(iter(judged))!r}, and queries have ids like "
            f"{queries.ids[0]!r}"
        )
    if not any(document in rows for name in ids for document in judged[name]):
        raise ValueError(
            f"none of the documents in {source} is in the corpus, whose ids are like "
            f"{corpus.ids[0]!r}"
        )
    pairs = _relevant_pairs([judged[name] for name in ids], rows)
    own = [rows.get(name, -1) if by_id and judged[name].get(name, 0) <= 0 else -1 for name in ids]
    return Beir(
        corpus=corpus,
        query_ids=ids,
        query_texts=queries.read(kept),
        queries=pairs[:, 0],
        documents=pairs[:, 1],
        grades=pairs[:, 2],
        own_documents=np.array(own, np.int64),
        left_out={
            "queries_without_judgements": len(queries) - len(ids),
            "queries_without_relevant": len(ids) - len(np.unique(pairs[:, 0])),
            "unknown_queries": len(judged) - len(ids),
            "unknown_documents": int((pairs[:, 1] < 0).sum()),
            "own_documents": sum(row >= 0 for row in own),
        },
    )


def qrels_file(folder: AnyPath, split: str | None = None) -> AnyPath:
    """The file of qrels of a split.

    Args:
      folder: the folder with `qrels/`.
      split: such as `"dev"`; `None` for `test`, else `dev`, else the only file.

    Raises:
      ValueError: if there is no such file, or more than one.
    """
    qrels = folder / "qrels"
    if not qrels.is_dir():
        raise ValueError(f"{folder} has no folder qrels/ with judgements, such as qrels/test.tsv")
    files = sorted(one for one in qrels.iterdir() if one.name.endswith(_QRELS_SUFFIXES))
    if not files:
        raise ValueError(f"{qrels} has no file of judgements; write {qrels / 'test.tsv'}")
    by_split = collections.defaultdict(list)
    for one in files:
        by_split[one.name.split(".")[0]].append(one)
    if split is not None:
        chosen = by_split[split]
    else:
        chosen = by_split["test"] or by_split["dev"] or files
    if len(chosen) != 1:
        names = ", ".join(one.name for one in chosen or files)
        many = "several files" if chosen else "no file"
        wanted = "" if split is None else f" of the split {split!r}"
        raise ValueError(
            f"{qrels} has {many} of judgements{wanted}; give the path of one of {names}"
        )
    return chosen[0]


def _relevant_pairs(
    judged: Sequence[Mapping[str, int]], rows: Mapping[str, int]
) -> Int[np.ndarray, "n 3"]:
    """Number of the query, row of the document, and grade of each relevant document."""
    pairs = [
        (query, rows.get(document, -1), grade)
        for query, of_query in enumerate(judged)
        for document, grade in of_query.items()
        if grade > 0
    ]
    return np.array(pairs, np.int64).reshape(-1, 3)


def _file(folder: AnyPath, name: str) -> AnyPath:
    files = [one for one in (folder / name, folder / f"{name}.gz") if one.exists()]
    if not files:
        raise ValueError(f"{folder} has no {name} or {name}.gz")
    if len(files) > 1:
        raise ValueError(f"{folder} has both {name} and {name}.gz; remove one of them")
    return files[0]


def _read_documents(path: AnyPath, text_fields: Sequence[str] = TEXT_FIELDS) -> Documents:
    with progress_bar(f"reading {path.name}", None) as advance:
        return read_documents(path, text_fields=text_fields, advance=advance)


def read_qrels(path: AnyPath) -> dict[str, dict[str, int]]:
    """Read relevance judgements: id of a query -> id of a document -> relevance.

    Raises:
      ValueError: for a damaged line, with its number, or a document judged twice.
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
    """Id of a query -> id of each of its positives -> 1."""
    positives = {}
    for name, (where, record) in zip(ids, read_records(path, kind=".jsonl"), strict=True):
        field = next((one for one in _POSITIVES_FIELDS if one in record), None)
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
    """Where each row of a table is, and its query, document and relevance."""
    for number, (where, record) in enumerate(read_records(path, kind=".txt")):
        line = record["text"]
        columns = line.split("\t") if "\t" in line else line.split()
        if number == 0 and columns and columns[-1].lower() in _QRELS_FIELDS[2]:
            continue
        if len(columns) == 4:  # of TREC, whose second column has no meaning
            del columns[1]
        if len(columns) == 3:
            yield where, columns
        elif columns:
            raise ValueError(
                f"{where} has {len(columns)} columns; the id of a query, the id of a document and "
                "the relevance are wanted, separated by tabs"
            )


def _records(path: AnyPath) -> Iterator[tuple[str, Sequence[Any]]]:
    """Where each JSON line is, and its query, document and relevance."""
    for where, record in read_records(path, kind=".jsonl"):
        values = []
        for names in _QRELS_FIELDS:
            field = next((name for name in names if name in record), None)
            if field is None and names[0] != "score":
                raise ValueError(f"{where} has none of the fields {', '.join(names)}")
            values.append(1 if field is None else record[field])
        ids = values[:2]
        if not all(isinstance(one, str | int) and not isinstance(one, bool) for one in ids):
            raise ValueError(f"{where}: the ids {ids!r:.80} are not texts")
        yield where, [*map(str, ids), values[2]]


def _grade(value: Any, where: str) -> int:
    try:
        number = float(value)
        if number.is_integer() and abs(number) <= _MOST_GRADE and not isinstance(value, bool):
            return int(number)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{where}: the relevance {value!r:.80} is not an integer")
