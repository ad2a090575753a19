"""Pairs to train on from plain files: JSON lines, CSV, TSV, Parquet, or a folder of `datasets`.

The first time, files are read row by row, checked, and written to a cache of `pair_cache.py`; their
rows are then read from there, in any order. A split is a range of the hashes of the queries, so
that rows keep their split when others are appended, and equal queries share one.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcl.data.checked_array import DamagedArray
from jaxcl.data.file_readers import read_fields
from jaxcl.data.pair_cache import PairCache, PairFiles
from jaxcl.data.pair_columns import find_columns, late_columns, named_fields
from jaxcl.data.pair_conversion import describe_rows, open_cache, rebuilt_cache
from jaxcl.data.pair_paths import cached_digests, describe_files, find_paths, unknown_split
from jaxcl.data.row_ranges import RowRange
from jaxcl.data.sources import checked_rows
from jaxcl.host.progress import say
from jaxcl.settings.file_kinds import REST, WHOLE, file_kind, names_other_files, share_of_split
from jaxcl.settings.sections import DataSet
from jaxcl.typing import Bool, Int, Integer

__all__ = ["FilePairs", "open_pair_files", "report_shared_queries"]

_RECORDS_AT_ONCE = 1 << 20

Ranges = tuple[tuple[int, int], ...]
_ALL: Ranges = ((0, WHOLE),)


class FilePairs:
    """Pairs of files, or those whose hash lies in some ranges; `open_pair_files` makes them.

    A record with several positives is as many rows, one after another.

    Args:
      files: the files.
      ranges: of hashes, in millionths.
    """

    def __init__(self, files: PairFiles, ranges: Ranges = _ALL) -> None:
        self.files, self.ranges = files, ranges
        self._cache = open_cache(files)
        self._rows = None if ranges == _ALL else _rows_of(self._cache, ranges)

    @property
    def fingerprint(self) -> str:
        """Names the content of the files, what is read of them, and the rows of the split."""
        content = json.dumps([self.files.fingerprint, self.ranges])
        return f"files:{hashlib.sha256(content.encode()).hexdigest()}"

    @property
    def row_ranges(self) -> tuple[RowRange, ...]:
        """The ranges of the rows' hashes, for each file."""
        ranges = []
        for path, digest in zip(self.files.paths, self.files.digests, strict=True):
            status = os.stat(path)
            identities = {f"content {digest}", f"path {path.resolve()}"}
            identities.add(f"inode {status.st_dev}/{status.st_ino}")
            name = f"{path.name} (numbered by their hash, in millionths)"
            ranges += [RowRange(name, frozenset(identities), *one) for one in self.ranges]
        return tuple(ranges)

    @property
    def facts(self) -> Mapping[str, Any]:
        """The number of records, and the rows that were left out."""
        return self._cache.facts

    def __len__(self) -> int:
        return self._cache.num_rows if self._rows is None else len(self._rows)

    def read(self, rows: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """Returns one dict per row number, in the order given.

        A row has "query" and "key", and where the files have them "group", "negatives" (a list of
        texts), "teacher_scores" (the key's, then one for each negative) and further fields.
        """
        numbers = np.array(checked_rows(rows, num_rows=len(self)), np.int64)
        if self._rows is not None:
            numbers = self._rows[numbers].astype(np.int64)
        try:
            return self._cache.read(numbers)
        except DamagedArray as damage:
            self._cache = rebuilt_cache(self.files, damage)
            return self._cache.read(numbers)

    def split_hashes(self) -> Iterator[Integer[np.ndarray, " _"]]:
        """The hashes of the split's records, block by block."""
        hashes = self._cache.hashes()
        for first in range(0, len(hashes), _RECORDS_AT_ONCE):
            part = hashes[first : first + _RECORDS_AT_ONCE]
            yield part[_in_ranges(part, self.ranges)]

    def __getstate__(self) -> tuple[PairFiles, Ranges]:
        return self.files, self.ranges

    def __setstate__(self, state: tuple[PairFiles, Ranges]) -> None:
        self.__init__(*state)  # type: ignore[misc] # in another process, which opens its own


def open_pair_files(data_set: DataSet, role: str, *, data_dir: Path) -> FilePairs:
    """Open the rows of a role, after reading the files if this is the first time.

    Args:
      data_set: its name, its splits and the names of its columns.
      role: one of its splits.
      data_dir: the folder that runs share; the cache of the files is kept there.

    Raises:
      ValueError: if there is no such file or split, the columns are unknown or ambiguous, or a row
        cannot be read and `bad_rows` is `"error"`.
      OSError: if a file cannot be read, or the cache cannot be written.
    """
    split = data_set.splits[role]
    own_file = names_other_files(split)
    name = split if own_file else str(data_set.name)
    ranges, folder_split = _ALL, "train"
    if split == REST:
        ranges, folder_split = _rest(data_set)
    elif not own_file:
        share = share_of_split(split)
        if share is None:
            raise ValueError(unknown_split(name, split))
        ranges, folder_split = ((share.start, share.stop),), share.split
    paths = find_paths(name, folder_split)
    files = _described(paths, data_set, directory=data_dir / "pairs", where=describe_files(paths))
    pairs = FilePairs(files, ranges)
    if (role == "train" or own_file) and jax.process_index() == 0:
        say(describe_rows(role, len(pairs), pairs.facts, files))
    if not len(pairs):
        raise ValueError(
            f"data.splits.{role}={split!r} has none of the {pairs.facts['records']:,} rows of "
            f"{describe_files(paths)}; give it a larger share, or another file"
        )
    if role != "train" and jax.process_index() == 0:
        _report_repeated_queries(role, pairs)
    return pairs


def _report_repeated_queries(role: str, pairs: FilePairs) -> None:
    """Warn of held-out queries with several keys, since each pair is evaluated by itself."""
    columns = pairs.files.columns
    if columns.split_by != columns.query:
        return
    queries = len(np.unique(np.concatenate(list(pairs.split_hashes()))))
    if queries < len(pairs):
        say(
            f"warning: {role} has {len(pairs):,} pairs of {queries:,} different queries. Each pair "
            "is evaluated by itself, so that the other keys of its query count as wrong; a folder "
            "in evaluation.sets may have several relevant documents for a query"
        )


def report_shared_queries(sources: Mapping[str, Sequence[Any]]) -> None:
    """Warn of held-out queries that are trained on, where held-out rows have files of their own.

    Args:
      sources: role -> the sources of its rows.
    """
    trained = [one for one in sources.get("train", ()) if isinstance(one, FilePairs)]
    for role, held_out in sources.items():
        for held in held_out if role != "train" else ():
            for train in trained:
                if isinstance(held, FilePairs) and held.files != train.files:
                    _report_shared(role, held, train)


def _report_shared(role: str, held: FilePairs, train: FilePairs) -> None:
    hashes = np.unique(np.concatenate(list(held.split_hashes())))
    shared = np.zeros(len(hashes), bool)
    for part in train.split_hashes():
        place = np.minimum(np.searchsorted(hashes, part), len(hashes) - 1)
        shared[place[hashes[place] == part]] = True
    if shared.any() and jax.process_index() == 0:
        say(
            f"warning: {shared.sum():,} of {len(hashes):,} different values of "
            f"{held.files.columns.split_by!r} in {role} ({describe_files(held.files.paths)}) are "
            f"also in train ({describe_files(train.files.paths)})"
        )


def _rest(data_set: DataSet) -> tuple[Ranges, str]:
    """The ranges that no other role takes of the split `"train"`."""
    shares = [share_of_split(split) for split in data_set.splits.values() if split != REST]
    ranges = []
    start = 0
    for share in sorted(share for share in shares if share and share.split == "train"):
        if start < share.start:
            ranges.append((start, share.start))
        start = max(start, share.stop)
    if start < WHOLE:
        ranges.append((start, WHOLE))
    if not ranges:
        raise ValueError(f"data.splits={dict(data_set.splits)} leaves no rows for {REST!r}")
    return tuple(ranges), "train"


def _described(
    paths: tuple[Path, ...], data_set: DataSet, *, directory: Path, where: str
) -> PairFiles:
    """The files with their digests and columns."""
    names = read_fields(paths[0], named_fields(data_set))
    if not names:
        raise ValueError(f"{paths[0]} has no rows")
    columns = find_columns(names, data_set, where=str(paths[0]))
    for path in paths[1:]:
        # A record of JSON lines may leave fields out; the others are checked when they are read.
        fields = columns.needed if _is_json(path) else read_fields(path)
        if missing := [name for name in columns.needed if name not in fields]:
            raise ValueError(f"{path} lacks {', '.join(missing)}, which {paths[0]} has")
        if late := late_columns(set(fields) - set(names), columns):
            raise ValueError(
                f"{path} has {', '.join(late)}, which {paths[0]} lacks; add it there, or leave it "
                "out of all files"
            )
    options = data_set.files
    if columns.label is not None and options.min_label is None:
        raise ValueError(
            f"{where} has labels in {columns.label!r}, by which a row may be no positive pair; set "
            "data.files.min_label to the least label of the rows to train on (below all labels to "
            "keep every row)"
        )
    if columns.label is None and options.min_label is not None:
        raise ValueError(
            f"data.files.min_label={options.min_label}, but {where} has no column that is known to "
            f"hold labels; set data.files.label_field to one of {', '.join(names)}"
        )
    digests = cached_digests(paths, directory)
    return PairFiles(paths, digests, columns, options.min_label, options.bad_rows, directory)


def _is_json(path: Path) -> bool:
    return path.suffix != ".arrow" and file_kind(path)[0] in ("jsonl", "ndjson", "json")


def _rows_of(cache: PairCache, ranges: Ranges) -> Int[np.ndarray, " _"]:
    """The numbers of the rows whose records' hashes lie in the ranges."""
    hashes = cache.hashes()
    chosen = np.zeros(len(hashes), bool)
    for first in range(0, len(hashes), _RECORDS_AT_ONCE):
        part = slice(first, first + _RECORDS_AT_ONCE)
        chosen[part] = _in_ranges(hashes[part], ranges)
    records = cache.record_of_row()
    rows = np.flatnonzero(chosen if records is None else chosen[records])
    return rows.astype(np.int32 if cache.num_rows < 2**31 else np.int64)


def _in_ranges(hashes: Integer[np.ndarray, " n"], ranges: Ranges) -> Bool[np.ndarray, " n"]:
    millionths = (hashes >> np.uint64(32)) * np.uint64(WHOLE) >> np.uint64(32)
    chosen = np.zeros(len(hashes), bool)
    for start, stop in ranges:
        chosen |= (millionths >= start) & (millionths < stop)
    return chosen
