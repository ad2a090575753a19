"""Prepare the data of a run, and check that they stay the same as long as its workdir exists."""

import contextlib
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxcl.data.code_pairs import prepare_code_pairs
from jaxcl.data.modalities import build_readers, input_fingerprints, open_tables, usable_rows
from jaxcl.data.modality import Reader
from jaxcl.data.row_guides import RowGuides, read_guides
from jaxcl.data.row_negatives import RowNegatives, read_negatives
from jaxcl.data.row_scores import RowScores, open_scores
from jaxcl.data.row_topics import RowTopics, read_topics
from jaxcl.data.sources import PairSource
from jaxcl.data.splits import ConcatenatedPairs, open_splits
from jaxcl.data.table import Table, label_column
from jaxcl.data.text_negatives import TextNegatives, open_text_negatives
from jaxcl.host.files import read_json_object, write_whole
from jaxcl.host.paths import AnyPath, as_path, local_path
from jaxcl.settings.data_sections import CodePairsSettings, DataSettings
from jaxcl.settings.derived import data_set_names
from jaxcl.settings.file_kinds import BUILT_IN, names_files
from jaxcl.typing import Int

__all__ = [
    "RememberedData",
    "RunData",
    "open_sources",
    "prepare_data",
    "read_remembered_data",
    "remembered_from",
]

DATA_FILE = "data.json"
_FILES = ("negatives", "guides", "topics")


class RememberedData(NamedTuple):
    """The data that a run started with.

    Attributes:
      data_set: a TFDS name, the folder of a prepared data set, or files of pairs.
      fingerprints: role -> the fingerprint of the split's rows; also the fingerprints of the files
        of negatives, guides and topics, and `input_fingerprints`.
    """

    data_set: str
    fingerprints: dict[str, str]


class RunData(NamedTuple):
    """The data of a run.

    Attributes:
      sources: role -> the split's pairs as they are stored, with their metadata.
      tables: role -> the split's pairs as inputs of the encoders.
      readers: side -> the function that turns the side's values into inputs.
      negatives: the training rows' explicit negatives, from a file or as texts, or `None`.
      guides: a guide model's embeddings of the training rows, or `None`.
      topics: the training rows' topics, or `None`.
      scores: the training rows' scores, or `None`.
      data_sets: names of the data sets of the training rows, in order.
      remembered: the name of the data set, and the fingerprints of all these data.
    """

    sources: Mapping[str, PairSource]
    tables: Mapping[str, Table]
    readers: Mapping[str, Reader]
    negatives: RowNegatives | TextNegatives | None = None
    guides: RowGuides | None = None
    topics: RowTopics | None = None
    scores: RowScores | None = None
    data_sets: tuple[str, ...] = ()
    remembered: RememberedData = RememberedData("", {})

    def source_of_row(self, by: str) -> Int[np.ndarray, " n"]:
        """The number of each training row's source: its `"group"`, `"data_set"` or `"topic"`.

        Raises:
          ValueError: for any other `by`, or if these data have no such sources.
        """
        train = self.sources["train"]
        if by == "group":
            return label_column(self.tables["train"], "group")
        if by == "data_set" and isinstance(train, ConcatenatedPairs):
            return train.data_set_of_row
        if by == "topic" and self.topics is not None:
            return self.topics.topic
        raise ValueError(f"the training rows have no {by!r}")


def read_remembered_data(workdir: AnyPath) -> RememberedData | None:
    """Read `data.json` in a workdir; `None` if there is none yet.

    Raises:
      ValueError: if the file is damaged.
    """
    path = workdir / DATA_FILE
    if not path.exists():
        return None
    return remembered_from(path, read_json_object(path))


def remembered_from(where: AnyPath, content: Any) -> RememberedData:
    """Check the fields of `RememberedData` in JSON content.

    Args:
      where: the file with the content, for the message.
      content: the content.

    Raises:
      ValueError: if the fields are missing or have other types.
    """
    fields = content if isinstance(content, dict) else {}
    data_set, fingerprints = fields.get("data_set"), fields.get("fingerprints")
    if not isinstance(data_set, str) or not isinstance(fingerprints, dict):
        raise ValueError(
            f"{where} is damaged (it lacks the data set or its fingerprints); restore it from a "
            "copy, or train again in another --workdir"
        )
    return RememberedData(data_set, fingerprints)


def prepare_data(
    data: DataSettings,
    *,
    data_dir: Path,
    workdir: AnyPath,
    batch_size: int = 1,
    scored: bool = False,
    open_source: Callable[[str], PairSource] | None = None,
    saved: RememberedData | None = None,
) -> RunData:
    """Open the splits of a run and their tables, and prepare them first if necessary.

    The workdir records the data that the run started with (`data.json`) and its tokenizer
    (`tokenizer.json`). A resumed run uses these, whatever packages have been installed since.

    Args:
      data: the run's settings.
      data_dir: the folder of prepared data that runs share.
      workdir: the run's own folder.
      batch_size: the smallest number of training rows that the run can use.
      scored: whether the negatives must have a teacher's scores.
      open_source: role -> the split's pairs, if they do not come from a prepared data set.
      saved: the data that the newest checkpoint records; a lost `data.json` is rewritten from them.

    Raises:
      ValueError: if a split is missing or empty, there are fewer training rows than one batch
        needs, or the data have changed since an earlier start.
    """
    earlier = saved
    if earlier is None:
        with contextlib.suppress(ValueError):  # no step was saved, so a damaged file can be ignored
            earlier = read_remembered_data(workdir)
    name = _data_set(data, data_dir=data_dir, earlier=earlier)
    usable = functools.partial(usable_rows, data, data_dir=data_dir)
    sources = open_splits(data, name, data_dir=data_dir, open_source=open_source, usable=usable)
    fingerprints = {role: source.fingerprint for role, source in sources.items()}
    num_rows = len(sources["train"])
    if num_rows < batch_size:  # before tokenizing, which may take long
        raise ValueError(
            f"the training split has {num_rows} rows, fewer than one batch of {batch_size}; set "
            f"global_batch_size to at most {num_rows}"
        )
    rows: dict[str, Any] = {"num_rows": num_rows, "source": fingerprints["train"]}
    rows["pairs"] = sources["train"]
    negatives: RowNegatives | TextNegatives | None = None
    guides = topics = None
    if data.negatives is not None:
        negatives = read_negatives(as_path(data.negatives), scored=scored, **rows)
        fingerprints["negatives"] = negatives.fingerprint
    if data.guides is not None:
        guides = read_guides(as_path(data.guides), **rows)
        fingerprints["guides"] = guides.fingerprint
    if data.topics is not None:
        topics = read_topics(as_path(data.topics), **rows)
        fingerprints["topics"] = topics.fingerprint
    recorded = fingerprints if earlier is None else earlier.fingerprints
    _check_same_rows(workdir, earlier, RememberedData(name, fingerprints))
    if earlier is None:  # recorded first, because the tokenizer is trained on these rows
        _write_remembered(workdir, RememberedData(name, fingerprints))
    scores = None
    if data.score_field is not None:  # before tokenizing, because checking scores is fast
        scores = open_scores(sources["train"], data_dir=data_dir)
    tables = open_tables(data, sources, data_dir=data_dir, workdir=workdir, recorded=recorded)
    remembered = RememberedData(name, fingerprints | input_fingerprints(data, workdir))
    _write_remembered(workdir, remembered)
    folders: dict[str, Any] = {"data_dir": data_dir, "workdir": workdir}
    texts = open_text_negatives(data, sources["train"], tables["train"], scored=scored, **folders)
    readers = build_readers(data, workdir)
    names = data_set_names(data)
    negatives = negatives if texts is None else texts
    return RunData(sources, tables, readers, negatives, guides, topics, scores, names, remembered)


def open_sources(
    data: DataSettings,
    *,
    data_dir: Path,
    open_source: Callable[[str], PairSource] | None = None,
) -> dict[str, PairSource]:
    """Open the splits that a new run would use, without their tables.

    Args:
      data, data_dir, open_source: as in `prepare_data`.

    Raises:
      ValueError: if a split is missing or empty.
    """
    name = _data_set(data, data_dir=data_dir, earlier=None)
    usable = functools.partial(usable_rows, data, data_dir=data_dir)
    return open_splits(data, name, data_dir=data_dir, open_source=open_source, usable=usable)


def _data_set(data: DataSettings, *, data_dir: Path, earlier: RememberedData | None) -> str:
    """The TFDS name, the folder or the files that hold the rows of this run."""
    if data.name is None:
        raise ValueError(
            "data.name is not set; give a file of pairs such as pairs.jsonl, a TFDS data set as "
            "NAME:VERSION, or the folder of a prepared one"
        )
    if names_files(data.name):  # absolute, so that a run can resume from another folder
        return str(local_path(data.name).absolute())
    if data.name not in BUILT_IN:
        return data.name
    if earlier is not None and Path(earlier.data_set).exists():
        return earlier.data_set
    return str(_built_in(data, data.name, data_dir))


def _built_in(data: DataSettings, name: str, data_dir: Path) -> Path:
    """Prepare a data set that is made from installed packages."""
    if name == "glyphs":
        from jaxcl.data.images.glyphs import prepare_glyphs  # needs Pillow

        return prepare_glyphs(data_dir).directory
    if name == "emoji":
        from jaxcl.data.images.emoji import prepare_emoji

        return prepare_emoji(data_dir).directory
    options = (data.code_pairs or CodePairsSettings())._asdict()
    return prepare_code_pairs(data_dir, **options).directory


def _check_same_rows(
    workdir: AnyPath, earlier: RememberedData | None, current: RememberedData
) -> None:
    if earlier is None:
        return
    names = sorted(
        name
        for name in earlier.fingerprints.keys() | current.fingerprints.keys()
        if not name.startswith("inputs.")  # `open_tables` compares these
    )
    changed = [n for n in names if earlier.fingerprints.get(n) != current.fingerprints.get(n)]
    files = [f"data.{name}" for name in changed if name in _FILES]
    reasons = [f"the file of {', '.join(files)} has changed"] if files else []
    if roles := [name for name in changed if name not in _FILES]:
        reasons.append(
            f"{current.data_set} holds other rows for {', '.join(roles)} (a data set was replaced, "
            "or its prepared rows were removed and the installed packages have changed)"
        )
    if reasons:
        raise ValueError(
            f"the run in {workdir} was trained on other data: {'; '.join(reasons)}. Restore the "
            "data, or start again with another --workdir"
        )


def _write_remembered(workdir: AnyPath, remembered: RememberedData) -> None:
    with contextlib.suppress(ValueError):
        if read_remembered_data(workdir) == remembered:
            return
    write_whole(workdir / DATA_FILE, json.dumps(remembered._asdict(), indent=2) + "\n")
