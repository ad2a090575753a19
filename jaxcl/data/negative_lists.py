"""Read and check the negative texts and a teacher's scores in the rows of a source.

A record may have `"negatives"`, a list of texts that may be empty, and `"teacher_scores"`: a score
for its key, then one for each negative.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxcl.data.row_digests import NO_DIGEST, as_digests, number_digests, text_digest
from jaxcl.data.row_ranges import RowRange
from jaxcl.data.source_fields import read_fields
from jaxcl.data.sources import PairSource, checked_rows
from jaxcl.data.splits import ConcatenatedPairs
from jaxcl.typing import SIDES, Float, Int, Integer

__all__ = ["NegativeLists", "NegativeTexts", "have_negatives", "read_negative_lists"]

_CHUNK_ROWS = 4096
_SAMPLED_ROWS = 256
_NUMBERING = 2
"""The version of the numbering; raise it whenever the same texts should get different numbers."""


class NegativeLists(NamedTuple):
    """The negatives of each row, as numbers of distinct texts.

    Attributes:
      offsets: where each row's list begins in `numbers`, followed by the end of the last list.
      numbers: all lists, concatenated. Equal texts have the same number, except in different data
        sets, whose prompts may differ. Numbers begin at 0, in order of first appearance.
      first_row: for each distinct text, the first row whose list contains it.
      first_place: for each distinct text, its position in the list of that row.
      same_row: for each distinct text, the first row whose key it equals; if there is none, the
        first row whose query it equals, or −1.
      scores: the scores of each row's key and then of its negatives, concatenated. NaN for a row
        without scores; `None` if no row has scores.
    """

    offsets: Int[np.ndarray, " _"]
    numbers: Int[np.ndarray, " s"]
    first_row: Int[np.ndarray, " _"]
    first_place: Int[np.ndarray, " _"]
    same_row: Int[np.ndarray, " _"]
    scores: Float[np.ndarray, " _"] | None


def have_negatives(source: PairSource) -> bool:
    """Whether the records of a source have `"negatives"`.

    The function reads the first record of each data set and a sample of all records, since a record
    without negatives may leave the field out.
    """
    sample = np.linspace(0, len(source) - 1, _SAMPLED_ROWS).astype(np.int64)
    rows = np.unique(np.concatenate([_first_rows(source), sample]))
    return any("negatives" in record for record in read_fields(source, rows, ("negatives",)))


def read_negative_lists(
    source: PairSource, *, advance: Callable[[int], None] = lambda rows: None
) -> NegativeLists:
    """Read the negatives of all rows in one pass, without keeping the texts.

    Args:
      source: the rows.
      advance: called with the number of rows done since the last call.

    Raises:
      ValueError: if negatives are not a list of texts, a text is empty, or scores are not finite
        numbers, one for the key and one for each negative; the message names the row.
    """
    counts = np.zeros(len(source), np.int32)
    # Two uint64 per text, because a Python object would take several times as much memory.
    digests = {name: bytearray() for name in ("query", "key", "negatives")}
    scores = bytearray()
    scored = False
    for first in range(0, len(source), _CHUNK_ROWS):
        rows = np.arange(first, min(first + _CHUNK_ROWS, len(source)))
        for row, record in enumerate(source.read(rows), start=first):
            texts = _checked_texts(record.get("negatives"), row)
            counts[row] = len(texts)
            digests["negatives"] += b"".join(map(text_digest, texts))
            for side in SIDES:
                digests[side] += _side_digest(record[side])
            row_scores = _checked_scores(record.get("teacher_scores"), row, count=1 + len(texts))
            if row_scores is not None and not scored:
                scored, scores = True, bytearray(_no_scores(int(counts[:row].sum()) + row))
            if scored:
                scores += _no_scores(1 + len(texts)) if row_scores is None else row_scores.tobytes()
        advance(len(rows))
    offsets = np.append(0, np.cumsum(counts, dtype=np.int64))
    edges = offsets[[*_first_rows(source), len(source)]]
    negatives = as_digests(digests.pop("negatives"))
    numbers, firsts = _numbered(negatives, edges)
    negatives = negatives[firsts]
    # The last row that begins there, because rows without negatives begin where the next one does.
    first_row = np.searchsorted(offsets, firsts, side="right") - 1
    of_query, of_key = (_first_equal(as_digests(digests.pop(side)), negatives) for side in SIDES)
    return NegativeLists(
        offsets=offsets,
        numbers=numbers,
        first_row=first_row,
        first_place=(firsts - offsets[first_row]).astype(np.int32),
        same_row=np.where(of_key >= 0, of_key, of_query),
        scores=np.frombuffer(scores, np.float32) if scored else None,
    )


class NegativeTexts:
    """The distinct negatives of a source, as a source of rows that have only a `"key"`.

    Args:
      source: the rows that list the negatives.
      lists: the result of `read_negative_lists`, or a cached copy.
    """

    def __init__(self, source: PairSource, lists: NegativeLists) -> None:
        self._source, self._lists = source, lists

    def __len__(self) -> int:
        return len(self._lists.first_row)

    @property
    def fingerprint(self) -> str:
        """A string that identifies the texts and their numbers."""
        return f"negatives:{_NUMBERING}:{self._source.fingerprint}"

    @property
    def row_ranges(self) -> tuple[RowRange, ...]:
        """Empty, because these are not rows of a file."""
        return ()

    @property
    def rows(self) -> PairSource:
        """The rows that list the negatives."""
        return self._source

    @property
    def offsets(self) -> Int[np.ndarray, " _"]:
        """For each row, the number of distinct texts in earlier rows; at the end, in all rows."""
        return np.searchsorted(self._lists.first_row, np.arange(len(self._source) + 1))

    def read(self, rows: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """Return `{"key": text}` per number, in the order given."""
        numbers = np.array(checked_rows(rows, num_rows=len(self)), np.int64)
        first_rows, record_of_text = np.unique(self._lists.first_row[numbers], return_inverse=True)
        records = self._source.read(first_rows)
        return [
            {"key": _decoded(records[record]["negatives"][position])}
            for record, position in zip(
                record_of_text.tolist(), self._lists.first_place[numbers].tolist(), strict=True
            )
        ]


def _checked_texts(texts: Any, row: int) -> Sequence[str]:
    if texts is None:
        return ()
    if isinstance(texts, str | bytes | Mapping) or not hasattr(texts, "__len__"):
        raise ValueError(
            f"the negatives of row {row} are {type(texts).__name__}, {_short(texts)}; give a list "
            "of texts, empty if the row has none"
        )
    return [
        _checked_text(text, f"negative {position} of row {row}")
        for position, text in enumerate(texts)
    ]


def _checked_text(text: Any, what: str) -> str:
    try:
        text = _decoded(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not UTF-8 ({error})") from error
    if not isinstance(text, str):
        raise ValueError(f"{what} is {type(text).__name__}, {_short(text)}; give a text")
    if not text.strip():
        raise ValueError(f"{what} is an empty text; leave it out of the list")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is not Unicode ({error})") from error
    return text


def _decoded(text: Any) -> Any:
    """Decode a text that is still bytes, as in the lists of a TFDS data set."""
    return text.decode() if isinstance(text, bytes) else text


def _checked_scores(scores: Any, row: int, *, count: int) -> Float[np.ndarray, " _"] | None:
    if scores is None:
        return None
    array = _as_float32(scores)
    if array is None or not np.isfinite(array).all():
        raise ValueError(
            f"the teacher_scores of row {row} are {_short(scores)}; give finite float32 numbers"
        )
    if len(array) != count:
        raise ValueError(
            f"row {row} has {len(array)} teacher_scores and {count - 1} negatives; give {count} "
            "scores: the key's, then each negative's"
        )
    return array


def _as_float32(scores: Any) -> Float[np.ndarray, " _"] | None:
    """Convert scores to a one-dimensional float32 array; `None` if that is not possible."""
    try:
        array = np.asarray(scores)
    except ValueError:  # lists of different lengths
        return None
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iuf"):
        return None
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def _no_scores(count: int) -> bytes:
    return np.full(count, np.nan, np.float32).tobytes()


def _side_digest(value: Any) -> bytes:
    try:
        return text_digest(value) if isinstance(value, str) else NO_DIGEST
    except UnicodeEncodeError:  # reported when the side is tokenized
        return NO_DIGEST


def _first_rows(source: PairSource) -> Int[np.ndarray, " _"]:
    """The first row of each of the source's data sets."""
    return source.first_rows if isinstance(source, ConcatenatedPairs) else np.zeros(1, np.int64)


def _numbered(
    digests: Integer[np.ndarray, "s 2"], edges: Int[np.ndarray, " _"]
) -> tuple[Int[np.ndarray, " s"], Int[np.ndarray, " _"]]:
    """Apply `number_digests` to each data set, whose digests lie between two edges."""
    numbers, firsts, count = [], [], 0
    for begin, end in itertools.pairwise(edges.tolist()):
        set_numbers, first = number_digests(digests[begin:end])
        numbers.append(set_numbers + np.int32(count))
        firsts.append(begin + first)
        count += len(first)
    return np.concatenate(numbers), np.concatenate(firsts)


def _first_equal(
    table: Integer[np.ndarray, "n 2"], wanted: Integer[np.ndarray, "m 2"]
) -> Int[np.ndarray, " _"]:
    """For each wanted digest, the first row of a table with the same digest, or −1."""
    numbers, firsts = number_digests(np.concatenate([table, wanted]))
    first = firsts[numbers[len(table) :]]
    return np.where(first < len(table), first, -1)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
