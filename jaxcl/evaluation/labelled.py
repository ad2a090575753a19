"""Labelled values for classifiers: their parts, and the labelled rows of a data source."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxcl.data.source_fields import iterate_fields, read_fields
from jaxcl.data.sources import PairSource
from jaxcl.evaluation.known_positives import content_digest
from jaxcl.typing import Int

__all__ = ["PARTS", "LabelledParts", "RowValues", "part_of", "read_labelled_rows"]

PARTS = ("train", "validation", "test")


class LabelledParts(NamedTuple):
    """Values with a class each, in a training, a validation and a test part.

    Attributes:
      classes: the names of the classes.
      values: the part -> its values, such as the contents of image files.
      labels: the part -> the number of each value's class.
      fingerprint: a digest of the contents, labels and parts.
      left_out: the number of rows whose class has no row in the training part.
    """

    classes: tuple[str, ...]
    values: Mapping[str, Sequence[Any]]
    labels: Mapping[str, Int[np.ndarray, " n"]]
    fingerprint: str
    left_out: int = 0


class RowValues(Sequence[Any]):
    """The values of one side of some rows, read when they are used.

    Args:
      source: the rows.
      side: `"query"` or `"key"`.
      rows: numbers of the rows.
    """

    def __init__(self, source: PairSource, side: str, rows: Int[np.ndarray, " n"]) -> None:
        self._source, self._side, self._rows = source, side, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row):
        if isinstance(row, slice):
            return RowValues(self._source, self._side, self._rows[row])
        (record,) = read_fields(self._source, [int(self._rows[row])], (self._side,))
        return record[self._side]

    def __iter__(self) -> Iterator[Any]:
        """Yield all values; only a few are in memory at a time."""
        for record in iterate_fields(self._source, self._rows, (self._side,)):
            yield record[self._side]


def part_of(digest: bytes, *, test_share: float = 0.2, validation_share: float = 0.2) -> str:
    """Choose the part of a value by the digest of its content, so that equal values share a part.

    Example:
      >>> [part_of(bytes([first] * 8)) for first in (0, 100, 255)]
      ['test', 'train', 'validation']
    """
    fraction = int.from_bytes(digest[:8], "big") / 2**64
    if fraction < test_share:
        return "test"
    return "validation" if fraction >= 1 - validation_share else "train"


def read_labelled_rows(train: PairSource, test: PairSource | None, *, side: str) -> LabelledParts:
    """Label the rows of a run's data by their group.

    Rows whose class has no training row are left out.

    Args:
      train: the labelled rows. A fifth of them is the validation part.
      test: the test part; `None` uses a fifth of `train`, whose values do not occur in other parts.
      side: the side to classify.

    Raises:
      ValueError: if rows have no group, there are fewer than two classes, or a part is empty.
    """
    digests, groups = _contents(train, side)
    share = 0.0 if test is not None else 0.2
    parts = np.array([part_of(digest, test_share=share) for digest in digests])
    rows = {part: np.flatnonzero(parts == part) for part in PARTS}
    sources, labels = dict.fromkeys(PARTS, train), {part: groups[rows[part]] for part in PARTS}
    if test is not None:
        _, labels["test"] = _contents(test, side)
        sources["test"], rows["test"] = test, np.arange(len(test))
    known = np.unique(labels["train"])
    kept = {part: np.isin(of_part, known) for part, of_part in labels.items()}
    left_out = sum(int((~of_part).sum()) for of_part in kept.values())
    rows = {part: rows[part][kept[part]] for part in PARTS}
    numbers = {part: np.searchsorted(known, labels[part][kept[part]]) for part in PARTS}
    empty = [part for part in PARTS if not len(rows[part])]
    if empty or len(known) < 2:
        raise ValueError(
            f"the training rows have {len(known)} classes (groups), and the parts "
            f"{', '.join(empty) or '(none)'} have no rows of these classes; use a split with more "
            "rows of each group"
        )
    fingerprint = " ".join([side, train.fingerprint, "" if test is None else test.fingerprint])
    return LabelledParts(
        tuple(map(str, known.tolist())),
        {part: RowValues(sources[part], side, rows[part]) for part in PARTS},
        numbers,
        hashlib.sha256(fingerprint.encode()).hexdigest(),
        left_out,
    )


def _contents(source: PairSource, side: str) -> tuple[list[bytes], Int[np.ndarray, " n"]]:
    """The digest of each row's value on one side, and the group of each row."""
    digests, groups = [], np.empty(len(source), np.int64)
    for row, record in enumerate(iterate_fields(source, range(len(source)), (side, "group"))):
        if "group" not in record:
            raise ValueError("the rows have no group, which is their class; set data.group_field")
        groups[row] = record["group"]
        digests.append(content_digest(record[side], row))
    return digests, groups
