"""Read files of pairs row by row, check each row, and write the valid ones to a cache."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jaxcl.data.checked_array import DamagedArray
from jaxcl.data.file_readers import place_of, read_rows
from jaxcl.data.pair_cache import PairCache, PairFiles, write_cache
from jaxcl.data.pair_columns import PairColumns, late_columns
from jaxcl.data.pair_paths import cached_digests, describe_files
from jaxcl.data.pair_records import BadRow, PairRecord, read_pair
from jaxcl.host.progress import progress_bar, say

__all__ = ["describe_rows", "open_cache", "rebuild_cache"]

_NAMED_ROWS = 5
"""The number of bad rows that a message names; the others are only counted."""
_MOST_BAD_ROWS = 1000
"""The number of bad rows after which reading stops if bad rows are errors."""
_PROGRESS_ROWS = 1000


def open_cache(files: PairFiles) -> PairCache:
    """Open the cache of some files, and write it first if it is missing or damaged."""
    if not os.path.lexists(files.path):
        _write(files)
    try:
        return PairCache(files)
    except DamagedArray as damage:
        return rebuild_cache(files, damage)


def rebuild_cache(files: PairFiles, damage: DamagedArray) -> PairCache:
    """Write the cache of some files again, and open it.

    Raises:
      ValueError: if a file has changed since it was first read.
      OSError: if the new cache is damaged, too.
    """
    say(f"the files of pairs are read again: {damage}")
    if cached_digests(files.paths, files.directory) != files.digests:
        raise ValueError(
            f"{describe_files(files.paths)} has changed since it was read; start again"
        )
    _write(files)
    try:
        return PairCache(files)
    except DamagedArray as error:
        raise OSError(
            f"{error}, right after it was written; set run.data_dir to a folder on another disk"
        ) from error


def describe_rows(role: str, num_pairs: int, facts: Mapping[str, Any], files: PairFiles) -> str:
    """Describe the rows, the columns and the number of rows left out, in one line.

    Args:
      role: the role of the split.
      num_pairs: the number of pairs in the split.
      facts: the facts that the cache stores.
      files: the files.
    """
    parts = [
        f"{describe_files(files.paths)}: {facts['records']:,} rows, {num_pairs:,} pairs for {role}"
    ]
    if facts["below"]:
        parts.append(f"{facts['below']:,} with a label below {files.min_label} left out")
    if facts["bad"]:
        parts.append(f"skipped: {facts['bad_rows']}")
    return "; ".join([*parts, files.columns.described()])


class _LeftOut:
    """Counts the rows that are left out, and names the first bad rows.

    Args:
      stops: whether bad rows are an error, which stops reading.
    """

    def __init__(self, *, stops: bool) -> None:
        self.bad = self.below = 0
        self._stops = stops
        self._named: list[str] = []

    def add(self, location: str, error: BadRow) -> None:
        self.bad += 1
        if len(self._named) < _NAMED_ROWS:
            self._named.append(f"{location}: {error}")
        if self.bad == _MOST_BAD_ROWS and self._stops:
            self.check()

    def check(self) -> None:
        if self.bad and self._stops:
            raise ValueError(
                f"{self}. Correct the data, or set data.files.bad_rows='skip' to leave them out"
            )

    def __str__(self) -> str:
        more = f"; and {self.bad - len(self._named):,} more" if self.bad > len(self._named) else ""
        or_more = " or more" if self._stops and self.bad == _MOST_BAD_ROWS else ""
        rows = "row" if self.bad == 1 else "rows"
        return f"{self.bad:,}{or_more} {rows} cannot be used: {'; '.join(self._named)}{more}"


def _write(files: PairFiles) -> None:
    left_out = _LeftOut(stops=files.bad_rows == "error")
    records = 0

    def counted() -> Iterator[PairRecord]:
        nonlocal records
        for record in _records(files, left_out):
            records += 1
            if records % _PROGRESS_ROWS == 0:
                advance(_PROGRESS_ROWS)
            yield record
        left_out.check()
        if cached_digests(files.paths, files.directory) != files.digests:
            raise ValueError(
                f"{describe_files(files.paths)} has changed while it was read; start again"
            )
        if not records:
            reason = f": {left_out}" if left_out.bad else ""
            raise ValueError(f"{describe_files(files.paths)} has no rows to train on{reason}")

    def facts() -> dict[str, Any]:
        counts = {"records": records, "below": left_out.below, "bad": left_out.bad}
        return counts | {"bad_rows": str(left_out)}

    advance: Callable[[int], None]
    with progress_bar(f"reading {describe_files(files.paths)}", None) as advance:
        write_cache(files, counted(), facts=facts)


def _records(files: PairFiles, left_out: _LeftOut) -> Iterator[PairRecord]:
    """Yield the valid records of all files, except those whose label is too low."""
    columns = files.columns
    known = {*columns.needed, *columns.unused}
    for number, path in enumerate(files.paths):
        for row in read_rows(path, columns.needed):
            try:
                if row.problem is not None:
                    raise BadRow(row.problem)
                pair = read_pair(row.fields, columns, number=number)
            except BadRow as error:
                left_out.add(place_of(path, row.number), error)
                continue
            if not row.fields.keys() <= known:
                _check_late_fields(row.fields.keys() - known, columns, place_of(path, row.number))
                known |= row.fields.keys()
            if _is_positive(pair, files.min_label):
                yield pair
            else:
                left_out.below += 1


def _is_positive(pair: PairRecord, min_label: float | None) -> bool:
    return pair.label is None or min_label is None or pair.label >= min_label


def _check_late_fields(fields: Iterable[str], columns: PairColumns, location: str) -> None:
    """Reject fields that would have been read if the first rows had them."""
    if late := late_columns(fields, columns):
        raise ValueError(
            f"{location} has {', '.join(late)}, which the first rows lack; name such a field in "
            "data.files, move a row with it to the beginning, or leave it out of the file"
        )
