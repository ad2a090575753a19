"""Find the columns of pairs among the columns of a file, by their names."""

import fnmatch
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxcl.settings.data_sections import DataSet
from jaxcl.typing import SIDES

__all__ = ["PairColumns", "find_columns", "late_columns", "named_fields"]

IMAGE_PAIRS: tuple[tuple[str, tuple[str, ...]], ...] = tuple(
    (image, ("caption", "captions", "text", "title", "json.caption", "json.captions", "label"))
    for image in ("image", "image_path", "file_name", "filepath")
)
"""Names of the image column, each with names of the caption column in order of preference."""

PAIRS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("query", ("key", "pos", "positive", "positives", "answer", "document", "passage")),
    ("anchor", ("pos", "positive", "positives")),
    ("question", ("answer", "answers", "positive", "positives")),
    ("sentence1", ("sentence2",)),
    ("text1", ("text2",)),
    ("title", ("abstract", "body")),
)
"""Names of the query column, each with the names of the key column that go with it."""

NEGATIVES = ("negative", "negatives", "neg", "hard_negatives")
_NUMBERED = re.compile(r"(negative|neg)_?(\d+)")
SCORES = (("teacher_scores",), ("scores",), ("pos_scores", "neg_scores"))
LABELS = ("label", "labels", "score", "similarity", "similarity_score")


class PairColumns(NamedTuple):
    """The names of the columns to read; `None` or `()` if a file has no such column.

    Attributes:
      query: the column of the queries.
      key: the column of the keys; each entry is a text or a list of texts.
      split_by: the column whose value determines the split of a row.
      negatives: the columns of negative texts, or one column of lists.
      scores: the columns of a teacher's scores: one column for all scores of a row, or one for the
        scores of the keys and one for the scores of the negatives.
      label: the column of numbers that say how similar query and key are.
      group: the column of the rows' groups.
      score: the column of the scores that a loss reads.
      metadata: the columns of the metadata fields.
      images: the sides whose columns hold images.
      unused: all other columns.
    """

    query: str
    key: str
    split_by: str
    negatives: tuple[str, ...] = ()
    scores: tuple[str, ...] = ()
    label: str | None = None
    group: str | None = None
    score: str | None = None
    metadata: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    @property
    def needed(self) -> list[str]:
        """All columns to read, each once."""
        single = [self.query, self.key, self.label, self.group, self.score, self.split_by]
        names = [*single, *self.negatives, *self.scores, *self.metadata]
        return list(dict.fromkeys(name for name in names if name is not None))

    def described(self) -> str:
        """Describe the columns in one line."""
        parts = [f"query from {self.query!r}", f"key from {self.key!r}"]
        others = {"negatives": self.negatives, "teacher scores": self.scores}
        single = {"labels": self.label, "group": self.group, "scores": self.score}
        others |= {what: (name,) for what, name in single.items() if name is not None}
        for what, names in others.items():
            if names:
                parts.append(f"{what} from {_listed(names)}")
        if self.unused:
            parts.append(f"not used: {_listed(self.unused)}")
        return ", ".join(parts)


def named_fields(data_set: DataSet) -> list[str]:
    """The columns that the config names, except defaults and patterns."""
    files, defaults = data_set.files, DataSet()
    names = [data_set.group_field, data_set.score_field, *data_set.metadata_fields]
    names += [files.negatives_field, files.scores_field, files.label_field]
    names += [data_set.query_field] if data_set.query_field != defaults.query_field else []
    names += [data_set.key_field] if data_set.key_field != defaults.key_field else []
    names += [files.split_by] if files.split_by not in SIDES else []
    return [name for name in names if name is not None and "*" not in name]


def find_columns(
    names: Sequence[str], data_set: DataSet, *, where: str, images: tuple[str, ...] = ()
) -> PairColumns:
    """Find the columns of queries, keys, negatives, teacher scores, labels, groups and scores.

    Columns that the config names must exist. Other columns are recognised if they have common
    names.

    Args:
      names: the columns of a file.
      data_set: the settings of the data set, with the columns that the config names.
      where: the name of the file, for messages.
      images: the sides that are images. If there are any, columns of negatives, teacher scores and
        labels are not recognised by their names.

    Raises:
      ValueError: if a column that the config names does not exist, there is no column of queries or
        keys, or several columns could be meant.
    """
    files = data_set.files
    query, key = _query_and_key(names, data_set, where, images)
    group, score, metadata = data_set.group_field, data_set.score_field, data_set.metadata_fields
    named_fields = {query, key, group, score, *metadata}
    named_fields |= {files.negatives_field, files.scores_field, files.label_field}
    free = [name for name in names if name not in named_fields and not images]
    split_by = {"query": query, "key": key}.get(files.split_by, files.split_by)
    _check_exists("data.group_field", group, names, where)
    _check_exists("data.score_field", score, names, where)
    _check_exists("data.files.split_by", split_by, names, where)
    for name in metadata:
        _check_exists("data.metadata_fields", name, names, where)
    if score not in (None, "score") and "score" in metadata:
        raise ValueError(
            f"data.score_field={score!r} becomes the rows' 'score', so data.metadata_fields cannot "
            "have 'score'; leave it out"
        )
    columns = PairColumns(
        query,
        key,
        split_by,
        negatives=_negatives(names, free, files.negatives_field, where),
        scores=_scores(names, free, files.scores_field, where),
        label=_one_of("label", LABELS, names, free, files.label_field, where),
        group=group,
        score=score,
        metadata=metadata,
        images=images,
    )
    if images and columns.negatives:
        raise ValueError(
            f"data.files.negatives_field={files.negatives_field!r} names texts, but data.modality "
            "has images; leave it None"
        )
    if columns.scores and not columns.negatives:
        columns = columns._replace(scores=())  # useless without negatives
    return columns._replace(unused=tuple(name for name in names if name not in columns.needed))


def late_columns(fields: Iterable[str], columns: PairColumns) -> list[str]:
    """The fields that would have been read if the first rows had them.

    Args:
      fields: the names of fields that are not among the columns.
      columns: the columns that are read.
    """
    known: set[str] = set()
    if not columns.negatives:
        known |= set(NEGATIVES)
    elif not columns.scores:
        known |= {name for names in SCORES for name in names}
    if columns.label is None:
        known |= set(LABELS)
    more_numbered = all(map(_NUMBERED.fullmatch, columns.negatives))
    return sorted(
        name for name in fields if name in known or (more_numbered and _NUMBERED.fullmatch(name))
    )


def _query_and_key(
    names: Sequence[str], data_set: DataSet, where: str, images: tuple[str, ...]
) -> tuple[str, str]:
    wanted = data_set.query_field, data_set.key_field
    defaults = DataSet().query_field, DataSet().key_field
    if all(field in names for field in wanted):
        return wanted
    for setting, field, default in zip(("query_field", "key_field"), wanted, defaults, strict=True):
        if field != default:
            _check_exists(f"data.{setting}", field, names, where)
    if images and (pair := _image_pair(names, wanted, defaults, images)) is not None:
        return pair
    pairs = [
        (query, key)
        for query, keys in _known_pairs(wanted, defaults)
        for key in keys
        if query in names and key in names and query != key
    ]
    if len(pairs) == 1:
        return pairs[0]
    columns = _listed(names) or "none"
    if not pairs:
        raise ValueError(
            f"{where} has no columns that are known to be pairs; its columns are {columns}. Set "
            "data.query_field and data.key_field to the columns of the queries and the keys"
        )
    choices = " or ".join(f"{query!r} with {key!r}" for query, key in pairs)
    raise ValueError(
        f"{where} has several columns that could be pairs: {choices}. Set data.query_field and "
        f"data.key_field; the columns are {columns}"
    )


def _image_pair(
    names: Sequence[str],
    wanted: tuple[str, str],
    defaults: tuple[str, str],
    images: tuple[str, ...],
) -> tuple[str, str] | None:
    """The first known columns of images and captions; `None` if there are none.

    A side that the config names keeps its column. If both sides are images, they share one.
    """
    chosen = {
        side: name
        for side, name, default in zip(SIDES, wanted, defaults, strict=True)
        if name != default
    }
    known = [(image, captions) for image, captions in IMAGE_PAIRS if image in names]
    for side in SIDES:
        others = [chosen[other] for other in images if other in chosen]
        if side in chosen:
            continue
        if side in images:
            columns = others or [image for image, _ in known]
        else:
            columns = [name for _, captions in known[:1] or IMAGE_PAIRS for name in captions]
        column = next((name for name in columns if name in names), None)
        if column is None:
            return None
        chosen[side] = column
    return chosen["query"], chosen["key"]


def _known_pairs(
    wanted: tuple[str, str], defaults: tuple[str, str]
) -> Iterable[tuple[str, tuple[str, ...]]]:
    """The pairs of names to look for if the config sets at most one of the two fields."""
    every_key = tuple(dict.fromkeys(key for _, keys in PAIRS for key in keys))
    if wanted[0] != defaults[0]:
        return [(wanted[0], every_key)]
    if wanted[1] != defaults[1]:
        return [(query, (wanted[1],)) for query, _ in PAIRS]
    return PAIRS


def _negatives(
    names: Sequence[str], free: Sequence[str], field: str | None, where: str
) -> tuple[str, ...]:
    if field is not None:
        matching = tuple(fnmatch.filter(names, field))
        if not matching:
            _check_exists("data.files.negatives_field", field, names, where)
        return matching
    numbered = [(int(match[2]), name) for name in free if (match := _NUMBERED.fullmatch(name))]
    kinds: list[tuple[str, ...]] = [(name,) for name in NEGATIVES if name in free]
    kinds += [tuple(name for _, name in sorted(numbered))] if numbered else []
    if len(kinds) > 1:
        raise ValueError(
            f"{where} has several columns that could be negatives: "
            f"{' or '.join(map(_listed, kinds))}; set data.files.negatives_field to one, or to a "
            "pattern such as negative_*"
        )
    return kinds[0] if kinds else ()


def _scores(
    names: Sequence[str], free: Sequence[str], field: str | None, where: str
) -> tuple[str, ...]:
    if field is not None:
        _check_exists("data.files.scores_field", field, names, where)
        return (field,)
    kinds = [kind for kind in SCORES if set(kind) <= set(free)]
    if len(kinds) > 1:
        raise ValueError(
            f"{where} has several columns that could be a teacher's scores: "
            f"{' or '.join(map(_listed, kinds))}; set data.files.scores_field to one"
        )
    return kinds[0] if kinds else ()


def _one_of(
    what: str,
    known: Sequence[str],
    names: Sequence[str],
    free: Sequence[str],
    field: str | None,
    where: str,
) -> str | None:
    if field is not None:
        _check_exists(f"data.files.{what}_field", field, names, where)
        return field
    matches = [name for name in known if name in free]
    if len(matches) > 1:
        raise ValueError(
            f"{where} has several columns that could be a {what}: {_listed(matches)}; set "
            f"data.files.{what}_field to one"
        )
    return matches[0] if matches else None


def _check_exists(setting: str, field: str | None, names: Sequence[str], where: str) -> None:
    if field is not None and field not in names:
        raise ValueError(
            f"{setting}={field!r}, but {where} has only the columns {_listed(names) or 'none'}"
        )


def _listed(names: Iterable[str | None]) -> str:
    return ", ".join(str(name) for name in names)
