"""The negative texts that the rows of a source bring, and a teacher's scores: read and checked.

A record may have `"negatives"`, a list of texts that may be empty, and `"teacher_scores"`: the
score of its key, then one for each negative.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxcl.data.row_digests import NO_DIGEST, as_digests, number_digests, text_digest
from jaxcl.data.row_ranges import RowRange
from jaxcl.data.sources import PairSource, checked_rows
from jaxcl.data.splits import ConcatenatedPairs
from jaxcl.typing import Float, Int, Integer

__all__ = ["NegativeLists", "NegativeTexts", "have_negatives", "read_negative_lists"]

_CHUNK_ROWS = 4096


class NegativeLists(NamedTuple):
    """Each row's negatives, by the number of their text.

    Attributes:
      offsets: where each row's list begins, and one end more than there are rows.
      numbers: all lists end to end. Equal texts share a number; numbers begin at 0, in the order in
        which the texts appear.
      first_row: of each distinct text, the first row that has it.
      first_place: its place in that row's list.
      query_row: the first row whose query is that text; −1 for none.
      scores: each row's scores end to end, its key's and then those of its negatives; NaN for a row
        without scores, `None` without any.
    """

    offsets: Int[np.ndarray, " _"]
    numbers: Int[np.ndarray, " s"]
    first_row: Int[np.ndarray, " _"]
    first_place: Int[np.ndarray, " _"]
    query_row: Int[np.ndarray, " _"]
    scores: Float[np.ndarray, " _"] | None


def have_negatives(source: PairSource) -> bool:
    """Whether the records of a source have `"negatives"`.

    The first record of each data set decides: its others have the field, too, or leave it out where
    they have none.
    """
    firsts = source.first_rows if isinstance(source, ConcatenatedPairs) else np.zeros(1, np.int64)
    return any("negatives" in record for record in source.read(firsts))


def read_negative_lists(
    source: PairSource, *, advance: Callable[[int], None] = lambda rows: None
) -> NegativeLists:
    """Read the negatives of all rows once; no text is kept.

    Args:
      source: the rows.
      advance: called with the number of rows done since the last call.

    Raises:
      ValueError: if negatives are not a list of texts, a text is empty, or scores are not finite
        numbers, one for the key and one for each negative; the message names the row.
    """
    counts = np.zeros(len(source), np.int32)
    # Two uint64 for each text, since a Python object would take several times as much.
    queries, negatives, scores = bytearray(), bytearray(), bytearray()
    scored = False
    for first in range(0, len(source), _CHUNK_ROWS):
        rows = np.arange(first, min(first + _CHUNK_ROWS, len(source)))
        for row, record in enumerate(source.read(rows), start=first):
            texts = _checked_texts(record.get("negatives"), row)
            counts[row] = len(texts)
            queries += _query_digest(record["query"])
            negatives += b"".join(map(text_digest, texts))
            of_row = _checked_scores(record.get("teacher_scores"), row, count=1 + len(texts))
            scored |= of_row is not None
            missing = np.full(1 + len(texts), np.nan, np.float32)
            scores += (missing if of_row is None else of_row).tobytes()
        advance(len(rows))
    offsets = np.append(0, np.cumsum(counts, dtype=np.int64))
    texts_digests = as_digests(negatives)
    numbers, firsts = number_digests(texts_digests)
    # Not before the last row that has negatives, so that rows without any are passed over.
    first_row = np.searchsorted(offsets, firsts, side="right") - 1
    return NegativeLists(
        offsets=offsets,
        numbers=numbers,
        first_row=first_row,
        first_place=(firsts - offsets[first_row]).astype(np.int32),
        query_row=_first_equal(as_digests(queries), texts_digests[firsts]),
        scores=np.frombuffer(scores, np.float32) if scored else None,
    )


class NegativeTexts:
    """The distinct negatives of a source as rows of a source, with a `"key"` only.

    Args:
      source: the rows that bring them.
      lists: of `read_negative_lists`, or a cached copy.
    """

    def __init__(self, source: PairSource, lists: NegativeLists) -> None:
        self._source, self._lists = source, lists

    def __len__(self) -> int:
        return len(self._lists.first_row)

    @property
    def fingerprint(self) -> str:
        """Names the texts."""
        return f"negatives:{self._source.fingerprint}"

    @property
    def row_ranges(self) -> tuple[RowRange, ...]:
        """Empty: no row of a file is one of these."""
        return ()

    def read(self, rows: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """Returns `{"key": text}` per number, in the order given."""
        numbers = np.array(checked_rows(rows, num_rows=len(self)), np.int64)
        needed, places = np.unique(self._lists.first_row[numbers], return_inverse=True)
        records = self._source.read(needed)
        return [
            {"key": records[record]["negatives"][place]}
            for record, place in zip(
                places.tolist(), self._lists.first_place[numbers].tolist(), strict=True
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
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(
                f"negative {place} of row {row} is {type(text).__name__}, {_short(text)}; give a "
                "text"
            )
        if not text.strip():
            raise ValueError(
                f"negative {place} of row {row} is an empty text; leave it out of the list"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"negative {place} of row {row} is not Unicode ({error})") from error
    return texts


def _checked_scores(scores: Any, row: int, *, count: int) -> Float[np.ndarray, " _"] | None:
    if scores is None:
        return None
    array = _as_float32(scores)
    if array is None or not np.isfinite(array).all():
        raise ValueError(
            f"the teacher_scores of row {row} are {_short(scores)}; give finite numbers of float32"
        )
    if len(array) != count:
        raise ValueError(
            f"row {row} has {len(array)} teacher_scores and {count - 1} negatives; give {count} "
            "scores: the key's, then each negative's"
        )
    return array


def _as_float32(scores: Any) -> Float[np.ndarray, " _"] | None:
    """Scores as one axis of float32; `None` if they are anything else."""
    try:
        array = np.asarray(scores)
    except ValueError:  # lists of different lengths
        return None
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iuf"):
        return None
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def _query_digest(query: Any) -> bytes:
    try:
        return text_digest(query) if isinstance(query, str) else NO_DIGEST
    except UnicodeEncodeError:  # which tokenising the queries reports
        return NO_DIGEST


def _first_equal(
    table: Integer[np.ndarray, "n 2"], wanted: Integer[np.ndarray, "m 2"]
) -> Int[np.ndarray, " _"]:
    """For each wanted digest the first row of a table with the same; −1 for none."""
    numbers, firsts = number_digests(np.concatenate([table, wanted]))
    first = firsts[numbers[len(table) :]]
    return np.where(first < len(table), first, -1)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
