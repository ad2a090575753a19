"""Write mined negatives as JSON lines of texts, with a report and examples."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxcl.data.mining_pool import MiningPool
from jaxcl.data.query_files import QueryFile
from jaxcl.host.files import replacing
from jaxcl.host.paths import AnyPath
from jaxcl.host.progress import progress_bar
from jaxcl.negatives.hard_negatives import HardNegatives
from jaxcl.negatives.pair_scores import PairScores
from jaxcl.run.mining_report import Example, example_rows, write_reports
from jaxcl.typing import Int, Integer

__all__ = ["write_mined"]

_ROWS_AT_ONCE = 1_000


def write_mined(
    output: AnyPath,
    queries: QueryFile,
    pool: MiningPool,
    mined: HardNegatives,
    scores: PairScores,
    report: Mapping[str, Any],
    *,
    skip_empty: bool,
    seed: int,
) -> None:
    """Write the lines, the report and the examples, each file completely or not at all.

    Args:
      output: the file of the lines, in an existing folder.
      queries: the queries.
      pool: the keys.
      mined: the negatives of the queries.
      scores: a function that computes the scores of positives.
      report: the report.
      skip_empty: whether to leave out queries without negatives.
      seed: seed for the choice of examples.

    Raises:
      OSError: if a file cannot be written.
    """
    total = len(queries.queries)
    with replacing(output) as file, progress_bar("writing", total) as advance:
        for line in _lines(queries, pool, mined, scores):
            if line["negatives"] or not skip_empty:
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            advance(1)
    write_reports(output, report, _examples(queries, pool, mined, seed))


def _lines(
    queries: QueryFile, pool: MiningPool, mined: HardNegatives, score: PairScores
) -> Iterator[dict[str, Any]]:
    """Yield the records of the output, in order."""
    for first in range(0, len(queries.queries), _ROWS_AT_ONCE):
        numbers = np.arange(first, min(first + _ROWS_AT_ONCE, len(queries.queries)))
        positives = _padded(pool.positives[first : first + len(numbers)])
        scores = score(numbers, positives)
        negatives = mined.rows[numbers]
        # Read the texts of many lines at once, since every read takes a while.
        texts = _texts_of(pool, np.concatenate([positives, negatives], axis=1))
        for index, number in enumerate(numbers.tolist()):
            own_rows, present = pool.positives[number], negatives[index] >= 0
            if pool.positive_texts is not None:
                own_texts = list(pool.positive_texts[number])
            else:
                own_texts = [texts[row] for row in own_rows]
            yield {
                "query": queries.queries[number],
                "positives": own_texts,
                "negatives": [texts[row] for row in negatives[index][present].tolist()],
                "teacher_scores": {
                    "positives": [_rounded(value) for value in scores[index][: len(own_rows)]],
                    "negatives": [_rounded(value) for value in mined.scores[number][present]],
                },
            }


def _texts_of(pool: MiningPool, rows: Integer[np.ndarray, "..."]) -> dict[int, str]:
    """Read the texts of keys, by row; negative rows are padding."""
    distinct = np.unique(rows[rows >= 0])
    return dict(zip(distinct.tolist(), pool.read(distinct), strict=True))


def _padded(lists: Sequence[Sequence[int]]) -> Int[np.ndarray, "n p"]:
    """Convert lists of rows to an array, padded with -1."""
    rows = np.full((len(lists), max(map(len, lists))), -1, np.int64)
    for index, values in enumerate(lists):
        rows[index, : len(values)] = values
    return rows


def _examples(
    queries: QueryFile, pool: MiningPool, mined: HardNegatives, seed: int
) -> Iterator[Example]:
    for number in example_rows(len(queries.queries), seed):
        present = mined.rows[number] >= 0
        texts = pool.read(mined.rows[number][present])
        columns = (mined.ranks[number][present], mined.scores[number][present], texts)
        yield Example(
            queries.queries[number],
            pool.read(pool.positives[number]),
            float(mined.positive_scores[number]),
            [(int(rank), float(score), text) for rank, score, text in zip(*columns, strict=True)],
        )


def _rounded(score: Any) -> float:
    return float(f"{score:.6g}")
