"""Read some fields of a source's rows, name a row's place, and leave rows out of a source."""

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxcl.data.row_ranges import RowRange
from jaxcl.data.sources import PairSource, checked_rows
from jaxcl.typing import Int

__all__ = ["FieldSource", "PlacedSource", "SelectedPairs", "read_fields", "row_place"]

_Rows = Sequence[int] | np.ndarray


@runtime_checkable
class FieldSource(Protocol):
    """A source that can read some fields of its rows in less time than all of them."""

    def read_fields(self, rows: _Rows, names: Sequence[str]) -> list[dict[str, Any]]:
        """Like `PairSource.read`, with the fields in `names` that a row has."""


@runtime_checkable
class PlacedSource(Protocol):
    """A source that knows where the value of a row comes from."""

    def place(self, side: str, row: int) -> str | None:
        """The name of the file, for messages; `None` if there is none."""


def read_fields(source: PairSource, rows: _Rows, names: Sequence[str]) -> list[dict[str, Any]]:
    """Read some fields of rows, so that a table of captions does not read the images.

    Args:
      source: the rows; one without `read_fields` reads all fields.
      rows: row numbers.
      names: the fields; fields that a row lacks are left out.
    """
    if isinstance(source, FieldSource):
        return source.read_fields(rows, names)
    return [
        {name: record[name] for name in names if name in record} for record in source.read(rows)
    ]


def row_place(source: PairSource, side: str, row: int) -> str:
    """Name a row, with its file if the source knows it, for messages."""
    place = source.place(side, row) if isinstance(source, PlacedSource) else None
    return f"row {row:,}" if place is None else f"row {row:,} ({place})"


class SelectedPairs:
    """Some rows of a source.

    Args:
      source: the rows to choose from.
      chosen: their row numbers in `source`, ascending.

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
        """Identifies the rows of the source, and those chosen."""
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
        """The name of a row's file."""
        if isinstance(self.source, PlacedSource):
            return self.source.place(side, int(self.chosen[row]))
        return None

    def _of_source(self, rows: _Rows) -> Int[np.ndarray, " b"]:
        return self.chosen[np.array(checked_rows(rows, num_rows=len(self)), np.int64)]
