"""Read pairs of texts with a score or a label, such as data sets of semantic similarity."""

import contextlib
import hashlib
import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from jaxcl.data.text_files import kind_of, read_records, read_rows, text_of
from jaxcl.host.paths import AnyPath
from jaxcl.typing import SIDES, Float

__all__ = ["ScoredPairs", "read_scored_pairs"]

_ALIKE = (
    ("sentence1", "sentence2"),
    ("sentence_1", "sentence_2"),
    ("text1", "text2"),
    ("text_1", "text_2"),
    ("sent1", "sent2"),
    ("question1", "question2"),
    ("sentence_A", "sentence_B"),
)
_QUERY_AND_KEY = (
    ("query", "key"),
    ("query", "document"),
    ("query", "passage"),
    ("query", "text"),
    ("question", "answer"),
    ("anchor", "positive"),
)
TEXT_FIELDS = _ALIKE + _QUERY_AND_KEY
"""The recognised fields of two texts, in order of preference."""
SCORE_FIELDS = (
    *("score", "label", "labels", "similarity", "similarity_score", "gold_score"),
    *("relatedness_score", "is_duplicate"),
)
_NO_HEADER = ("column 1", "column 2", "column 3")
_TABLES = (".csv", ".tsv")

Record = tuple[str, Mapping[str, Any]]


class ScoredPairs(NamedTuple):
    """Pairs of texts with a score each, in the order of a file.

    Attributes:
      first: the first text of each pair.
      second: the second text of each pair.
      scores: a finite number for each pair.
      fields: the fields of the two texts and the score, such as `("sentence1", "sentence2",
        "score")`.
      sides: the side on which a model embeds each text: both are queries, unless the names of the
        fields say that the second text is a document.
      fingerprint: equal fingerprints mean equal texts, scores and sides in equal order.
    """

    first: list[str]
    second: list[str]
    scores: Float[np.ndarray, " n"]
    fields: tuple[str, str, str]
    sides: tuple[str, str]
    fingerprint: str


def read_scored_pairs(path: AnyPath, *, fields: Sequence[str] | None = None) -> ScoredPairs:
    """Read pairs of texts with a score or a label.

    A CSV or TSV file may lack a header if each row holds two texts and a score.

    Args:
      path: a file of `jaxcl.data.text_files.TEXT_FILES`, which may be compressed with gzip.
      fields: the names of the fields of both texts and of the score; `None` takes the first pair of
        `TEXT_FIELDS` and the first of `SCORE_FIELDS` that the first record has.

    Returns:
      The pairs.

    Raises:
      ValueError: if there are no pairs, fields are missing or not recognised, or a record lacks a
        text or a finite score; the message names the line.
      OSError: if the file cannot be read.
    """
    if fields is not None and (isinstance(fields, str) or len(fields) != 3):
        raise ValueError(f"fields={fields!r}; give three names: two texts and the score")
    with contextlib.closing(_records(path)) as records:
        first_record = next(records, None)
        if first_record is None:
            raise ValueError(f"{path} has no pairs")
        names = _fields_of(*first_record, fields)
        return _pairs_of(chain([first_record], records), names)


def _pairs_of(records: Iterable[Record], fields: tuple[str, str, str]) -> ScoredPairs:
    query, key = SIDES
    sides = (query, key if fields[:2] in _QUERY_AND_KEY else query)
    digest = hashlib.sha256(" ".join(sides).encode())
    firsts, seconds, scores = [], [], []
    for where, record in records:
        first, second = (text_of(record, name, where) for name in fields[:2])
        score = _score_of(record, fields[2], where)
        firsts.append(first)
        seconds.append(second)
        scores.append(score)
        digest.update(f"{len(first)} {len(second)} {first} {second} {score!r}\n".encode())
    values = np.array(scores, np.float64)
    return ScoredPairs(firsts, seconds, values, fields, sides, digest.hexdigest())


def _records(path: AnyPath) -> Generator[Record, None, None]:
    if kind_of(path) not in _TABLES:
        yield from read_records(path)
        return
    with contextlib.closing(read_rows(path)) as rows:
        yield from _records_of_rows(rows)


def _records_of_rows(rows: Iterator[tuple[str, list[str]]]) -> Iterator[Record]:
    where, names = next(rows, ("", []))
    if _is_pair(names):
        rows, names = chain([(where, names)], rows), list(_NO_HEADER)
    elif len(set(names)) < len(names):
        raise ValueError(f"{where}: the header has a name twice: {_listed(names)}")
    for where, row in rows:
        if len(row) != len(names):
            raise ValueError(f"{where} has {len(row)} columns, but the first row has {len(names)}")
        yield where, dict(zip(names, row, strict=True))


def _is_pair(row: Sequence[str]) -> bool:
    return len(row) == 3 and _number_in(row[2]) is not None


def _number_in(text: str) -> float | None:
    try:
        number = float(text.replace("_", "x"))  # Python would read 1_0 as 10
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _fields_of(
    where: str, record: Mapping[str, Any], fields: Sequence[str] | None
) -> tuple[str, str, str]:
    if fields is not None:
        return fields[0], fields[1], fields[2]
    if tuple(record) == _NO_HEADER:
        return _NO_HEADER
    texts = next((pair for pair in TEXT_FIELDS if set(pair) <= set(record)), None)
    score = next((name for name in SCORE_FIELDS if name in record), None)
    if texts is None or score is None:
        wanted = "two texts" if texts is None else "a score or a label"
        raise ValueError(
            f"{where}: none of the fields {_listed(record)} is known to "
            f"hold {wanted}; call them sentence1, sentence2 and score, or, in a CSV or TSV file "
            "without a header, give two texts and a number in each row. Queries and their relevant "
            "documents are a folder with corpus.jsonl and queries.jsonl"
        )
    return *texts, score


def _score_of(record: Mapping[str, Any], name: str, where: str) -> float:
    if name not in record:
        raise ValueError(f"{where}: there is no field {name!r}; the fields are {_listed(record)}")
    value = record[name]
    score = _number_in(str(value)) if isinstance(value, str | int | float) else None
    if isinstance(value, bool):  # a label in JSON or Parquet
        score = float(value)
    if score is None:
        raise ValueError(f"{where}: {name} is {value!r:.80}; give a finite number")
    return score


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(f"{name!s:.40}" for name in names) or "(none)"
