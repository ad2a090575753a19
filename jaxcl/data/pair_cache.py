"""A cache of the pairs in files: written once, then memory-mapped for random access.

The folder of a cache is named after a hash of the files' content and of all options that affect the
rows. It holds the texts of each column, one after the other, and the positions where they end.
"""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxcl.data.array_writer import ArrayWriter
from jaxcl.data.checked_array import CheckedArray, DamagedArray
from jaxcl.data.column_folder import write_columns
from jaxcl.data.pair_columns import PairColumns
from jaxcl.data.pair_records import PairRecord
from jaxcl.host.files import read_sealed_json
from jaxcl.typing import Int, Integer

__all__ = ["PairCache", "PairFiles", "write_cache"]

_FORMAT = 1
_INDEX_FILE = "pairs.json"
_BLOCK = 4096
_GATHERED_BYTES = 2**21

TEXTS = ("query", "key", "negative", "metadata")
_NUMBERS = {
    "record": np.int64,  # the record of each row
    "negative_count": np.int64,  # the number of negatives before each record
    "key_score": np.uint32,  # the bits of a float32, since a `CheckedArray` holds integers
    "negative_score": np.uint32,
    "group": np.int32,
    "score": np.uint32,
    "hash": np.uint64,
}


class PairFiles(NamedTuple):
    """The files that a cache is made from, and the options for reading them.

    Attributes:
      paths: the files, in order.
      digests: the digest of each file's content.
      columns: the columns to read.
      min_label: the smallest label of a row that is kept; `None` for files without labels.
      bad_rows: `"error"` or `"skip"`.
      directory: the folder of all caches.
    """

    paths: tuple[Path, ...]
    digests: tuple[str, ...]
    columns: PairColumns
    min_label: float | None
    bad_rows: str
    directory: Path

    @property
    def made_from(self) -> dict[str, Any]:
        """Everything that determines the rows, in JSON types."""
        columns = self.columns._replace(unused=())._asdict()
        # Caches of earlier versions stay valid.
        for added, missing in (("score", None), ("images", ())):
            if columns[added] == missing:
                del columns[added]
        suffixes = [path.suffixes[-2:] for path in self.paths]
        made_from = {"format": _FORMAT, "files": [self.digests, suffixes], "columns": columns}
        made_from |= {"min_label": self.min_label, "bad_rows": self.bad_rows}
        return json.loads(json.dumps(made_from))

    @property
    def fingerprint(self) -> str:
        """A hash of everything that determines the rows."""
        return hashlib.sha256(json.dumps(self.made_from, sort_keys=True).encode()).hexdigest()

    @property
    def path(self) -> Path:
        """The folder of the cache."""
        return self.directory / self.fingerprint[:16]


def write_cache(
    files: PairFiles,
    records: Iterator[PairRecord],
    *,
    facts: Callable[[], Mapping[str, Any]],
) -> None:
    """Write the cache of some files, replacing an older one.

    Args:
      files: the files.
      records: the records of the files; if the iterator raises an error, no cache is written.
      facts: called after the last record; returns facts to store next to the rows, in JSON types.

    Raises:
      OSError: if the cache cannot be written.
    """

    def write(folder: Path) -> dict[str, Any]:
        _write_columns(folder, records, files.columns)
        return {"facts": dict(facts())}

    write_columns(files.path, _INDEX_FILE, files.made_from, write, what="the rows to")


class PairCache:
    """The rows of a cache, by number.

    Args:
      files: the files that the cache was made from.

    Raises:
      DamagedArray: if the cache is missing, or has changed since it was written.
    """

    def __init__(self, files: PairFiles) -> None:
        try:
            index = read_sealed_json(files.path / _INDEX_FILE)
        except (OSError, ValueError) as error:
            raise DamagedArray(f"{files.path / _INDEX_FILE} cannot be read ({error})") from error
        if index["made_from"] != files.made_from:
            raise DamagedArray(f"{files.path} was made from other files than its name says")
        self.facts: Mapping[str, Any] = index["facts"]
        self._columns = files.columns
        self._arrays = {
            name: CheckedArray(files.path / f"{name}.npy", record)
            for name, record in index["columns"].items()
        }
        self.num_rows = len(self._arrays["key_ends"]) - 1
        self.num_records = len(self._arrays["query_ends"]) - 1

    def hashes(self) -> Integer[np.ndarray, " records"]:
        """The hash of each record, which determines its split, memory-mapped."""
        return self._arrays["hash"].whole()

    def record_of_row(self) -> Int[np.ndarray, " rows"] | None:
        """The record of each row; `None` if rows and records have the same numbers."""
        return self._arrays["record"].whole() if "record" in self._arrays else None

    def read(
        self, rows: Int[np.ndarray, " n"], names: Collection[str] | None = None
    ) -> list[dict[str, Any]]:
        """The fields of these rows, with images as references.

        Args:
          rows: row numbers.
          names: the fields to read; `None` reads all.

        Raises:
          DamagedArray: if the part of the cache that holds these rows has changed.
        """
        columns = self._columns

        def reads(*fields: str) -> bool:
            return names is None or not {*fields}.isdisjoint(names)

        records = self._arrays["record"][rows] if "record" in self._arrays else rows
        fields: dict[str, Sequence[Any]] = {}
        if reads("query") or (reads("key") and columns.key == columns.query):
            fields["query"] = self._side("query", records)
        if reads("key"):
            same = columns.key == columns.query
            fields["key"] = fields["query"] if same else self._side("key", rows)
        if columns.group is not None and reads("group"):
            fields["group"] = list(self._arrays["group"][records])
        if columns.negatives and reads("negatives", "teacher_scores"):
            fields |= self._negatives(rows, records)
        if columns.metadata and reads(*columns.metadata):
            metadata = map(json.loads, self._texts("metadata", records))
            for name, values in zip(columns.metadata, zip(*metadata, strict=True), strict=False):
                fields[name] = values
        if columns.score is not None and reads("score"):
            fields["score"] = self._floats("score", records)
        if not fields:
            return [{} for _ in rows]
        return [dict(zip(fields, row, strict=True)) for row in zip(*fields.values(), strict=True)]

    def _side(self, side: str, numbers: Int[np.ndarray, " _"]) -> Sequence[str | bytes]:
        if side in self._columns.images:
            return self._contents(side, numbers)
        return self._texts(side, numbers)

    def _negatives(
        self, rows: Int[np.ndarray, " n"], records: Int[np.ndarray, " n"]
    ) -> dict[str, Sequence[Any]]:
        counts = self._arrays["negative_count"]
        starts, stops = counts[records], counts[records + 1]
        edges = np.append(0, np.cumsum(stops - starts))
        numbers = np.arange(edges[-1]) + np.repeat(starts - edges[:-1], stops - starts)
        parts = list(itertools.pairwise(edges.tolist()))
        texts = self._texts("negative", numbers)
        fields: dict[str, Sequence[Any]] = {"negatives": [texts[a:b] for a, b in parts]}
        if self._columns.scores:
            key_scores = self._floats("key_score", rows)
            scores = self._floats("negative_score", numbers)
            fields["teacher_scores"] = [
                [key_score, *scores[a:b]]
                for key_score, (a, b) in zip(key_scores, parts, strict=True)
            ]
        return fields

    def _floats(self, name: str, numbers: Int[np.ndarray, " _"]) -> list[float]:
        if not len(numbers):
            return []
        return self._arrays[name][numbers].view(np.float32).tolist()

    def _texts(self, name: str, numbers: Int[np.ndarray, " _"]) -> list[str]:
        return [content.decode() for content in self._contents(name, numbers)]

    def _contents(self, name: str, numbers: Int[np.ndarray, " _"]) -> list[bytes]:
        if not len(numbers) or f"{name}_bytes" not in self._arrays:
            return []
        ends, content = self._arrays[f"{name}_ends"], self._arrays[f"{name}_bytes"]
        starts, stops = ends[numbers], ends[numbers + 1]
        lengths = stops - starts
        if (starts[1:] == stops[:-1]).all():  # such as when a whole split is read
            joined = content.between(int(starts[0]), int(stops[-1]))
        elif lengths.sum() > _GATHERED_BYTES and len(numbers) > 1:
            middle = len(numbers) // 2  # because each byte needs an 8-byte position
            halves = numbers[:middle], numbers[middle:]
            return [content for half in halves for content in self._contents(name, half)]
        else:
            shift = starts - (np.cumsum(lengths) - lengths)
            joined = content[np.arange(lengths.sum()) + np.repeat(shift, lengths)]
        joined_bytes = joined.tobytes()
        edges = itertools.pairwise([0, *np.cumsum(lengths).tolist()])
        return [joined_bytes[start:stop] for start, stop in edges]


class _Writers(NamedTuple):
    """The files of a cache that is being written.

    Attributes:
      content, ends: the files of each column in `TEXTS`.
      numbers: the file of each column in `_NUMBERS`.
    """

    content: Mapping[str, ArrayWriter]
    ends: Mapping[str, ArrayWriter]
    numbers: Mapping[str, ArrayWriter]

    def texts(self, name: str, texts: Sequence[bytes]) -> None:
        before = len(self.content[name])
        self.content[name].append_bytes(b"".join(texts))
        self.ends[name].append(before + np.cumsum([len(text) for text in texts], dtype=np.int64))


def _write_columns(folder: Path, records: Iterator[PairRecord], columns: PairColumns) -> None:
    with contextlib.ExitStack() as stack:

        def writer(name: str, dtype: Any) -> ArrayWriter:
            return stack.enter_context(ArrayWriter(folder / f"{name}.npy", dtype))

        writers = _Writers(
            {name: writer(f"{name}_bytes", np.uint8) for name in TEXTS},
            {name: writer(f"{name}_ends", np.int64) for name in TEXTS},
            {name: writer(name, dtype) for name, dtype in _NUMBERS.items()},
        )
        for ends in (*writers.ends.values(), writers.numbers["negative_count"]):
            ends.append(np.zeros(1, np.int64))
        groups: dict[str, int] = {}
        num_records = 0
        while block := list(itertools.islice(records, _BLOCK)):
            _append(writers, block, num_records, columns, groups)
            num_records += len(block)
        has_several_keys = len(writers.numbers["record"]) != num_records
    if not has_several_keys:
        (folder / "record.npy").unlink(missing_ok=True)
    if groups:
        _number_by_name(folder / "group.npy", groups)


def _append(
    writers: _Writers,
    block: Sequence[PairRecord],
    first: int,
    columns: PairColumns,
    groups: dict[str, int],
) -> None:
    negatives = [text for record in block for text in record.negatives]
    writers.texts("query", [record.query for record in block])
    writers.texts("key", [text for record in block for text in record.positives])
    if columns.negatives:
        writers.texts("negative", negatives)
    if columns.metadata:
        writers.texts("metadata", [record.metadata for record in block])
    rows = [len(record.positives) for record in block]
    digests = (hashlib.blake2b(record.split_by, digest_size=8).digest() for record in block)
    numbers = {
        "record": np.repeat(np.arange(first, first + len(block)), rows),
        "hash": np.frombuffer(b"".join(digests), "<u8"),
    }
    if columns.negatives:
        counts = np.cumsum([len(record.negatives) for record in block], dtype=np.int64)
        before = len(writers.ends["negative"]) - 1 - len(negatives)
        numbers["negative_count"] = before + counts
    if columns.scores:
        numbers["key_score"] = _bits(record.positive_scores for record in block)
        numbers["negative_score"] = _bits(record.negative_scores for record in block)
    if columns.group is not None:
        numbers["group"] = _group_numbers(block, groups, is_first=first == 0)
    if columns.score is not None:
        numbers["score"] = _bits([[record.score for record in block if record.score is not None]])
    for name, values in numbers.items():
        writers.numbers[name].append(values)


def _bits(scores: Iterable[Sequence[float]]) -> np.ndarray:
    return np.array(list(itertools.chain.from_iterable(scores)), np.float32).view(np.uint32)


def _group_numbers(
    block: Sequence[PairRecord], groups: dict[str, int], *, is_first: bool
) -> np.ndarray:
    """Return integer groups unchanged, and number text groups in the order in which they appear."""
    are_texts = {isinstance(record.group, str) for record in block}
    if len(are_texts) > 1 or not (is_first or are_texts == {bool(groups)}):
        raise ValueError("groups are both integers and texts; make all of them one or the other")
    if are_texts == {True}:
        return np.array([groups.setdefault(str(record.group), len(groups)) for record in block])
    return np.array([record.group for record in block])


def _number_by_name(path: Path, groups: Mapping[str, int]) -> None:
    """Renumber text groups in alphabetical order, as in prepared data sets."""
    rank = np.empty(len(groups), np.int32)
    rank[[groups[name] for name in sorted(groups)]] = np.arange(len(groups))
    np.save(path, rank[np.load(path)])
