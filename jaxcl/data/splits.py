"""Open the splits of a run, from one data set or from several concatenated ones."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcl.data.pair_files import open_pair_files, report_shared_queries
from jaxcl.data.row_ranges import RowRange, check_held_out
from jaxcl.data.source_fields import file_of_row, read_fields
from jaxcl.data.sources import PairSource, checked_rows, open_pairs
from jaxcl.settings.data_sections import DataSet, DataSettings
from jaxcl.settings.file_kinds import reads_files
from jaxcl.typing import SIDES, Int

__all__ = ["ConcatenatedPairs", "open_splits"]


class ConcatenatedPairs:
    """The rows of several data sets, one data set after the other.

    Each data set numbers its own `"group"`s, so equal numbers in different data sets are unrelated;
    `distinct_groups` renumbers them.

    Args:
      data_sets: the data sets, in order.

    Example:
      >>> from jaxcl.data.sources import InMemoryPairs
      >>> pairs = ConcatenatedPairs([InMemoryPairs(["a"], ["b"]), InMemoryPairs(["c"], ["d"])])
      >>> pairs.read([1]), pairs.data_set_of_row.tolist()
      ([{'query': 'c', 'key': 'd'}], [0, 1])
    """

    def __init__(self, data_sets: Sequence[PairSource]) -> None:
        self._data_sets = tuple(data_sets)
        self._edges = np.cumsum([0, *map(len, data_sets)])

    def __len__(self) -> int:
        return int(self._edges[-1])

    @property
    def data_sets(self) -> tuple[PairSource, ...]:
        """The data sets, in order."""
        return self._data_sets

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of rows of each data set."""
        return tuple(map(len, self._data_sets))

    @property
    def data_set_of_row(self) -> Int[np.ndarray, " n"]:
        """The index of each row's data set."""
        return np.repeat(np.arange(len(self._data_sets), dtype=np.int32), np.diff(self._edges))

    @property
    def first_rows(self) -> Int[np.ndarray, " _"]:
        """The number of the first row of each data set."""
        return self._edges[:-1]

    @property
    def fingerprint(self) -> str:
        """A hash of the fingerprints of the data sets, in order."""
        lines = "\n".join(data_set.fingerprint for data_set in self._data_sets)
        return f"concatenated:{hashlib.sha256(lines.encode()).hexdigest()}"

    @property
    def row_ranges(self) -> tuple[RowRange, ...]:
        """The rows of all data sets as ranges of files."""
        return tuple(rows for data_set in self._data_sets for rows in data_set.row_ranges)

    def read(self, rows: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """Return one dict per row number, in the order given."""
        return self._read(rows, lambda data_set, numbers: data_set.read(numbers))

    def read_fields(
        self, rows: Sequence[int] | np.ndarray, names: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Return some fields of the rows."""
        return self._read(rows, lambda data_set, numbers: read_fields(data_set, numbers, names))

    def place(self, side: str, row: int) -> str | None:
        """The name of the file with a row's value, if its data set knows it."""
        number = int(np.searchsorted(self._edges, row, side="right")) - 1
        data_set = self._data_sets[number]
        return file_of_row(data_set, side, row - int(self._edges[number]))

    def _read(
        self,
        rows: Sequence[int] | np.ndarray,
        read: Callable[[PairSource, Int[np.ndarray, " b"]], list[dict[str, Any]]],
    ) -> list[dict[str, Any]]:
        numbers = np.array(checked_rows(rows, num_rows=len(self)), np.int64)
        result: list[dict[str, Any]] = [{}] * len(numbers)
        data_set = np.searchsorted(self._edges, numbers, side="right") - 1
        for number in np.unique(data_set):
            positions = np.nonzero(data_set == number)[0]
            records = read(self._data_sets[number], numbers[positions] - self._edges[number])
            for position, record in zip(positions, records, strict=True):
                result[position] = record
        return result

    def distinct_groups(self, group: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Renumber groups so that no two data sets share one.

        The groups of the first data set keep their numbers. The groups of each further data set
        follow, in ascending order.

        Args:
          group: the groups of all rows, as each data set numbers them.

        Raises:
          ValueError: if the new numbers do not fit into int32.
        """
        distinct = np.array(group, np.int64)
        for begin, end in zip(self._edges[1:-1], self._edges[2:], strict=True):
            from_zero = np.unique(distinct[begin:end], return_inverse=True)[1]
            distinct[begin:end] = distinct[:begin].max() + 1 + from_zero
        if distinct.max() >= 2**31:
            raise ValueError(
                f"the groups of concatenated data sets go up to {distinct.max()}, because the "
                "groups of each follow the previous ones; give the first smaller numbers, so that "
                "all stay below 2^31"
            )
        return distinct.astype(np.int32)


def open_splits(
    data: DataSettings,
    name: str,
    *,
    data_dir: Path,
    open_source: Callable[[str], PairSource] | None = None,
    usable: Callable[[PairSource, str], PairSource] = lambda source, role: source,
) -> dict[str, PairSource]:
    """Open the splits of a run, caching files of pairs; TFDS data sets must be prepared already.

    Args:
      data: the settings, which name the splits, fields and further data sets.
      name: the first data set, instead of `data.name`: files, a TFDS name, or the folder of a
        prepared data set.
      data_dir: the folder where TFDS names are looked up and the rows of files are cached.
      open_source: role -> the pairs of the first data set, instead of opening `name`.
      usable: (pairs, role) -> the pairs to keep, called for each data set.

    Returns:
      Role -> the split's pairs: the rows of the first data set, then the rows of each data set in
      `data.concatenated` that has a split for this role.

    Raises:
      ValueError: if a data set, a split or a field is unknown, a split is empty, or another role
        shares rows with `"train"`.
    """
    parts: dict[str, list[PairSource]] = {role: [] for role in data.splits}
    ranges: dict[str, list[tuple[str, tuple[RowRange, ...]]]] = {role: [] for role in data.splits}
    further = [
        (f"data.concatenated.{key}", data_set) for key, data_set in data.concatenated.items()
    ]
    typed_sides = {
        f"{name}_sides": [side for side in SIDES if getattr(data.modality, side) == name]
        for name in ("text", "image")
    }
    for where, data_set in [("data", data.first._replace(name=name)), *sorted(further)]:
        for role, split in data_set.splits.items():
            try:
                if where == "data" and open_source is not None:
                    opened = open_source(role)
                else:
                    opened = _opened(data_set, role, data_dir, typed_sides)
            except ValueError as error:
                raise error if where == "data" else ValueError(f"{where}: {error}") from error
            if not len(opened):
                raise ValueError(f"{where}.splits.{role}={split!r} has no rows; give another split")
            parts[role].append(opened)
            ranges[role].append((f"{where}.splits.{role}={split!r}", opened.row_ranges))
    check_held_out(ranges)
    report_shared_queries(parts)
    result: dict[str, PairSource] = {}
    for role, sources in parts.items():
        usable_sources = [usable(source, role) for source in sources]
        result[role] = (
            usable_sources[0] if len(usable_sources) == 1 else ConcatenatedPairs(usable_sources)
        )
    return result


def _opened(
    data_set: DataSet, role: str, data_dir: Path, typed_sides: Mapping[str, Sequence[str]]
) -> PairSource:
    if reads_files(data_set.name, data_set.splits[role]):
        images = tuple(typed_sides["image_sides"])
        return open_pair_files(data_set, role, data_dir=data_dir, images=images)
    return open_pairs(
        str(data_set.name),
        data_set.splits[role],
        data_dir=data_dir,
        query_field=data_set.query_field,
        key_field=data_set.key_field,
        group_field=data_set.group_field,
        score_field=data_set.score_field,
        metadata_fields=data_set.metadata_fields,
        **typed_sides,
    )
