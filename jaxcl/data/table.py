"""Tables: the rows of a split as inputs of the encoders, read by row number."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from jaxcl.data.row_labels import joined_numbers
from jaxcl.typing import SIDES, Batch, Int, PyTree

__all__ = [
    "SidesTable",
    "Table",
    "TextTable",
    "join_sides",
    "label_column",
    "query_numbers",
    "row_lengths",
    "table_batch",
]

_ROWS_AT_ONCE = 65_536


@runtime_checkable
class Table(Protocol):
    """The rows of a split: for each side a tree of arrays, and the labels of the rows."""

    @property
    def num_rows(self) -> int:
        """The number of rows in the split."""

    def labels(self, rows: Int[np.ndarray, "*b"]) -> dict[str, Int[np.ndarray, "*b"]]:
        """The labels of the given rows: `"row"`, `"text"` and `"group"`, int32.

        `"text"` is a number shared by rows with equal queries or equal keys.
        """

    def side(self, side: str, rows: Int[np.ndarray, " b"]) -> PyTree:
        """One side's inputs of the given rows, in the order given: arrays `[b, …]`.

        The result depends only on the rows. A worker thread calls this method.
        """

    def spec(self, side: str) -> PyTree:
        """The tree of `side` for one row: a `jax.ShapeDtypeStruct` per array, without axis `b`."""


@runtime_checkable
class TextTable(Protocol):
    """A table of texts, which knows their lengths without reading them."""

    def lengths(self, side: str, rows: Int[np.ndarray, "*b"]) -> Int[np.ndarray, "*b"]:
        """The number of tokens on one side of each given row."""


def table_batch(table: Table, rows: Int[np.ndarray, " b"]) -> Batch:
    """The batch of the given rows, in the order given."""
    return {**{side: table.side(side, rows) for side in SIDES}, **table.labels(rows)}


def label_column(table: Table, name: str) -> Int[np.ndarray, " n"]:
    """One label of all rows, such as `"group"`, in four bytes per row."""
    column = np.empty(table.num_rows, np.int32)
    for first in range(0, table.num_rows, _ROWS_AT_ONCE):
        rows = np.arange(first, min(first + _ROWS_AT_ONCE, table.num_rows))
        column[rows] = table.labels(rows)[name]
    return column


def query_numbers(table: Table) -> Int[np.ndarray, " n"]:
    """A number per row that rows with the same query share.

    In a table whose sides are of one modality, rows with the same key also share a number.
    """
    return label_column(table.sides["query"] if isinstance(table, SidesTable) else table, "text")


def row_lengths(
    table: Table, side: str, rows: Int[np.ndarray, "*b"]
) -> Int[np.ndarray, "*b"] | None:
    """The number of tokens on one side of each given row; `None` if the side is not text."""
    if isinstance(table, SidesTable):
        table = table.sides[side]
    return table.lengths(side, rows) if isinstance(table, TextTable) else None


class SidesTable(NamedTuple):
    """A table whose two sides come from tables of different kinds, such as images and captions.

    Attributes:
      sides: side -> a table of the same rows.
      text: a number per row, shared by rows with equal queries or equal keys.
    """

    sides: Mapping[str, Table]
    text: Int[np.ndarray, " n"]

    @property
    def num_rows(self) -> int:
        """The number of rows in the split."""
        return self.sides["query"].num_rows

    def labels(self, rows: Int[np.ndarray, "*b"]) -> dict[str, Int[np.ndarray, "*b"]]:
        """The labels of the given rows."""
        return self.sides["query"].labels(rows) | {"text": self.text[rows]}

    def side(self, side: str, rows: Int[np.ndarray, " b"]) -> PyTree:
        """One side's inputs of the given rows."""
        return self.sides[side].side(side, rows)

    def spec(self, side: str) -> PyTree:
        """The shapes and types of one row of a side."""
        return self.sides[side].spec(side)


def join_sides(tables: Mapping[str, Table]) -> Table:
    """Join the tables of both sides.

    Args:
      tables: side -> a table of the same rows; if both sides have the same table, it is returned.

    Raises:
      ValueError: if the tables have different lengths.
    """
    queries, keys = (tables[side] for side in SIDES)
    if queries is keys:
        return queries
    if queries.num_rows != keys.num_rows:
        raise ValueError(f"{queries.num_rows} queries and {keys.num_rows} keys do not form pairs")
    text = joined_numbers(*(label_column(table, "text") for table in (queries, keys)))
    return SidesTable(dict(tables), text)
