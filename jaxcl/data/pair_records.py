"""Turn a record of a file into a checked query with its positives and negatives."""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxcl.data.images.decoding import BadImage
from jaxcl.data.images.image_references import TarMember, as_reference
from jaxcl.data.pair_columns import PairColumns
from jaxcl.typing import SIDES

__all__ = ["BadRow", "PairRecord", "read_pair"]


_LARGEST = 3.4e38
"""Approximately the largest float32."""


class BadRow(ValueError):
    """A record that cannot be trained on, with the reason."""


class PairRecord(NamedTuple):
    """A checked record; texts are UTF-8, and images are references (`as_reference`).

    Attributes:
      query: the query's text or image.
      positives: one or more texts or images.
      negatives: zero or more texts.
      positive_scores, negative_scores: a teacher's scores, one per text; empty without a teacher.
      label: the similarity of query and key; `None` in files without labels.
      group: an integer or a text; `None` in files without groups.
      score: the score that a loss reads; `None` if no column of scores is read.
      metadata: the values of the metadata fields, as JSON.
      split_by: the value that determines the split of the record.
    """

    query: bytes
    positives: Sequence[bytes]
    negatives: Sequence[bytes] = ()
    positive_scores: Sequence[float] = ()
    negative_scores: Sequence[float] = ()
    label: float | None = None
    group: int | str | None = None
    score: float | None = None
    metadata: bytes = b""
    split_by: bytes = b""


def read_pair(record: Mapping[str, Any], columns: PairColumns, *, number: int = 0) -> PairRecord:
    """Read the columns of a record.

    Args:
      record: the fields by name.
      columns: the columns to read.
      number: the index of the record's file; paths of images are relative to that file's folder.

    Raises:
      BadRow: if a field is missing, or has another type or no content.
    """
    read_query, read_key = (
        functools.partial(_image, number=number) if side in columns.images else _text
        for side in SIDES
    )
    query = read_query(record.get(columns.query), columns.query)
    if columns.key == columns.query:
        positives = [b""]  # the cache stores each image once
    else:
        positives = _positives(record.get(columns.key), columns.key, read_key)
    value = record.get(columns.split_by)
    if columns.images and isinstance(value, TarMember):
        split_by = value.name.encode()
    elif columns.images and isinstance(value, str):
        split_by = value.encode(errors="surrogatepass")
    elif columns.split_by == columns.query:
        split_by = query
    elif columns.split_by == columns.key:
        split_by = b"\n".join(positives)
    else:
        split_by = str(_required(record, columns.split_by)).encode(errors="surrogatepass")
    pair = PairRecord(query, positives, split_by=split_by)
    if columns.negatives:
        pair = pair._replace(negatives=_negatives(record, columns.negatives))
    if columns.scores:
        pair = _with_scores(pair, record, columns.scores)
    if columns.label is not None:
        pair = pair._replace(label=_number(_required(record, columns.label), columns.label))
    if columns.group is not None:
        pair = pair._replace(group=_group(_required(record, columns.group), columns.group))
    if columns.score is not None:
        pair = pair._replace(score=_number(_required(record, columns.score), columns.score))
    if columns.metadata:
        pair = pair._replace(metadata=_metadata(record, columns.metadata))
    return pair


def _required(record: Mapping[str, Any], field: str) -> Any:
    value = record.get(field)
    if value is None or value == "":
        raise BadRow(f"there is no {field!r}")
    return value


def _text(value: Any, field: str) -> bytes:
    if not isinstance(value, str):
        if value is None:
            raise BadRow(f"there is no {field!r}")
        raise BadRow(f"{field!r} is {_short(value)}, which is not a text")
    if not value or value.isspace():
        raise BadRow(f"{field!r} is empty")
    try:
        return value.encode()
    except UnicodeEncodeError as error:  # JSON can hold half a surrogate pair
        raise BadRow(f"{field!r} is not UTF-8 ({error.reason})") from error


def _image(value: Any, field: str, *, number: int) -> bytes:
    try:
        return as_reference(value, number=number)
    except BadImage as error:
        raise BadRow(f"{field!r}: {error}") from error


def _positives(value: Any, field: str, read: Callable[[Any, str], bytes]) -> list[bytes]:
    if not isinstance(value, list):
        return [read(value, field)]
    if not value:
        raise BadRow(f"{field!r} is an empty list")
    return [read(one, field) for one in value]


def _negatives(record: Mapping[str, Any], fields: Sequence[str]) -> list[bytes]:
    """The negatives in some columns. A column may be empty, but a list must hold only texts."""
    negatives: list[bytes] = []
    for field in fields:
        value = record.get(field)
        if isinstance(value, list):
            negatives += [_text(text, field) for text in value]
        elif value is not None and value != "":
            negatives.append(_text(value, field))
    return negatives


def _with_scores(pair: PairRecord, record: Mapping[str, Any], fields: Sequence[str]) -> PairRecord:
    """Add scores given as `{"positives": …, "negatives": …}`, as two columns, or as one list."""
    num_positives, num_negatives = len(pair.positives), len(pair.negatives)
    value = _required(record, fields[0])
    if len(fields) == 2:
        parts = [_numbers(_required(record, field), field) for field in fields]
    elif isinstance(value, Mapping):
        parts = [_numbers(value.get(side, []), fields[0]) for side in ("positives", "negatives")]
    else:
        scores = _numbers(value, fields[0])
        parts = [scores[:num_positives], scores[num_positives:]]
    counts = [len(part) for part in parts]
    if counts != [num_positives, num_negatives]:
        raise BadRow(
            f"{' and '.join(map(repr, fields))} has {counts[0]} and {counts[1]} scores for "
            f"{num_positives} positives and {num_negatives} negatives"
        )
    return pair._replace(positive_scores=parts[0], negative_scores=parts[1])


def _numbers(value: Any, field: str) -> list[float]:
    values = value if isinstance(value, list) else [value]
    return [_number(number, field) for number in values]


def _number(value: Any, field: str) -> float:
    try:
        number = float(value) if isinstance(value, bool | int | float | str) else math.nan
    except (ValueError, OverflowError):  # an integer in JSON may be larger than any float
        number = math.nan
    if not abs(number) <= _LARGEST:
        raise BadRow(f"{field!r} is {_short(value)}, which is not a finite number")
    return number


def _group(value: Any, field: str) -> int | str:
    if isinstance(value, str):
        _text(value, field)
        return value
    if not isinstance(value, int):
        raise BadRow(f"{field!r} is {_short(value)}, which is neither an integer nor a text")
    if not -(2**31) <= value < 2**31:
        raise BadRow(f"{field!r} is {value}, which does not fit into int32")
    return int(value)


def _metadata(record: Mapping[str, Any], fields: Sequence[str]) -> bytes:
    try:
        return json.dumps([record.get(field) for field in fields], default=str).encode()
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{', '.join(fields)} cannot be kept ({error})") from error


def _short(value: Any) -> str:
    return f"{value!r:.60}"
