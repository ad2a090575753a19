"""Read some fields of a source's rows, name a row's place, and leave rows out of a source."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxcl.data.row_ranges import RowRange
from jaxcl.data.sources import PairSource, checked_rows
from jaxcl.typing import Int

__all__ = [
    "FieldSource",
    "PlacedSource",
    "SelectedPairs",
    "file_of_row",
    "iterate_fields",
    "read_fields",
    "row_place",
    "rows_that_fit",
]

_Rows = Sequence[int] | np.ndarray

_FIRST_ROWS, _MOST_ROWS = 16, 4096
_BYTES_AT_ONCE = 64 * 2**20


@runtime_checkable
class FieldSource(Protocol):
    """A source that can read some fields of its rows in less time than all of them."""

    def read_fields(self, rows: _Rows, names: Sequence[str]) -> list[dict[str, Any]]:
        """Like `PairSource.read`, with only those fields in `names` that a row has."""


@runtime_checkable
class PlacedSource(Protocol):
    """A source that knows where the value of a row comes from."""

    def place(self, side: str, row: int) -> str | None:
        """The name of the file with a row's value, for messages; `None` if there is no file."""


def read_fields(source: PairSource, rows: _Rows, names: Sequence[str]) -> list[dict[str, Any]]:
    """Read only some fields of rows: a table of captions, for example, need not read the images.

    Args:
      source: the rows; if it has no method `read_fields`, all their fields are read.
      rows: row numbers.
      names: the fields; fields that a row lacks are left out.
    """
    if isinstance(source, FieldSource):
        return source.read_fields(rows, names)
    return [
        {name: record[name] for name in names if name in record} for record in source.read(rows)
    ]


def iterate_fields(
    source: PairSource, rows: _Rows, names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Read some fields of rows one after the other, with only a few rows in memory.

    Batches grow from 16 rows to at most 4,096 rows or about 64 MiB, so that a batch has many texts
    but few images.

    Args:
      source, rows, names: as for `read_fields`.

    Raises:
      ValueError: if the source returns another number of rows than it was asked for.
    """
    first, count = 0, _FIRST_ROWS
    while first < len(rows):
        wanted = rows[first : first + count]
        part = read_fields(source, wanted, names)
        if len(part) != len(wanted):
            raise ValueError(
                f"the data source returned {len(part)} records for {len(wanted)} rows; its `read` "
                "must return one per row"
            )
        yield from part
        first += len(part)
        count = min(rows_that_fit(part, _BYTES_AT_ONCE), 2 * count, _MOST_ROWS)


def rows_that_fit(records: Sequence[Mapping[str, Any]], num_bytes: int) -> int:
    """Estimate how many rows like these, at least 1, fit into this number of bytes."""
    size = sum(_size(value) for record in records for value in record.values())
    return max(1, num_bytes * len(records) // max(size, 1))


def _size(value: Any) -> int:
    """The approximate size of a value, in bytes."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    return len(value) if isinstance(value, bytes | str) else 0


def row_place(source: PairSource, side: str, row: int) -> str:
    """Name a row, with its file if the source knows it, for messages."""
    file = file_of_row(source, side, row)
    return f"row {row:,}" if file is None else f"row {row:,} ({file})"


def file_of_row(source: PairSource, side: str, row: int) -> str | None:
    """The name of the file with a row's value, if the source knows it."""
    return source.place(side, row) if isinstance(source, PlacedSource) else None


class SelectedPairs:
    """Some rows of a source.

    Args:
      source: the rows to choose from.
      chosen: the row numbers in `source` to keep, ascending.

    Example:
      >>> from jaxcl.data.sources import InMemoryPairs
      >>> pairs = InMemoryPairs(["a", "b", "c"], ["x", "y", "z"])
      >>> SelectedPairs(pairs, np.array([0, 2])).read([1])
      [{'query': 'c', 'key': 'z'}]
    """

    def __init__(self, source: PairSource, chosen: Int[np.ndarray, " n"]) -> None:
        self.source, self.chosen = source, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def fingerprint(self) -> str:
        """A hash of the source's fingerprint and the chosen row numbers."""
        rows = np.ascontiguousarray(self.chosen, "<i8").tobytes()
        content = self.source.fingerprint.encode() + b"\n" + rows
        return f"selected:{hashlib.sha256(content).hexdigest()}"

    @property
    def row_ranges(self) -> tuple[RowRange, ...]:
        """The ranges of the source, which contain the chosen rows."""
        return self.source.row_ranges

    def read(self, rows: _Rows) -> list[dict[str, Any]]:
        """Return one dict per row number, in the order given."""
        return self.source.read(self._of_source(rows))

    def read_fields(self, rows: _Rows, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return some fields of the rows."""
        return read_fields(self.source, self._of_source(rows), names)

    def place(self, side: str, row: int) -> str | None:
        """The name of the file with a row's value, if the source knows it."""
        return file_of_row(self.source, side, int(self.chosen[row]))

    def _of_source(self, rows: _Rows) -> Int[np.ndarray, " b"]:
        return self.chosen[np.array(checked_rows(rows, num_rows=len(self)), np.int64)]
