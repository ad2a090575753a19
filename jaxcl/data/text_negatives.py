"""Each training row's explicit negatives, as texts that the row brings.

A record `{"query": …, "key": …, "negatives": [text, …]}` of the training split has its own
negatives, any number of them. They are tokenised as keys, once for each distinct text, and a batch
holds those of its rows. `"teacher_scores"` in a record are those of its key and of its negatives,
for the loss `"distillation"`.

A negative that is the same text as some row's key, or query, has that row's label `"text"`. With
`loss.masks=("row", "text")` it is therefore no negative of that row, nor of any row with an equal
query or an equal key. In the same way it has that row's `"group"`; any other negative has a group
that no row has.

A record with several positives is several rows with equal queries. These share the label `"text"`
as well, so that with those masks no positive of a query is its negative. To train on all of them at
once, give each query its own group, name its field in `data.group_field`, and set
`loss.name="supervised"`: all rows of a group that share a batch are then positives of each other.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxcl.data.column_folder import cached_columns
from jaxcl.data.modalities import modality_of
from jaxcl.data.modality import SplitFiles
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
from jaxcl.settings.sections import DataSettings
from jaxcl.typing import Float, Int, PyTree

__all__ = ["TextNegatives", "open_text_negatives"]

_FORMAT = 2
_ROLE = "negatives"
_LABELS = ("text", "group")
_NOT_READ = ("name", "splits", "negatives", "negatives_per_row", "guides", "topics")
"""Settings that change neither texts nor tokens, or whose change the rows' fingerprint shows."""


class TextNegatives(NamedTuple):
    """The texts that stand against each row's query.

    Attributes:
      texts: the distinct texts as a table, of which only the keys are read.
      offsets: where each row's list begins, and one end more than there are rows.
      numbers: all lists end to end, by number of the text.
      labels: `"text"` and `"group"` of each distinct text.
      per_row: how many of a row's list a batch holds, from its beginning.
      scores: the teacher's scores end to end, for each row its key's and then its negatives';
        `None` if they are not wanted.
      num_own: how many are the same text as a positive or the query of their own row.
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
        places = np.arange(self.per_row)
        valid = places < count[:, None]
        numbers = self.numbers[np.where(valid, begin[:, None] + places, 0)]
        labels = {name: column[numbers] for name, column in self.labels.items()}
        labels["row"] = (table.num_rows + numbers).astype(np.int32)  # which no row has
        columns: dict[str, PyTree] = {
            "negatives": explicit_columns(self.texts, numbers, valid, labels)
        }
        if self.scores is not None:
            places = np.arange(1 + self.per_row)
            scored = places <= count[:, None]
            places = (begin + rows)[:, None] + places  # a row's key has a score as well
            columns["teacher_scores"] = np.where(
                scored, self.scores[np.where(scored, places, 0)], np.float32(0)
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
    """The negatives that the training rows bring, prepared once and kept in the shared folder.

    Args:
      data: the run's settings.
      source: the training rows.
      table: the same rows as inputs.
      data_dir: the folder that runs share.
      workdir: the run's own folder.
      scored: whether the loss needs a teacher's scores; without it none are returned.

    Returns:
      The negatives; `None` if no row has one, or `data.negatives_per_row` is 0.

    Raises:
      ValueError: for negatives or scores that are wrong or missing, or settings that contradict
        them.
    """
    wanted = data.negatives_per_row
    if wanted == 0:
        return None
    columns: Mapping[str, np.ndarray] = {}
    if have_negatives(source):
        _check(data)
        columns = _columns(data, source, table, data_dir=data_dir, workdir=workdir)
    if "numbers" not in columns:
        if wanted is not None:
            raise ValueError(
                f"data.negatives_per_row={wanted}, but the training rows bring no negatives; leave "
                "it None"
            )
        return None
    lists = _lists_of(columns)
    if scored:
        _check_scored(lists)
    most = int(np.diff(lists.offsets).max())
    return TextNegatives(
        texts=_open_texts(data, source, lists, data_dir=data_dir, workdir=workdir),
        offsets=lists.offsets,
        numbers=lists.numbers,
        labels={name: columns[name] for name in _LABELS},
        per_row=most if wanted is None else min(wanted, most),
        scores=lists.scores if scored else None,
        num_own=int(columns["num_own"][0]),
    )


def _check(data: DataSettings) -> None:
    """Raise a `ValueError` for settings that do not go with negatives in the rows."""
    if data.negatives is not None:
        raise ValueError(
            f"data.negatives={data.negatives} and the training rows both give each row its "
            "negatives; set data.negatives to None, or data.negatives_per_row=0 to leave out those "
            "of the rows"
        )
    if data.modality.key != "text":
        raise ValueError(
            f"the training rows bring negatives, which are texts, but data.modality.key="
            f"{data.modality.key!r}; set data.negatives_per_row=0 to leave them out"
        )


def _check_scored(lists: NegativeLists) -> None:
    missing = lists.scores is None
    row = 0
    if lists.scores is not None:
        of_keys = lists.scores[lists.offsets[:-1] + np.arange(len(lists.offsets) - 1)]
        missing, row = bool(np.isnan(of_keys).any()), int(np.argmax(np.isnan(of_keys)))
    if missing:
        raise ValueError(
            f"the loss needs a teacher's scores, but row {row} of the training rows has no "
            "teacher_scores; give each row those of its key and of its negatives"
        )


def _columns(
    data: DataSettings, source: PairSource, table: Table, *, data_dir: Path, workdir: AnyPath
) -> dict[str, np.ndarray]:
    """The lists of all rows and the labels of their texts, as columns of a cached folder."""
    fields = {name: one for name, one in data._asdict().items() if name not in _NOT_READ}
    made_from = {
        "format": _FORMAT,
        "source": source.fingerprint,
        "inputs": modality_of(data, "key").fingerprint(workdir),
        "data": json.dumps(fields, default=str),
        # The labels of the negatives continue those of the rows, which a later version may number
        # differently.
        "labels": [digest_of(label_column(table, name).tobytes()) for name in _LABELS],
    }

    def compute() -> dict[str, np.ndarray]:
        with progress_bar("reading negatives", len(source)) as advance:
            lists = read_negative_lists(source, advance=advance)
        columns = {name: one for name, one in lists._asdict().items() if one is not None}
        if not len(lists.numbers):
            return {"offsets": lists.offsets}
        texts = _open_texts(data, source, lists, data_dir=data_dir, workdir=workdir)
        labels = _labels(lists, texts, table)
        own = np.repeat(label_column(table, "text"), np.diff(lists.offsets))
        num_own = (labels["text"][lists.numbers] == own).sum()
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
    files = SplitFiles(_ROLE, ("key",), data_dir, workdir)
    return modality_of(data, "key").open_table(data, NegativeTexts(source, lists), files)


def _labels(lists: NegativeLists, texts: Table, table: Table) -> dict[str, Int[np.ndarray, " _"]]:
    """The labels of the distinct negatives, among those of the training rows.

    Keys are compared as inputs of the encoder, as `Table.labels` compares the rows. Queries, and
    keys of other data sets, may have another prompt or length, so they are compared as texts.
    """
    with progress_bar("comparing negatives with keys", table.num_rows + texts.num_rows) as advance:
        digests = [input_digests(one, "key", advance=advance) for one in (table, texts)]
    numbers, firsts = number_digests(np.concatenate(digests))
    first = firsts[numbers[table.num_rows :]]
    of_row = {name: label_column(table, name) for name in _LABELS}
    row = np.where(first < table.num_rows, first, lists.same_row)
    fresh = int(of_row["text"].max()) + 1 + first - table.num_rows
    groups = np.unique(of_row["group"])
    [unused, *_] = np.setdiff1d(np.arange(len(groups) + 1), groups)
    labels = {
        "text": np.where(row >= 0, of_row["text"][row], fresh),
        "group": np.where(row >= 0, of_row["group"][row], unused),
    }
    return {name: checked_int32(column, what=name) for name, column in labels.items()}
