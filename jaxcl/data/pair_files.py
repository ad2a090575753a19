"""Pairs to train on from plain files: JSON lines, CSV, TSV, Parquet, or a `datasets` folder.

The first run reads the files row by row, checks each row and writes a cache (`pair_cache.py`), from
which rows are read in any order. A split is a range of the hashes of the queries, so rows keep
their split when more rows are appended, and equal queries are in the same split.
"""

import functools
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
from jaxcl.data.images.file_index import digest_of_files
from jaxcl.data.images.image_references import (
    read_references,
    reference_place,
    referenced_paths,
)
from jaxcl.data.pair_cache import PairCache, PairFiles
from jaxcl.data.pair_columns import find_columns, late_columns, named_fields
from jaxcl.data.pair_conversion import describe_rows, open_cache, rebuild_cache
from jaxcl.data.pair_paths import cached_digests, describe_files, find_paths, unknown_split
from jaxcl.data.row_ranges import RowRange
from jaxcl.data.sources import checked_rows
from jaxcl.host.progress import say
from jaxcl.settings.data_sections import DataSet
from jaxcl.settings.file_kinds import REST, WHOLE, file_kind, names_other_files, share_of_split
from jaxcl.typing import Bool, Int, Integer

__all__ = ["FilePairs", "open_pair_files", "report_shared_queries"]

_RECORDS_AT_ONCE = 1 << 20
_ROWS_AT_ONCE = 4096

Ranges = tuple[tuple[int, int], ...]
_ALL: Ranges = ((0, WHOLE),)


class FilePairs:
    """Pairs from files, restricted to ranges of the pairs' hashes; `open_pair_files` opens them.

    A record with several positives becomes several consecutive rows.

    Args:
      files: the files.
      ranges: the ranges of hashes, in millionths; by default, all pairs.
    """

    def __init__(self, files: PairFiles, ranges: Ranges = _ALL) -> None:
        self.files, self.ranges = files, ranges
        self._cache = open_cache(files)
        self._rows = None if ranges == _ALL else _rows_of(self._cache, ranges)

    @property
    def fingerprint(self) -> str:
        """A hash of the files' content, the columns that are read, and the rows of the split."""
        parts: list[Any] = [self.files.fingerprint, self.ranges]
        if self.files.columns.images:
            parts.append(self._digest_of_images)
        content = json.dumps(parts)
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
        """The numbers of records and of rows that were left out."""
        return self._cache.facts

    def __len__(self) -> int:
        return self._cache.num_rows if self._rows is None else len(self._rows)

    def read(self, rows: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """Return one dict per row number, in the order given.

        A row has "query" and "key". If the files have them, it also has "group", "score",
        "negatives" (a list of texts), "teacher_scores" (the key's score, then each negative's) and
        the metadata fields.
        """
        return self._with_images(self._cached(rows, None))

    def read_fields(
        self, rows: Sequence[int] | np.ndarray, names: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Return some fields of the rows."""
        records = self._with_images(self._cached(rows, names))
        return [{name: one[name] for name in names if name in one} for one in records]

    def place(self, side: str, row: int) -> str | None:
        """The name of the file with a row's image."""
        if side not in self.files.columns.images:
            return None
        [record] = self._cached([row], (side,))
        return reference_place(record[side], self.files.paths)

    def _cached(
        self, rows: Sequence[int] | np.ndarray, names: Sequence[str] | None
    ) -> list[dict[str, Any]]:
        numbers = np.array(checked_rows(rows, num_rows=len(self)), np.int64)
        if self._rows is not None:
            numbers = self._rows[numbers].astype(np.int64)
        try:
            return self._cache.read(numbers, names)
        except DamagedArray as damage:
            self._cache = rebuild_cache(self.files, damage)
            return self._cache.read(numbers, names)

    def _with_images(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Replace references to images by the bytes of the image files."""
        columns = self.files.columns
        for side in columns.images:
            if records and side in records[0]:
                if side == "key" and columns.key == columns.query:
                    values = [record["query"] for record in records]
                else:
                    references = [record[side] for record in records]
                    values = read_references(references, self.files.paths)
                for record, value in zip(records, values, strict=True):
                    record[side] = value
        return records

    @functools.cached_property
    def _digest_of_images(self) -> str:
        """A digest of the images that the rows refer to by path.

        Images in folders and tars are already covered by the digests of the folders and tars.
        """
        names: dict[int, set[str]] = {}
        for first in range(0, len(self), _ROWS_AT_ONCE):
            rows = range(first, min(first + _ROWS_AT_ONCE, len(self)))
            for record in self._cached(rows, self.files.columns.images):
                for number, name in referenced_paths(record.values()):
                    names.setdefault(number, set()).add(name)
        paths = self.files.paths
        digests = [
            [
                number,
                digest_of_files(
                    paths[number].parent,
                    sorted(image_names),
                    directory=self.files.directory / "folders",
                ),
            ]
            for number, image_names in sorted(names.items())
            if not paths[number].is_dir()
        ]
        return json.dumps(digests)

    def split_hashes(self) -> Iterator[Integer[np.ndarray, " _"]]:
        """The hashes of the split's records, block by block."""
        hashes = self._cache.hashes()
        for first in range(0, len(hashes), _RECORDS_AT_ONCE):
            part = hashes[first : first + _RECORDS_AT_ONCE]
            yield part[_in_ranges(part, self.ranges)]

    def __getstate__(self) -> tuple[PairFiles, Ranges]:
        return self.files, self.ranges

    def __setstate__(self, state: tuple[PairFiles, Ranges]) -> None:
        self.__init__(*state)  # type: ignore[misc] # each process opens the cache


def open_pair_files(
    data_set: DataSet, role: str, *, data_dir: Path, images: tuple[str, ...] = ()
) -> FilePairs:
    """Open the rows of a split. The first call for a set of files also writes their cache.

    Args:
      data_set: the name of the data set, its splits and the names of its columns.
      role: the key of the split in `data_set.splits`, such as `"train"`.
      data_dir: the folder shared by all runs, which holds the cache.
      images: the sides that are images.

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
    where = describe_files(paths)
    files = _described(paths, data_set, directory=data_dir / "pairs", where=where, images=images)
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
    """Say that held-out queries with several keys are evaluated once with each key."""
    columns = pairs.files.columns
    if columns.split_by != columns.query:
        return
    queries = len(np.unique(np.concatenate(list(pairs.split_hashes()))))
    if queries < len(pairs):
        say(
            f"{role} has {len(pairs):,} pairs of {queries:,} different queries; each pair is "
            "evaluated by itself, and the other keys of its query are left out of the ranking"
        )


def report_shared_queries(sources: Mapping[str, Sequence[Any]]) -> None:
    """Warn about held-out queries that are also trained on, if the splits have different files.

    Args:
      sources: role -> the sources of the split's rows, one per data set.
    """
    training = [source for source in sources.get("train", ()) if isinstance(source, FilePairs)]
    for role, role_sources in sources.items():
        for held_out in role_sources if role != "train" else ():
            for train in training:
                if isinstance(held_out, FilePairs) and held_out.files != train.files:
                    _report_shared(role, held_out, train)


def _report_shared(role: str, held_out: FilePairs, train: FilePairs) -> None:
    hashes = np.unique(np.concatenate(list(held_out.split_hashes())))
    shared = np.zeros(len(hashes), bool)
    for part in train.split_hashes():
        position = np.minimum(np.searchsorted(hashes, part), len(hashes) - 1)
        shared[position[hashes[position] == part]] = True
    if shared.any() and jax.process_index() == 0:
        say(
            f"warning: {shared.sum():,} of {len(hashes):,} different values of "
            f"{held_out.files.columns.split_by!r} in {role} "
            f"({describe_files(held_out.files.paths)}) are also in train "
            f"({describe_files(train.files.paths)})"
        )


def _rest(data_set: DataSet) -> tuple[Ranges, str]:
    """The ranges of the split `"train"` that no other role takes."""
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
    paths: tuple[Path, ...],
    data_set: DataSet,
    *,
    directory: Path,
    where: str,
    images: tuple[str, ...],
) -> PairFiles:
    """The files with their digests and columns."""
    names = read_fields(paths[0], named_fields(data_set))
    if not names:
        raise ValueError(f"{paths[0]} has no rows")
    columns = find_columns(names, data_set, where=str(paths[0]), images=images)
    for path in paths[1:]:
        # JSON lines and tars may leave fields out, so their rows are checked while they are read.
        fields = columns.needed if _leaves_out(path) else read_fields(path)
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
            f"{where} has labels in {columns.label!r}, so some rows may not be positive pairs; set "
            "data.files.min_label to the smallest label of a row to train on (a value below all "
            "labels keeps every row), or data.score_field for a loss that compares scores"
        )
    if columns.label is None and options.min_label is not None:
        raise ValueError(
            f"data.files.min_label={options.min_label}, but {where} has no column that is known to "
            f"hold labels; set data.files.label_field to one of {', '.join(names)}"
        )
    digests = cached_digests(paths, directory)
    return PairFiles(paths, digests, columns, options.min_label, options.bad_rows, directory)


def _leaves_out(path: Path) -> bool:
    if path.is_dir() or path.suffix == ".arrow":
        return False
    return file_kind(path)[0] in ("jsonl", "ndjson", "json", "tar")


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
