"""Read texts from a file in blocks: plain lines, or a field of JSON lines, CSV, TSV or Parquet.

No text is skipped, so row i of any output belongs to text i of the file.
"""

import contextlib
import csv
import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jaxcl.host.files import open_regular
from jaxcl.host.paths import AnyPath

__all__ = ["TEXT_FILES", "read_texts"]

_MAX_LINE = 64 * 2**20
"""The most bytes of a line; the longest real lines have a few million."""
_BLOCK_LETTERS = 16 * 2**20


def read_texts(
    path: AnyPath | None, *, field: str = "text", kind: str | None = None, block_size: int = 10_000
) -> Iterator[list[str]]:
    """Read the texts of a file, block by block.

    Args:
      path: the file; `None` for standard input.
      field: the field of the texts in JSON lines, or their column in a table.
      kind: one of `TEXT_FILES`; by default, the file's suffix.
      block_size: the most texts in a block; blocks of long texts are smaller.

    Returns:
      An iterator over lists of texts, in order.

    Raises:
      ValueError: for an unknown kind of file; while iterating, for a line or row without a text,
        with its number.
      OSError: if the file cannot be read.
    """
    name = "standard input" if path is None else str(path)
    kind = kind or ("" if path is None else path.suffix.lower())
    if kind not in TEXT_FILES:
        raise ValueError(f"{name} has an unknown suffix; give one of {', '.join(TEXT_FILES)}")
    return _read(path, name, functools.partial(TEXT_FILES[kind], field=field), block_size)


def _read(
    path: AnyPath | None, name: str, parse: Callable[..., Iterator[str]], block_size: int
) -> Iterator[list[str]]:
    with contextlib.ExitStack() as stack:
        file = sys.stdin.buffer if path is None else stack.enter_context(open_regular(path))
        try:
            yield from _blocks(parse(file), block_size)
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{name}: {error}") from error


def _blocks(texts: Iterable[str], block_size: int) -> Iterator[list[str]]:
    block: list[str] = []
    letters = 0
    for text in texts:
        block.append(text)
        letters += len(text)
        if len(block) == block_size or letters >= _BLOCK_LETTERS:
            yield block
            block, letters = [], 0
    if block:
        yield block


def _lines(file: Any) -> Iterator[tuple[int, str]]:
    """Number the lines from 1, and strip line ends."""
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


def _plain_lines(file: Any, field: str) -> Iterator[str]:
    for _, line in _lines(file):
        yield line


def _json_lines(file: Any, field: str) -> Iterator[str]:
    for number, line in _lines(file):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} is not JSON ({error})") from error
        if not isinstance(record, dict):
            raise ValueError(f"line {number} is not a JSON object")
        yield _text_of(record, field, f"line {number}")


def _separated(file: Any, field: str, *, delimiter: str) -> Iterator[str]:
    lines = (f"{line}\n" for _, line in _lines(file))
    csv.field_size_limit(max(csv.field_size_limit(), _MAX_LINE))  # the default is 131,072 letters
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    for record in reader:
        yield _text_of(record, field, f"line {reader.line_num}")


def _parquet(file: Any, field: str) -> Iterator[str]:
    from pyarrow import parquet  # not at the top, because the import is slow

    table = parquet.ParquetFile(file)
    if field not in table.schema_arrow.names:
        raise ValueError(_no_field(field, table.schema_arrow.names))
    row = 0
    for batch in table.iter_batches(batch_size=1024, columns=[field]):
        for text in batch.column(0).to_pylist():
            row += 1
            yield _text_of({field: text}, field, f"row {row}")


def _text_of(record: Mapping[str, Any], field: str, where: str) -> str:
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


def _no_field(field: str, names: Iterable[str]) -> str:
    return f"there is no field {field!r}; the fields are {', '.join(map(str, names)) or 'none'}"


TEXT_FILES: Mapping[str, Callable[..., Iterator[str]]] = {
    ".txt": _plain_lines,
    ".jsonl": _json_lines,
    ".csv": functools.partial(_separated, delimiter=","),
    ".tsv": functools.partial(_separated, delimiter="\t"),
    ".parquet": _parquet,
}
"""Suffix of a file -> a function `(file, field) -> texts`."""
