"""Pairs to train on, from any TFDS data set (without TensorFlow) or from memory.

`open_pairs("snli:1.1.0", "train", query_field="premise", key_field="hypothesis")` opens a
prepared data set; `.read([3, 1, 4])` returns these rows as `[{"query": ..., "key": ...}, ...]`.
"""

import contextlib
import functools
import hashlib
import json
import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxcl.data.digests import file_digests
from jaxcl.data.row_ranges import RowRange
from jaxcl.data.tfds_directory import find_directory, full_name, open_builder, open_records
from jaxcl.host.files import read_json_object
from jaxcl.ops.arguments import as_integers

__all__ = ["InMemoryPairs", "PairSource", "TfdsPairs", "checked_rows", "open_pairs"]

DESCRIPTION_FILE = "jaxcl.json"
"""The file next to records that jaxcl prepares; its "fingerprint" identifies their content."""

_Rows = Sequence[int] | np.ndarray
_READ_AT_ONCE = 8192


@runtime_checkable
class PairSource(Protocol):
    """Rows that can be read in any order: dicts with "query", "key" and the requested fields.

    A source can be pickled, so that each worker process can have a copy.
    """

    @property
    def fingerprint(self) -> str:
        """Identifies the rows: equal fingerprints mean equal rows in equal order."""

    @property
    def row_ranges(self) -> tuple[RowRange, ...]:
        """The rows as ranges of files; empty for rows that do not come from files."""

    def __len__(self) -> int: ...

    def read(self, rows: _Rows) -> list[dict[str, Any]]:
        """Return one dict per row number, in the order given."""


class InMemoryPairs:
    """Pairs held in memory, for tests, notebooks, and platforms without a wheel of array_record.

    Args:
      queries, keys: the values of the two sides, such as texts.
      groups: one integer per row, stored as int32; None leaves "group" out.
      metadata: further columns, by name.

    Raises:
      ValueError: if there are no rows, columns differ in length, a metadata name is taken, or a
        group does not fit into int32.
      TypeError: if a group is not an integer.

    Example:
      >>> pairs = InMemoryPairs(["add", "sub"], ["a + b", "a - b"], groups=[0, 1])
      >>> pairs.read([1])
      [{'query': 'sub', 'key': 'a - b', 'group': np.int32(1)}]
    """

    def __init__(
        self,
        queries: Sequence[Any],
        keys: Sequence[Any],
        *,
        groups: Sequence[int] | np.ndarray | None = None,
        metadata: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        self._columns: dict[str, Sequence[Any]] = {"query": list(queries), "key": list(keys)}
        if groups is not None:
            self._columns["group"] = [
                _as_int32(group, field="groups", row=row) for row, group in enumerate(groups)
            ]
        _check_metadata_names(metadata or (), self._columns)
        self._columns |= {name: list(column) for name, column in (metadata or {}).items()}
        lengths = {name: len(column) for name, column in self._columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the columns differ in length: {lengths}; give one value per row")
        if not lengths["query"]:
            raise ValueError("there are no pairs; give at least one query and its key")

    def __len__(self) -> int:
        return len(self._columns["query"])

    def read(self, rows: _Rows) -> list[dict[str, Any]]:
        """Return one dict per row number, in the order given."""
        return [
            {name: column[row] for name, column in self._columns.items()}
            for row in checked_rows(rows, num_rows=len(self))
        ]

    @property
    def row_ranges(self) -> tuple[RowRange, ...]:
        """Empty, because these rows do not come from files."""
        return ()

    @functools.cached_property
    def fingerprint(self) -> str:
        """A sha256 of the rows."""
        rows = ([name, [_identity(value) for value in c]] for name, c in self._columns.items())
        return f"memory:{_sha256(rows)}"


def _identity(value: Any) -> str:
    """Identify a value; `str` of a large array would leave most of it out."""
    if isinstance(value, np.ndarray):
        content = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return f"{value.dtype}{value.shape}{content}"
    return str(value)


class TfdsPairs:
    """Pairs of a prepared TFDS data set; `open_pairs` opens them."""

    def __init__(
        self,
        records: Any,
        decoder: Any,
        *,
        fields: Mapping[str, str],
        groups: Sequence[str] | None,
        fingerprint: str,
        row_ranges: Sequence[RowRange],
    ) -> None:
        self._records = records
        self._decoder = decoder
        self._fields = dict(fields)
        self._group_index = None if groups is None else {name: i for i, name in enumerate(groups)}
        self._fingerprint = fingerprint
        self._row_ranges = tuple(row_ranges)

    @property
    def fingerprint(self) -> str:
        """Identifies the data set, the rows of the split, and the fields that are read."""
        return self._fingerprint

    @property
    def row_ranges(self) -> tuple[RowRange, ...]:
        """The rows as ranges of files."""
        return self._row_ranges

    def __len__(self) -> int:
        return len(self._records)

    def read(self, rows: _Rows) -> list[dict[str, Any]]:
        """Return one dict per row number, in the order given; texts are str."""
        numbers = checked_rows(rows, num_rows=len(self))
        records = self._records.read(numbers)
        decode = self._decoder.deserialize_example_np
        return [self._as_row(decode(r), row) for row, r in zip(numbers, records, strict=True)]

    def _as_row(self, example: Any, row: int) -> dict[str, Any]:
        values = {name: _value(example, field, row) for name, field in self._fields.items()}
        if "group" in self._fields:
            group = values["group"]
            index = group if self._group_index is None else self._group_index[group]
            values["group"] = _as_int32(index, field=self._fields["group"], row=row)
        return values


def open_pairs(
    name: str | Path,
    split: str,
    *,
    data_dir: str | Path | None = None,
    query_field: str = "query",
    key_field: str = "key",
    group_field: str | None = None,
    score_field: str | None = None,
    metadata_fields: Sequence[str] = (),
    text_sides: Sequence[str] = (),
) -> TfdsPairs:
    """Open the pairs of a prepared TFDS data set, without downloading or importing anything for it.

    Rows are in the order in which TFDS stored them, which is usually shuffled.

    Args:
      name: a TFDS name such as `"snli:1.1.0"`, or the directory of a prepared data set.
      split: `"train"`, or a part of it such as `"train[:10%]"`. Parquet has only whole splits.
      data_dir: the folder where TFDS names are looked up; None means TFDS's own directories.
      query_field, key_field: the features that hold the two sides; `"a/b"` is b inside a.
      group_field: the feature that becomes each row's int32 "group". Integers, labels and booleans
        are used as they are. A text becomes its index among the split's sorted distinct texts, for
        which the column is read once; `"train"` and `"train[:10%]"` may number texts differently.
      score_field: the feature that becomes each row's "score".
      metadata_fields: further features, each under its own name.
      text_sides: the sides that must be texts, such as `("query", "key")`.

    Raises:
      ValueError: if the data set is missing or not readable, has a feature of a class other than
        TFDS's own, or has a different number of rows than it states; if a split or field is
        unknown, the split is empty, a side in `text_sides` is not a text, or the group is neither
        an integer nor a text.
    """
    from etils import epath

    named = {"query": query_field, "key": key_field, "group": group_field, "score": score_field}
    fields = {name: field for name, field in named.items() if field is not None}
    _check_metadata_names(metadata_fields, fields)
    sides = dict(fields)
    fields |= {field: field for field in metadata_fields}
    builder = open_builder(find_directory(name, data_dir))
    decoder = _decoder(builder, list(fields.values()))
    instructions = _file_instructions(builder, split, name)
    paths = [epath.Path(part.filename) for part in instructions]
    content, names = _contents(builder, paths)
    rows = [
        (path.name, part.skip, part.take) for path, part in zip(paths, instructions, strict=True)
    ]
    digest = _sha256([content, rows, sorted(sides.items())])
    records = open_records(builder, split, instructions)
    for side in text_sides:
        _check_text(builder, records, fields[side], side=side)
    return TfdsPairs(
        records,
        decoder,
        fields=fields,
        groups=None if group_field is None else _text_groups(builder, records, group_field),
        fingerprint=f"{full_name(builder)}:{digest}",
        row_ranges=_row_ranges(paths, names, instructions),
    )


def _check_metadata_names(names: Iterable[str], fields: Iterable[str]) -> None:
    if taken := set(fields) & set(names):
        raise ValueError(f"metadata cannot be named {sorted(taken)}; rows already have these")


def _leaves(features: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    import tensorflow_datasets as tfds

    for name, feature in features.items():
        if isinstance(feature, tfds.features.FeaturesDict):
            yield from _leaves(feature, f"{prefix}{name}/")
        else:
            yield prefix + name, feature


def _file_instructions(builder: Any, split: str, name: str | Path) -> list[Any]:
    splits = builder.info.splits
    try:
        instructions = splits[split].file_instructions
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{name} has no split {split!r}; it has {sorted(splits)}, and parts of them such as "
            "'train[:10%]'"
        ) from error
    if not sum(instruction.take for instruction in instructions):
        sizes = {known: info.num_examples for known, info in splits.items()}
        raise ValueError(f"the split {split!r} of {name} has no rows; the splits have {sizes}")
    return instructions


def _decoder(builder: Any, fields: Iterable[str]) -> Any:
    """Features with only `fields`, because decoding the others would take as long again.

    TFDS's PartialDecoding does not work without TensorFlow.
    """
    import tensorflow_datasets as tfds

    known = dict(_leaves(builder.info.features))
    for field in fields:
        if field not in known:
            raise ValueError(f"{builder.name} has no field {field!r}; it has {sorted(known)}")
    wanted: dict[str, Any] = {}
    for field in fields:
        *parents, leaf = field.split("/")
        inner = functools.reduce(lambda node, parent: node.setdefault(parent, {}), parents, wanted)
        inner[leaf] = known[field]
    return tfds.features.FeaturesDict(wanted)


def _check_text(builder: Any, records: Any, field: str, *, side: str) -> None:
    first = _first_value(builder, records, field)
    if not isinstance(first, str):
        raise ValueError(
            f"the field {field!r} of {builder.name} holds {type(first).__name__}; give a field of "
            f"texts as {side}_field: it has {sorted(dict(_leaves(builder.info.features)))}"
        )


def _text_groups(builder: Any, records: Any, field: str) -> list[str] | None:
    """The distinct texts of `field`, sorted, or None if it holds integers."""
    first = _first_value(builder, records, field)
    if isinstance(first, int):  # or a bool
        return None
    if not isinstance(first, str):
        raise ValueError(
            f"the group field {field!r} holds {type(first).__name__}; give one that holds an "
            "integer, a label, a boolean or a text in each row"
        )
    distinct: set[str] = set()
    for start in range(0, len(records), _READ_AT_ONCE):
        rows = list(range(start, min(start + _READ_AT_ONCE, len(records))))
        distinct.update(_read_column(builder, records, field, rows))
    return sorted(distinct)


def _first_value(builder: Any, records: Any, field: str) -> Any:
    """A field's value in the first row; for an array, such as an image, the feature instead."""
    feature = dict(_leaves(builder.info.features))[field]
    if feature.shape != ():
        return feature
    return _read_column(builder, records, field, [0])[0]


def _read_column(builder: Any, records: Any, field: str, rows: list[int]) -> list[Any]:
    decode = _decoder(builder, [field]).deserialize_example_np
    pairs = zip(rows, records.read(rows), strict=True)
    return [_value(decode(record), field, row) for row, record in pairs]


def _contents(builder: Any, paths: Sequence[Any]) -> tuple[Any, list[str]]:
    """Identify the content of a split's files.

    Returns:
      The content for the fingerprint, and a name for each file's content. Both come from the
      fingerprint that jaxcl writes next to files that it prepares, or else from the files' digests.
    """
    directory = builder.data_path
    if missing := [str(path) for path in paths if not path.exists()]:
        raise ValueError(f"the data set lacks {missing}; delete {directory} and prepare it again")
    description = directory / DESCRIPTION_FILE
    if description.exists():
        content = read_json_object(description).get("fingerprint")
        if not isinstance(content, str):
            raise ValueError(
                f"{description} is damaged (it lacks the fingerprint); prepare it again"
            )
        return content, [f"{content}/{path.name}" for path in paths]
    digests = file_digests(directory, paths)
    return [(directory / "features.json").read_text(), digests], digests


def _row_ranges(paths: Sequence[Any], names: Sequence[str], parts: Sequence[Any]) -> list[RowRange]:
    """The ranges of files that a split reads."""
    ranges = []
    for path, name, part in zip(paths, names, parts, strict=True):
        identities = {f"content {name}", f"path {path.resolve()}"}
        with contextlib.suppress(OSError):  # in a bucket
            local = os.stat(path)
            identities.add(f"inode {local.st_dev}/{local.st_ino}")
        stop = part.skip + part.take
        ranges.append(RowRange(path.name, frozenset(identities), part.skip, stop))
    return ranges


def _sha256(values: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value).encode() + b"\n")
    return digest.hexdigest()


def _value(example: Any, field: str, row: int) -> Any:
    value = functools.reduce(lambda node, part: node[part], field.split("/"), example)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"row {row} of the field {field!r} is not UTF-8 ({error}); prepare the data set "
                "with texts in that encoding"
            ) from error
    return value.item() if isinstance(value, np.generic) else value


def _as_int32(value: Any, *, field: str, row: int) -> np.int32:
    value = value.item() if isinstance(value, np.generic) else value
    try:
        number = operator.index(value)
    except TypeError as error:
        raise ValueError(
            f"the group of row {row} in {field!r} is {value!r}; use integers or labels"
        ) from error
    if not -(2**31) <= number < 2**31:
        raise ValueError(f"the group {number} of row {row} in {field!r} does not fit into int32")
    return np.int32(number)


def checked_rows(rows: _Rows, *, num_rows: int) -> list[int]:
    """Convert row numbers to a list; an `IndexError` if one of them does not exist."""
    numbers = as_integers("rows", rows).astype(np.int64)
    if numbers.size and (numbers.min() < 0 or numbers.max() >= num_rows):
        span = f"{numbers.min()} to {numbers.max()}"
        raise IndexError(f"rows {span} were requested; there are {num_rows}, numbered from 0")
    return numbers.tolist()
