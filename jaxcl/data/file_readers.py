"""Read the rows of files one by one: JSON lines, CSV, TSV, Parquet, Arrow and tar.

A folder of images is read like a file with one row per image.

A row that cannot be read is returned with its problem, so that the caller can report it, skip it
and continue.
"""

import bz2
import contextlib
import csv
import functools
import gzip
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxcl.data.images.folder_rows import FOLDER_FIELDS, folder_rows
from jaxcl.data.images.tar_rows import tar_fields, tar_rows
from jaxcl.host.files import open_regular
from jaxcl.host.printable import json_fault
from jaxcl.settings.file_kinds import file_kind

__all__ = ["FileRow", "place_of", "read_fields", "read_rows"]

_MAX_LINE = 64 * 2**20
"""The longest allowed line, in bytes; the longest lines in practice have a few million bytes."""
_ROWS_AT_ONCE = 1024
_ROWS_WITH_FIELDS = 100
"""The minimum number of JSON lines that are read to collect the fields of a file."""


class FileRow(NamedTuple):
    """One row of a file.

    Attributes:
      number: the number of the row's first line, counted from 1; in a file without lines, the
        number of the row.
      fields: the values by field name.
      problem: why the row cannot be read; `None` if it can be read.
    """

    number: int
    fields: Mapping[str, Any] = {}
    problem: str | None = None


def read_fields(path: Path, wanted: Collection[str] = ()) -> list[str]:
    """The names of a file's fields, in order.

    Args:
      path: the file.
      wanted: fields to look for. JSON lines may leave fields out, so lines are read until all of
        these fields have appeared, but at least 100 lines.

    Raises:
      ValueError: if the file has no rows, an unknown suffix, or two columns with the same name.
      OSError: if the file cannot be read.
    """
    if path.is_dir():
        return list(FOLDER_FIELDS)
    with _opened(path) as (kind, file):
        if kind == "tar":
            names = tar_fields(file, wanted)
        elif kind == "parquet":
            names = _parquet_file(file).schema_arrow.names
        elif kind == "arrow":
            names = _arrow_stream(file).schema.names
        elif kind == "json":
            names = _json_fields(file, wanted)
        else:
            names = _header(_csv_reader(file, kind))
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{path} has two columns named {min(twice)!r}; rename one")
    return names


def read_rows(path: Path, fields: Sequence[str]) -> Iterator[FileRow]:
    """Iterate over the rows of a file, in order.

    Args:
      path: the file; its suffix determines its kind.
      fields: the names of the fields to read. A row may lack some of them, or have other fields.

    Raises:
      ValueError: while iterating, if the file is damaged. Invalid rows are yielded, not raised.
      OSError: if the file cannot be read.
    """
    if path.is_dir():
        yield from (FileRow(number, row) for number, row in enumerate(folder_rows(path), 1))
        return
    with _opened(path) as (kind, file):
        if kind == "tar":
            rows = enumerate(tar_rows(file, fields), 1)
            yield from (FileRow(number, row, problem) for number, (row, problem) in rows)
        elif kind == "parquet":
            batches = _parquet_file(file).iter_batches(_ROWS_AT_ONCE, columns=list(fields))
            yield from _arrow_rows(batches)
        elif kind == "arrow":
            yield from _arrow_rows(batch.select(list(fields)) for batch in _arrow_stream(file))
        elif kind == "json":
            yield from _json_rows(file)
        else:
            yield from _csv_rows(_csv_reader(file, kind), is_tsv=kind == "tsv")


def place_of(path: Path, number: int) -> str:
    """The place of a row, for messages.

    Example:
      >>> place_of(Path("a/pairs.csv"), 7), place_of(Path("pairs.parquet"), 7)
      ('pairs.csv line 7', 'pairs.parquet row 7')
    """
    units = {".parquet": "row", ".arrow": "row", ".tar": "sample"}
    unit = "image" if path.is_dir() else units.get(path.suffix, "line")
    return f"{path.name} {unit} {number:,}"


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[str, Any]]:
    """Open a file, and yield its kind and its decompressed content. Errors name the file."""
    if path.suffix == ".arrow":
        kind, compression = "arrow", None
    else:
        kind, compression = file_kind(path)
    kind = "json" if kind in ("jsonl", "ndjson") else kind
    with open_regular(path) as file:
        try:
            yield kind, file if compression is None else _DECOMPRESSED[compression](file)
        except (EOFError, zlib.error, lzma.LZMAError) as error:
            raise ValueError(f"{path} is damaged ({error}); write it again") from error
        except ValueError as error:  # including pyarrow's errors
            names_file = str(error).startswith(str(path))
            raise error if names_file else ValueError(f"{path}: {error}") from error
        except OSError as error:
            if error.filename is not None:
                raise
            raise ValueError(f"{path} is damaged ({error}); write it again") from error


def _zstandard(file: Any) -> Any:
    import pyarrow  # not at the top, because the import is slow

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(file), "zstd"))


_DECOMPRESSED: Mapping[str, Callable[[Any], Any]] = {
    "gz": lambda file: gzip.GzipFile(fileobj=file),
    "bz2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
    "zst": _zstandard,
}


def _lines(file: Any) -> Iterator[tuple[int, bytes]]:
    """Yield the lines with their numbers, from 1, without a byte order mark.

    Lines that are too long are truncated.
    """
    for number in itertools.count(1):
        line = file.readline(_MAX_LINE + 1)
        if not line:
            return
        rest = line
        while len(rest) > _MAX_LINE and not rest.endswith(b"\n"):
            rest = file.readline(_MAX_LINE + 1)
        yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _json_rows(file: Any) -> Iterator[FileRow]:
    """Read JSON lines, and skip blank ones."""
    for number, line in _lines(file):
        if number == 1 and line.lstrip().startswith(b"["):
            raise ValueError("the file is one JSON array; write one object per line")
        if len(line) > _MAX_LINE:
            yield FileRow(number, problem=f"the line has more than {_MAX_LINE:,} bytes")
            continue
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            yield FileRow(number, problem=f"the line is not UTF-8 ({error.reason})")
        except (ValueError, RecursionError) as error:
            if line.strip():
                yield FileRow(number, problem=f"the line is not JSON ({json_fault(error)})")
        else:
            if isinstance(record, dict):
                yield FileRow(number, record)
            else:
                yield FileRow(number, problem="the line is not a JSON object")


def _json_fields(file: Any, wanted: Collection[str]) -> list[str]:
    names: dict[str, None] = {}
    readable, first_problem = 0, ""
    for row in _json_rows(file):
        if row.problem is not None:
            first_problem = first_problem or f"line {row.number}: {row.problem}"
            continue
        if readable >= _ROWS_WITH_FIELDS and names.keys() >= set(wanted):
            break
        names |= dict.fromkeys(row.fields)
        readable += 1
    if first_problem and not readable:
        raise ValueError(f"no row can be read; {first_problem}")
    return list(names)


def _csv_reader(file: Any, kind: str) -> Any:
    # The default is 131,072 characters per field.
    csv.field_size_limit(max(csv.field_size_limit(), _MAX_LINE))
    # Bytes that are not UTF-8 become surrogates, so that only texts that contain them are rejected.
    lines = (line.decode(errors="surrogateescape") for _, line in _lines(file))
    return csv.reader(lines, delimiter="\t" if kind == "tsv" else ",", strict=True)


def _header(reader: Any) -> list[str]:
    try:
        names = next(reader)
        "".join(names).encode()
        return names
    except StopIteration:
        return []
    except UnicodeEncodeError as error:
        raise ValueError("the header is not UTF-8; write the file in that encoding") from error
    except csv.Error as error:
        raise ValueError(f"the header cannot be read ({error})") from error


def _csv_rows(reader: Any, *, is_tsv: bool) -> Iterator[FileRow]:
    header = _header(reader)
    while True:
        number = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield FileRow(number, problem=f"the row cannot be read ({error})")
            continue
        if is_tsv and any("\t" in value and "\n" in value for value in values):
            # A text that begins with a quotation mark has swallowed the rows up to the next mark.
            problem = "a quoted value has a tab and a line break; write the file as .csv or .jsonl"
            yield FileRow(number, problem=problem)
        elif len(values) == len(header):
            yield FileRow(number, dict(zip(header, values, strict=True)))
        elif values:  # an empty line has no values
            problem = f"the row has {len(values)} values, but the header has {len(header)}"
            yield FileRow(number, problem=problem)


def _parquet_file(file: Any) -> Any:
    from pyarrow import parquet

    return parquet.ParquetFile(file)


def _arrow_stream(file: Any) -> Any:
    from pyarrow import ipc

    return ipc.open_stream(file)


def _arrow_rows(batches: Iterable[Any]) -> Iterator[FileRow]:
    num_before = 0
    for batch in batches:
        try:
            records: Iterable[Any] = batch.to_pylist()
        except UnicodeDecodeError:
            records = map(functools.partial(_arrow_record, batch), range(batch.num_rows))
        for number, record in enumerate(records, num_before + 1):
            if record is None:
                yield FileRow(number, problem="a text of the row is not UTF-8")
            else:
                yield FileRow(number, record)
        num_before += batch.num_rows


def _arrow_record(batch: Any, row: int) -> dict[str, Any] | None:
    try:
        return batch.slice(row, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return None
