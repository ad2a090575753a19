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
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxcl.data.digests import file_digests
from jaxcl.data.row_ranges import RowRange
from jaxcl.data.tfds_columns import (
    check_image,
    check_text,
    field_decoder,
    field_value,
    image_fields,
    selected_features,
    text_groups,
)
from jaxcl.data.tfds_directory import find_directory, full_name, open_builder, open_records
from jaxcl.host.files import read_json_object
from jaxcl.ops.arguments import as_integers

__all__ = ["InMemoryPairs", "PairSource", "TfdsPairs", "checked_rows", "open_pairs"]

DESCRIPTION_FILE = "jaxcl.json"
"""The file next to records that jaxcl prepares; its "fingerprint" identifies the records."""

_Rows = Sequence[int] | np.ndarray
_READ_AT_ONCE = 8192


@runtime_checkable
class PairSource(Protocol):
    """Rows that can be read in any order: dicts with "query", "key" and the requested fields.

    A source can be pickled, so that each worker process can have a copy.
    """

    @property
    def fingerprint(self) -> str:
        """A string that identifies the rows: equal strings mean equal rows in equal order."""

    @property
    def row_ranges(self) -> tuple[RowRange, ...]:
        """The rows as ranges of files; empty for rows that do not come from files."""

    def __len__(self) -> int: ...

    def read(self, rows: _Rows) -> list[dict[str, Any]]:
        """Return one dict per row number, in the order given."""


class InMemoryPairs:
    """Pairs held in memory, for tests, notebooks, and platforms without an array_record wheel.

    Args:
      queries, keys: the values of the two sides, such as texts.
      groups: one integer per row, stored as int32; None leaves "group" out.
      metadata: further columns, by name.

    Raises:
      ValueError: if there are no rows, columns differ in length, a metadata name is taken, or a
        group is not an integer or does not fit into int32.

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
    """Identify a value; `str` of a large array would leave most values out."""
    if isinstance(value, np.ndarray):
        content = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return f"{value.dtype}{value.shape}{content}"
    return str(value)


class TfdsPairs:
    """Pairs of a prepared TFDS data set; `open_pairs` opens them."""

    def __init__(
        self,
        records: Any,
        features: Any,
        *,
        fields: Mapping[str, str],
        images: Collection[str] = (),
        groups: Sequence[str] | None,
        fingerprint: str,
        row_ranges: Sequence[RowRange],
    ) -> None:
        self._records = records
        self._features = features
        self._fields = dict(fields)
        self._images = frozenset(images)
        self._decoders: dict[tuple[str, ...], Callable[[Any], Any]] = {}
        self._group_index = None if groups is None else {name: i for i, name in enumerate(groups)}
        self._fingerprint = fingerprint
        self._row_ranges = tuple(row_ranges)

    @property
    def fingerprint(self) -> str:
        """A string that identifies the data set, the rows of the split, and the fields to read."""
        return self._fingerprint

    @property
    def row_ranges(self) -> tuple[RowRange, ...]:
        """The rows as ranges of files."""
        return self._row_ranges

    def __len__(self) -> int:
        return len(self._records)

    def read(self, rows: _Rows) -> list[dict[str, Any]]:
        """Return one dict per row number, in the order given.

        Texts are str. Images are the bytes of their files, or uint8 arrays.
        """
        return self.read_fields(rows, tuple(self._fields))

    def read_fields(self, rows: _Rows, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return some fields of the rows."""
        fields = {name: self._fields[name] for name in names if name in self._fields}
        numbers = checked_rows(rows, num_rows=len(self))
        if not fields:
            return [{} for _ in numbers]
        records = self._records.read(numbers)
        wanted = tuple(fields.values())
        decode = self._decoders.get(wanted) or field_decoder(self._features, wanted)
        self._decoders[wanted] = decode
        return [
            self._as_row(decode(record), fields, row)
            for row, record in zip(numbers, records, strict=True)
        ]

    def _as_row(self, example: Any, fields: Mapping[str, str], row: int) -> dict[str, Any]:
        values = {
            name: field_value(example, field, row, is_image=field in self._images)
            for name, field in fields.items()
        }
        if "group" in fields:
            group = values["group"]
            index = group if self._group_index is None else self._group_index[group]
            values["group"] = _as_int32(index, field=fields["group"], row=row)
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
    image_sides: Sequence[str] = (),
) -> TfdsPairs:
    """Open the pairs of a prepared TFDS data set, without downloading or importing anything.

    Rows are in the order in which TFDS stored them, which is usually shuffled.

    Args:
      name: a TFDS name such as `"snli:1.1.0"`, or the directory of a prepared data set.
      split: `"train"`, or a part of it such as `"train[:10%]"`. Parquet allows only whole splits.
      data_dir: the folder where TFDS names are looked up; None means TFDS's own directories.
      query_field, key_field: the features that hold the two sides; `"a/b"` names feature b in a.
      group_field: the feature that becomes each row's int32 "group". Integers, labels and booleans
        are used as they are. A text becomes its index among the split's sorted distinct texts, for
        which the column is read once; `"train"` and `"train[:10%]"` may number texts differently.
      score_field: the feature that becomes each row's "score".
      metadata_fields: further features, which keep their names in the rows.
      text_sides: the sides that must be texts, such as `("query", "key")`.
      image_sides: the sides that must be images: an `Image` feature, whose files are not decoded, a
        uint8 `Tensor`, or a `Text` that holds the bytes of image files.

    Raises:
      ValueError: if the data set is missing or not readable, has a feature of a class other than
        TFDS's own, or has a different number of rows than it states; if a split or field is
        unknown, the split is empty, a side in `text_sides` has no texts, a side in `image_sides`
        has no images, or the group is neither an integer nor a text.
    """
    from etils import epath

    named = {"query": query_field, "key": key_field, "group": group_field, "score": score_field}
    fields = {name: field for name, field in named.items() if field is not None}
    _check_metadata_names(metadata_fields, fields)
    sides = dict(fields)
    fields |= {field: field for field in metadata_fields}
    builder = open_builder(find_directory(name, data_dir))
    features = selected_features(builder, list(fields.values()))
    instructions = _file_instructions(builder, split, name)
    paths = [epath.Path(part.filename) for part in instructions]
    content, names = _contents(builder, paths)
    rows = [
        (path.name, part.skip, part.take) for path, part in zip(paths, instructions, strict=True)
    ]
    digest = _sha256([content, rows, sorted(sides.items())])
    records = open_records(builder, split, instructions)
    for side in text_sides:
        check_text(builder, records, fields[side], side=side)
    for side in image_sides:
        check_image(builder, records, fields[side], side=side)
    return TfdsPairs(
        records,
        features,
        fields=fields,
        images={*image_fields(features), *(fields[side] for side in image_sides)},
        groups=None if group_field is None else text_groups(builder, records, group_field),
        fingerprint=f"{full_name(builder)}:{digest}",
        row_ranges=_row_ranges(paths, names, instructions),
    )


def _check_metadata_names(names: Iterable[str], fields: Iterable[str]) -> None:
    if clashes := set(fields) & set(names):
        raise ValueError(f"metadata cannot be named {sorted(clashes)}; rows already have these")


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
    """Convert row numbers to a list; raise an `IndexError` if a row does not exist."""
    numbers = as_integers("rows", rows).astype(np.int64)
    if numbers.size and (numbers.min() < 0 or numbers.max() >= num_rows):
        span = f"{numbers.min()} to {numbers.max()}"
        raise IndexError(f"rows {span} were requested; there are {num_rows}, numbered from 0")
    return numbers.tolist()
