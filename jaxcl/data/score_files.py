"""Read scores of pairs of a query and a text, such as a re-ranker's scores, from a file."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxcl.data.mining_pool import MiningPool
from jaxcl.data.text_files import read_records, text_of
from jaxcl.host.files import digest_of
from jaxcl.host.paths import AnyPath
from jaxcl.typing import Float, Int, Integer

__all__ = ["ScoreFile", "read_pair_scores"]

_BLOCK = 10_000
_MOST = float(np.finfo(np.float32).max)
_MINED = ("positives", "negatives")


class ScoreFile(NamedTuple):
    """The scores of pairs of a query and a key.

    Attributes:
      pairs: the number of each pair, ascending: the number of its query times `num_keys`, plus the
        row of its key.
      scores: the score of each pair.
      num_keys: the number of keys.
      unknown: the number of pairs in the file whose query or text is unknown.
    """

    pairs: Int[np.ndarray, " n"]
    scores: Float[np.ndarray, " n"]
    num_keys: int
    unknown: int

    def of(
        self, queries: Integer[np.ndarray, " q"], rows: Integer[np.ndarray, "q n"]
    ) -> Float[np.ndarray, "q n"]:
        """The score of each query with each of its keys in `rows`; NaN where there is no score."""
        wanted = np.where(rows >= 0, queries[:, None].astype(np.int64) * self.num_keys + rows, -1)
        position = np.minimum(np.searchsorted(self.pairs, wanted), len(self.pairs) - 1)
        return np.where(self.pairs[position] == wanted, self.scores[position], np.float32(np.nan))

    @property
    def fingerprint(self) -> str:
        """A digest of all pairs and scores."""
        return digest_of(self.pairs.tobytes() + self.scores.tobytes())


def read_pair_scores(path: AnyPath, queries: Iterable[str], pool: MiningPool) -> ScoreFile:
    """Read the scores of pairs.

    Args:
      path: a file of `jaxcl.data.text_files.TEXT_FILES` except plain text. A record has a `query`,
        the text of a `document` and a `score`; or it is a line of mined negatives with
        `teacher_scores`.
      queries: the queries; pairs with other queries are left out, and counted.
      pool: the keys; pairs with other texts are left out, and counted.

    Raises:
      ValueError: if a record lacks a text or a finite score (the message names the line), a pair
        has two different scores, or no pair in the file is known.
      OSError: if the file cannot be read.
    """
    numbers = {query: number for number, query in enumerate(queries)}
    triples = _triples(path)
    scored: dict[int, float] = {}
    unknown = 0
    while block := list(itertools.islice(triples, _BLOCK)):
        rows = pool.find([text for _, _, text, _ in block])
        for (where, query, text, score), row in zip(block, rows.tolist(), strict=True):
            if query not in numbers or row < 0:
                unknown += 1
            elif scored.setdefault(numbers[query] * pool.num_keys + row, score) != score:
                raise ValueError(f"{where} gives a second score for {query!r:.80} and {text!r:.80}")
    if not scored:
        raise ValueError(f"{path} scores no pair of these queries and documents")
    pairs, scores = np.array(list(scored), np.int64), np.array(list(scored.values()), np.float32)
    order = np.argsort(pairs)
    return ScoreFile(pairs[order], scores[order], pool.num_keys, unknown)


def _triples(path: AnyPath) -> Iterator[tuple[str, str, str, float]]:
    """Yield the place, query, text and score of each pair."""
    for where, record in read_records(path):
        query = text_of(record, "query", where)
        if "teacher_scores" not in record:
            yield where, query, text_of(record, "document", where), _score(record, "score", where)
            continue
        for kind in _MINED:
            texts, scores = record.get(kind), record["teacher_scores"]
            scores = scores.get(kind) if isinstance(scores, Mapping) else None
            if not isinstance(texts, list) or not isinstance(scores, list):
                raise ValueError(f"{where}: {kind} and teacher_scores.{kind} are not lists")
            if len(texts) != len(scores):
                raise ValueError(
                    f"{where} has {len(texts)} {kind}, but {len(scores)} scores for them"
                )
            for text, score in zip(texts, scores, strict=True):
                number = _score({"score": score}, "score", where)
                yield where, query, text_of({kind: text}, kind, where), number


def _score(record: Mapping[str, Any], field: str, where: str) -> float:
    value = record.get(field)
    try:
        number = math.nan if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= _MOST:  # also true for NaN
        raise ValueError(f"{where}: {field} is {value!r:.80}; give a finite number")
    return number
