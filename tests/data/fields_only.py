"""A source that notes which fields of which rows are read."""

from collections.abc import Sequence
from typing import Any


class FieldsOnly:
    """The rows of another source; reading all fields of a row is an error.

    Attributes:
      reads: the row numbers and the fields of each call of `read_fields`.
    """

    row_ranges = ()

    def __init__(self, source):
        self._source = source
        self.reads: list[tuple[list[int], tuple[str, ...]]] = []

    @property
    def fingerprint(self) -> str:
        return self._source.fingerprint

    def __len__(self) -> int:
        return len(self._source)

    def read(self, rows) -> list[dict[str, Any]]:
        raise AssertionError("all fields are read")

    def read_fields(self, rows, names: Sequence[str]) -> list[dict[str, Any]]:
        self.reads.append((list(rows), tuple(names)))
        return [
            {name: one[name] for name in names if name in one} for one in self._source.read(rows)
        ]

    @property
    def largest(self) -> int:
        """The largest number of rows that were read at a time."""
        return max(len(rows) for rows, _ in self.reads)

    @property
    def fields(self) -> set[str]:
        """All fields that were read."""
        return {name for _, names in self.reads for name in names}
