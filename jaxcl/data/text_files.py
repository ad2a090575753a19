"""Read texts or records from a file in blocks: plain lines, JSON lines, CSV, TSV or Parquet.

The files may be compressed with gzip. No text is skipped, so row i of any output belongs to text i
of the file.
"""

import contextlib
import csv
import functools
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any, TypeVar

from jaxcl.host.files import open_regular
from jaxcl.host.paths import AnyPath
from jaxcl.host.printable import json_fault

__all__ = [
    "TEXT_FILES",
    "is_text_file",
    "json_object",
    "kind_of",
    "read_records",
    "read_rows",
    "read_texts",
    "text_of",
]

T = TypeVar("T")
Records = Generator[tuple[str, dict[str, Any]], None, None]
Rows = Generator[tuple[str, list[str]], None, None]

_MAX_LINE = 64 * 2**20
"""The longest allowed line, in bytes; the longest lines in practice have a few million bytes."""
_BLOCK_CHARACTERS = 16 * 2**20
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_texts(
    path: AnyPath | None, *, field: str = "text", kind: str | None = None, block_size: int = 10_000
) -> Iterator[list[str]]:
    """Read the texts of a file, block by block.

    Args:
      path: the file; `None` for standard input.
      field: the field of the texts in JSON lines, or their column in a table.
      kind: one of `TEXT_FILES`; by default, the file's suffix.
      block_size: the largest number of texts in a block; blocks of long texts are smaller.

    Returns:
      An iterator over lists of texts, in order.

    Raises:
      ValueError: if the kind of the file is unknown; while iterating, if a line or row has no text
        (the message gives its number).
      OSError: if the file cannot be read.
    """
    kind = kind_of(path, kind)
    fields = None if kind == ".txt" else (field,)
    name = "text" if kind == ".txt" else field
    records = _read(path, functools.partial(TEXT_FILES[kind], fields=fields))
    return _blocks((text_of(record, name, where) for where, record in records), block_size)


def read_records(
    path: AnyPath, *, kind: str | None = None, fields: Sequence[str] | None = None
) -> Records:
    """Read the records of a file one by one.

    Args:
      path: the file.
      kind: one of `TEXT_FILES`; by default, the file's suffix.
      fields: the columns to read from a Parquet file; `None` reads all.

    Returns:
      An iterator over pairs of a location, such as `"docs.jsonl: line 3"`, and the record there. A
      plain line is a record with the single field `"text"`.

    Raises:
      ValueError: if the kind of the file is unknown; while iterating, if a line is damaged (the
        message gives its number).
      OSError: if the file cannot be read.
    """
    return _read(path, functools.partial(TEXT_FILES[kind_of(path, kind)], fields=fields))


def read_rows(path: AnyPath) -> Rows:
    """Read the rows of a CSV or TSV file one by one, as lists. A header is read as the first row.

    Args:
      path: the file.

    Returns:
      An iterator over pairs of a location, such as `"docs.csv: line 3"`, and the values of the row
      there. Empty lines are left out.

    Raises:
      ValueError: if the file is of another kind; while iterating, if a line is damaged (the message
        gives its number).
      OSError: if the file cannot be read.
    """
    kind = kind_of(path)
    if kind not in _DELIMITERS:
        raise ValueError(f"{path} is not a table; give a {' or '.join(_DELIMITERS)} file")
    return _read(path, functools.partial(_rows, delimiter=_DELIMITERS[kind]))


def text_of(record: Mapping[str, Any], field: str, where: str) -> str:
    """The text in a field of a record.

    Args:
      record: a record from `read_records`.
      field: the name of the field.
      where: the location of the record, for the message.

    Raises:
      ValueError: if the record has no such field, or its value is not a Unicode text.
    """
    if field not in record:
        raise ValueError(f"{where}: {_no_field(field, record)}")
    text = record[field]
    if not isinstance(text, str):
        raise ValueError(f"{where}: {field} is {text!r:.80}, which is not a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can encode a lone surrogate
        raise ValueError(f"{where}: {field} is not Unicode ({error.reason})") from error
    return text


def kind_of(path: AnyPath | None, kind: str | None = None) -> str:
    """Return the given kind of a file, or the kind that its suffix names.

    Raises:
      ValueError: if the kind is not in `TEXT_FILES`.
    """
    if kind is None and path is not None:
        kind = _suffix(path)
    if kind is None or kind not in TEXT_FILES:
        name = "standard input" if path is None else str(path)
        raise ValueError(f"{name} has an unknown suffix; give one of {', '.join(TEXT_FILES)}")
    return kind


def is_text_file(path: AnyPath) -> bool:
    """Whether a path is a file with a suffix of `TEXT_FILES`, compressed or not."""
    return path.is_file() and _suffix(path) in TEXT_FILES


def _suffix(path: AnyPath) -> str:
    suffixes = PurePath(path.name.lower()).suffixes
    return next(reversed([suffix for suffix in suffixes if suffix != ".gz"]), "")


def _read(
    path: AnyPath | None, parse: Callable[[Any], Iterator[tuple[str, T]]]
) -> Generator[tuple[str, T], None, None]:
    name = "standard input" if path is None else str(path)
    with contextlib.ExitStack() as stack:
        file = sys.stdin.buffer if path is None else stack.enter_context(open_regular(path))
        if path is not None and path.name.lower().endswith(".gz"):
            file = stack.enter_context(gzip.open(file))
        try:
            for where, record in parse(file):
                yield f"{name}: {where}", record
        except (csv.Error, EOFError, gzip.BadGzipFile, zlib.error, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error


def _blocks(texts: Iterable[str], block_size: int) -> Iterator[list[str]]:
    block: list[str] = []
    characters = 0
    for text in texts:
        block.append(text)
        characters += len(text)
        if len(block) == block_size or characters >= _BLOCK_CHARACTERS:
            yield block
            block, characters = [], 0
    if block:
        yield block


def _lines(file: Any) -> Iterator[tuple[int, str]]:
    """Yield the lines with their numbers, from 1, without line ends."""
    number = 0
    while line := file.readline(_MAX_LINE + 1):
        number += 1
        if len(line) > _MAX_LINE:
            raise ValueError(f"line {number} has more than {_MAX_LINE:,} bytes")
        try:
            # Editors and spreadsheets may begin a file with a byte order mark.
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            yield number, text.removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise ValueError(f"line {number} is not UTF-8 ({error.reason})") from error


def _plain_lines(file: Any, fields: Sequence[str] | None) -> Records:
    for number, line in _lines(file):
        yield f"line {number}", {"text": line}


def _json_lines(file: Any, fields: Sequence[str] | None) -> Records:
    for number, line in _lines(file):
        yield f"line {number}", json_object(line, f"line {number}")


def json_object(text: str, name: str) -> dict[str, Any]:
    """Parse a JSON object; for any other text, raise a `ValueError` that begins with `name`."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON ({json_fault(error)})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{name} is not a JSON object")
    return record


def _separated(file: Any, fields: Sequence[str] | None, *, delimiter: str) -> Records:
    rows = _rows(file, delimiter=delimiter)
    first, header = next(rows, ("", []))
    if twice := {name for name in header if header.count(name) > 1}:
        raise ValueError(f"{first}: the header has {min(twice)!r} twice; rename one")
    for where, row in rows:
        if len(row) != len(header):
            raise ValueError(f"{where} has {len(row)} values, but the header has {len(header)}")
        yield where, dict(zip(header, row, strict=True))


def _rows(file: Any, *, delimiter: str) -> Rows:
    reader = csv.reader(_table_lines(file), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if delimiter == "\t" and any("\t" in value and "\n" in value for value in row):
                # A text that begins with a quotation mark would swallow rows up to the next mark.
                raise csv.Error("a quoted value has a tab and a line break")
            if row:
                yield f"line {reader.line_num}", row
    except csv.Error as error:
        advice = 'put texts that begin with " in quotes, and write " twice in them'
        raise ValueError(f"line {reader.line_num}: {error}; {advice}") from error


def _table_lines(file: Any) -> Iterator[str]:
    csv.field_size_limit(max(csv.field_size_limit(), _MAX_LINE))  # the default is 131,072
    return (f"{line}\n" for _, line in _lines(file))


def _parquet(file: Any, fields: Sequence[str] | None) -> Records:
    from pyarrow import parquet  # not at the top, because the import is slow

    table = parquet.ParquetFile(file)
    names = table.schema_arrow.names
    for field in fields or ():
        if field not in names:
            raise ValueError(_no_field(field, names))
    row = 0
    for batch in table.iter_batches(batch_size=1024, columns=fields and list(fields)):
        for record in batch.to_pylist():
            row += 1
            yield f"row {row}", record


def _no_field(field: str, names: Iterable[str]) -> str:
    return f"there is no field {field!r}; the fields are {', '.join(map(str, names)) or 'none'}"


TEXT_FILES: Mapping[str, Callable[..., Records]] = {
    ".txt": _plain_lines,
    ".jsonl": _json_lines,
    **{kind: functools.partial(_separated, delimiter=mark) for kind, mark in _DELIMITERS.items()},
    ".parquet": _parquet,
}
"""Suffix of a file -> a function from (file, fields) to records with their line or row number."""
