"""Explicit negatives of the training rows, given as texts in each row.

A training record `{"query": …, "key": …, "negatives": [text, …]}` lists any number of negatives.
They are tokenized as keys, once per distinct text, and a batch holds the negatives of its rows.
`"teacher_scores"` in a record are the scores of its key and of its negatives, for the loss
`"distillation"`.

A negative that equals the key or the query of some row has that row's label `"text"`. With
`loss.masks=("row", "text")`, it is therefore not a negative of that row, nor of any row with an
equal query or key. It also has that row's `"group"`. All other negatives have a group that no row
has.

A record with several positives becomes several rows with equal queries. They share the label
`"text"`, so with these masks no positive of a query is one of its negatives. To train on all of
them at once, give each query its own group, name the field in `data.group_field`, and set
`loss.name="supervised"`: all rows of a group in a batch are then positives of each other.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxcl.data.column_folder import cached_columns
from jaxcl.data.modalities import modality_of
from jaxcl.data.modality import Split
from jaxcl.data.negative_lists import (
    NegativeLists,
    NegativeTexts,
    have_negatives,
    read_negative_lists,
)
from jaxcl.data.row_checks import checked_int32
from jaxcl.data.row_digests import input_digests, number_digests
from jaxcl.data.row_negatives import explicit_columns
from jaxcl.data.sources import PairSource
from jaxcl.data.table import Table, label_column
from jaxcl.host.files import digest_of
from jaxcl.host.paths import AnyPath
from jaxcl.host.progress import progress_bar
from jaxcl.settings.data_sections import DataSettings
from jaxcl.typing import Float, Int, PyTree

__all__ = ["TextNegatives", "open_text_negatives"]

_FORMAT = 2
_ROLE = "negatives"
_LABELS = ("text", "group")
_NOT_READ = (
    *("name", "splits", "score_field", "negatives", "negatives_per_row", "guides", "topics"),
)
"""Settings that affect neither texts nor tokens, or that the rows' fingerprint covers."""


class TextNegatives(NamedTuple):
    """The negatives of the training rows, as texts.

    Attributes:
      texts: a table of the distinct texts; only its keys are read.
      offsets: where each row's list begins in `numbers`, followed by the end of the last list.
      numbers: all lists, concatenated, as rows of `texts`.
      labels: the labels `"text"` and `"group"` of each distinct text.
      per_row: the number of negatives that a batch takes from the beginning of each row's list.
      scores: the teacher's scores of each row's key and then of its negatives, concatenated;
        `None` if they are not needed.
      num_own: the number of negatives that equal a positive or the query of the same row.
    """

    texts: Table
    offsets: Int[np.ndarray, " _"]
    numbers: Int[np.ndarray, " s"]
    labels: Mapping[str, Int[np.ndarray, " _"]]
    per_row: int
    scores: Float[np.ndarray, " _"] | None = None
    num_own: int = 0

    @property
    def counts(self) -> Int[np.ndarray, " n"]:
        """The length of each row's list."""
        return np.diff(self.offsets)

    def columns(self, table: Table, rows: Int[np.ndarray, " b"]) -> dict[str, PyTree]:
        """The columns that `jaxcl.step.batch_loss.make_loss` reads for a batch of these rows."""
        begin, count = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        position = np.arange(self.per_row)
        valid = position < count[:, None]
        numbers = self.numbers[np.where(valid, begin[:, None] + position, 0)]
        labels = {name: column[numbers] for name, column in self.labels.items()}
        labels["row"] = (table.num_rows + numbers).astype(np.int32)  # numbers that no row has
        columns: dict[str, PyTree] = {
            "negatives": explicit_columns(self.texts, numbers, valid, labels)
        }
        if self.scores is not None:
            position = np.arange(1 + self.per_row)
            scored = position <= count[:, None]
            # Each row also has a score for its key, so the scores of row i begin i places later.
            position = (begin + rows)[:, None] + position
            columns["teacher_scores"] = np.where(
                scored, self.scores[np.where(scored, position, 0)], np.float32(0)
            )
        return columns


def open_text_negatives(
    data: DataSettings,
    source: PairSource,
    table: Table,
    *,
    data_dir: Path,
    workdir: AnyPath,
    scored: bool = False,
) -> TextNegatives | None:
    """Open the negatives in the training rows, prepared once and cached in the shared folder.

    Args:
      data: the run's settings.
      source: the training rows.
      table: the inputs of the same rows.
      data_dir: the folder shared by all runs.
      workdir: the run's own folder.
      scored: whether the loss needs a teacher's scores; otherwise none are returned.

    Returns:
      The negatives; `None` if no row has negatives, or `data.negatives_per_row` is 0.

    Raises:
      ValueError: if negatives or scores are invalid or missing, or settings contradict them.
    """
    per_row = data.negatives_per_row
    if per_row == 0:
        return None
    columns: Mapping[str, np.ndarray] = {}
    if have_negatives(source):
        _check(data)
        columns = _columns(data, source, table, data_dir=data_dir, workdir=workdir)
    if "numbers" not in columns:
        if per_row is not None:
            raise ValueError(
                f"data.negatives_per_row={per_row}, but the training rows have no negatives; set "
                "it to None"
            )
        return None
    lists = _lists_of(columns)
    if scored:
        _check_scored(lists)
    longest = int(np.diff(lists.offsets).max())
    return TextNegatives(
        texts=_open_texts(data, source, lists, data_dir=data_dir, workdir=workdir),
        offsets=lists.offsets,
        numbers=lists.numbers,
        labels={name: columns[name] for name in _LABELS},
        per_row=longest if per_row is None else min(per_row, longest),
        scores=lists.scores if scored else None,
        num_own=int(columns["num_own"][0]),
    )


def _check(data: DataSettings) -> None:
    """Raise a `ValueError` for settings that contradict negatives in the rows."""
    if data.negatives is not None:
        raise ValueError(
            f"data.negatives={data.negatives} and the training rows both give each row its "
            "negatives; set data.negatives to None, or data.negatives_per_row=0 to ignore the "
            "negatives in the rows"
        )
    if data.modality.key != "text":
        raise ValueError(
            f"the training rows have negatives, which are texts, but data.modality.key="
            f"{data.modality.key!r}; set data.negatives_per_row=0 to ignore them"
        )


def _check_scored(lists: NegativeLists) -> None:
    missing = lists.scores is None
    row = 0
    if lists.scores is not None:
        key_scores = lists.scores[lists.offsets[:-1] + np.arange(len(lists.offsets) - 1)]
        missing, row = bool(np.isnan(key_scores).any()), int(np.argmax(np.isnan(key_scores)))
    if missing:
        raise ValueError(
            f"the loss needs a teacher's scores, but row {row} of the training rows has no "
            "teacher_scores; give each row the scores of its key and of its negatives"
        )


def _columns(
    data: DataSettings, source: PairSource, table: Table, *, data_dir: Path, workdir: AnyPath
) -> dict[str, np.ndarray]:
    """The lists of all rows and the labels of the distinct texts, as columns of a cached folder."""
    settings = {name: value for name, value in data._asdict().items() if name not in _NOT_READ}
    made_from = {
        "format": _FORMAT,
        "source": source.fingerprint,
        "inputs": modality_of(data, "key").fingerprint(workdir),
        "data": json.dumps(settings, default=str),
        # The negatives' labels continue the rows' labels, which a later version may number
        # differently.
        "labels": [digest_of(label_column(table, name).tobytes()) for name in _LABELS],
    }

    def compute() -> dict[str, np.ndarray]:
        with progress_bar("reading negatives", len(source)) as advance:
            lists = read_negative_lists(source, advance=advance)
        columns = {name: column for name, column in lists._asdict().items() if column is not None}
        if not len(lists.numbers):
            return {"offsets": lists.offsets}
        texts = _open_texts(data, source, lists, data_dir=data_dir, workdir=workdir)
        labels = _labels(lists, texts, table)
        row_labels = np.repeat(label_column(table, "text"), np.diff(lists.offsets))
        num_own = (labels["text"][lists.numbers] == row_labels).sum()
        return columns | labels | {"num_own": np.array([num_own])}

    name = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]
    return cached_columns(data_dir / _ROLE / name, made_from, compute, what="the rows' negatives")


def _lists_of(columns: Mapping[str, np.ndarray]) -> NegativeLists:
    fields: dict[str, Any] = {name: columns.get(name) for name in NegativeLists._fields}
    return NegativeLists(**fields)


def _open_texts(
    data: DataSettings,
    source: PairSource,
    lists: NegativeLists,
    *,
    data_dir: Path,
    workdir: AnyPath,
) -> Table:
    """The distinct negatives as inputs."""
    split = Split(_ROLE, ("key",), data_dir)
    return modality_of(data, "key").open_table(data, NegativeTexts(source, lists), split, workdir)


def _labels(lists: NegativeLists, texts: Table, table: Table) -> dict[str, Int[np.ndarray, " _"]]:
    """The labels of the distinct negatives, numbered together with the training rows' labels.

    Keys are compared as inputs of the encoder, as `Table.labels` compares the rows. Queries, and
    keys of other data sets, may have another prompt or length, so they are compared as texts.
    """
    with progress_bar("comparing negatives with keys", table.num_rows + texts.num_rows) as advance:
        digests = [input_digests(rows, "key", advance=advance) for rows in (table, texts)]
    numbers, firsts = number_digests(np.concatenate(digests))
    first = firsts[numbers[table.num_rows :]]
    row_labels = {name: label_column(table, name) for name in _LABELS}
    row = np.where(first < table.num_rows, first, lists.same_row)
    new_text = int(row_labels["text"].max()) + 1 + first - table.num_rows
    groups = np.unique(row_labels["group"])
    [unused_group, *_] = np.setdiff1d(np.arange(len(groups) + 1), groups)
    labels = {
        "text": np.where(row >= 0, row_labels["text"][row], new_text),
        "group": np.where(row >= 0, row_labels["group"][row], unused_group),
    }
    return {name: checked_int32(column, what=name) for name, column in labels.items()}
