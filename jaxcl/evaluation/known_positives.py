"""Keys that are known to answer a query in addition to its own key.

In held-out rows, a query may occur several times, with a different key each time. Rows are
evaluated separately, so the query's other keys would count as errors although the data say that
they are correct. They are therefore excluded from the ranking, as if the pool did not contain them.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxcl.data.row_digests import as_digests, text_digest
from jaxcl.data.row_labels import equal_rows, joined_numbers
from jaxcl.data.source_fields import iterate_fields
from jaxcl.data.sources import PairSource
from jaxcl.typing import SIDES, Float, Int

__all__ = [
    "KnownPositives",
    "content_digest",
    "known_positives",
    "rank_last",
    "read_groups",
    "read_known_positives",
    "read_numbers",
]

_HASHED_AT_ONCE = 2**20


class KnownPositives(NamedTuple):
    """The keys that answer each query, in memory proportional to the number of rows.

    Queries with equal content share a number, and so do keys. Every key that is paired with a
    query's number answers the query, and so does every key with the same content.

    Attributes:
      queries: the number of each query.
      pair_starts: the position where each query number begins in `pairs`, followed by the end.
      pairs: the numbers of the keys that are paired with each query number.
      row_starts: the position where each key number begins in `rows`, followed by the end.
      rows: the rows of the pool, ordered by the number of their key.
    """

    queries: Int[np.ndarray, " q"]
    pair_starts: Int[np.ndarray, " _"]
    pairs: Int[np.ndarray, " p"]
    row_starts: Int[np.ndarray, " _"]
    rows: Int[np.ndarray, " n"]

    def part(self, queries: slice | Int[np.ndarray, " _"]) -> "KnownPositives":
        """The same pool for some of the queries."""
        return self._replace(queries=self.queries[queries])

    def check_sizes(self, *, num_queries: int, num_keys: int) -> None:
        """Raise a `ValueError` if the numbers of queries and keys are not these."""
        if (len(self.queries), len(self.rows)) != (num_queries, num_keys):
            raise ValueError(
                f"known positives of {len(self.queries)} queries and {len(self.rows)} keys do not "
                f"fit {num_queries} queries and {num_keys} keys; compute them from the same rows"
            )

    def others(
        self, queries: slice, relevant: Int[np.ndarray, " t"]
    ) -> dict[int, Int[np.ndarray, " _"]]:
        """The rows of the known positives of some queries, except their relevant keys.

        Args:
          queries: the range of the queries.
          relevant: the row of each query's relevant key.

        Returns:
          A mapping from positions in `queries` to rows, without the queries that have no rows.
        """
        others = {}
        for position, (number, own) in enumerate(zip(self.queries[queries], relevant, strict=True)):
            keys = self.pairs[self.pair_starts[number] : self.pair_starts[number + 1]]
            ends = zip(self.row_starts[keys], self.row_starts[keys + 1], strict=True)
            rows = np.concatenate([self.rows[start:stop] for start, stop in ends])
            if rows.size > 1 or rows[0] != own:
                others[position] = rows[rows != own]
        return others

    def total(self) -> int:
        """The number of known positives of all queries, not counting one relevant key per query."""
        sizes = np.diff(self.row_starts)[self.pairs]
        ends = np.concatenate([[0], np.cumsum(sizes)])[self.pair_starts]
        return int((np.diff(ends)[self.queries] - 1).sum())


def known_positives(
    queries: Int[np.ndarray, " n"],
    keys: Int[np.ndarray, " n"],
    groups: Int[np.ndarray, " n"] | None = None,
) -> KnownPositives:
    """The known positives of rows, each with a query and its key.

    Args:
      queries: a number from 0 to n - 1 per row, equal for equal queries.
      keys: the same for keys.
      groups: a number per row; every key of a group answers every query of the group. `None` for no
        groups.

    Example:
      >>> known = known_positives(np.array([0, 0, 2]), np.array([0, 1, 1]))
      >>> {query: rows.tolist() for query, rows in known.others(slice(3), np.arange(3)).items()}
      {0: [1, 2], 1: [0, 2], 2: [1]}
    """
    if groups is not None:
        queries = joined_numbers(queries, np.unique(groups, return_inverse=True)[1])
    numbers = np.arange(len(queries) + 1)
    pairs = np.unique(np.stack([queries, keys], axis=1), axis=0)
    rows = np.argsort(keys, kind="stable")
    return KnownPositives(
        queries=queries,
        pair_starts=np.searchsorted(pairs[:, 0], numbers),
        pairs=pairs[:, 1],
        row_starts=np.searchsorted(keys[rows], numbers),
        rows=rows,
    )


def read_known_positives(
    source: PairSource, labels: Int[np.ndarray, " n"] | None = None
) -> KnownPositives:
    """The known positives of all rows of a split; arguments as for `read_numbers`."""
    numbers = read_numbers(source, labels)
    return known_positives(*(numbers[side] for side in SIDES))


def read_numbers(
    source: PairSource, labels: Int[np.ndarray, " n"] | None = None
) -> dict[str, Int[np.ndarray, " n"]]:
    """Compare the texts, or other contents, of all rows of a split.

    Args:
      source: the split.
      labels: a label per row, shared by rows with equal queries or equal keys, such as the label
        `"text"` of a table. Rows with a unique label are not read. `None` reads all rows.

    Returns:
      For each side, a number per row that is equal for equal content.
    """
    numbers = {side: np.arange(len(source)) for side in SIDES}
    rows = np.arange(len(source)) if labels is None else _rows_with_shared_label(labels)
    digests = {side: bytearray() for side in SIDES}
    for row, record in zip(rows.tolist(), iterate_fields(source, rows, SIDES), strict=True):
        for side in SIDES:
            digests[side] += content_digest(record[side], row)
    for side in SIDES:
        numbers[side][rows] = rows[equal_rows(as_digests(digests[side]))]
    return numbers


def read_groups(source: PairSource) -> Int[np.ndarray, " n"]:
    """The group of each row of a split.

    Raises:
      ValueError: if the rows have no group.
    """
    groups = np.empty(len(source), np.int64)
    for row, record in enumerate(iterate_fields(source, range(len(source)), ("group",))):
        if "group" not in record:
            raise ValueError("the rows have no group; set data.group_field")
        groups[row] = record["group"]
    return groups


def rank_last(scores: Float[np.ndarray, "t n"], keys: Mapping[int, Int[np.ndarray, " _"]]) -> None:
    """Lower the scores of some keys below all other scores in their rows, in place.

    The other keys then have the ranks that they would have without the lowered keys.

    Args:
      scores: higher is better.
      keys: row of `scores` -> columns.
    """
    for row, columns in keys.items():
        lowest = scores[row].min()
        scores[row, columns] = lowest - np.maximum(1, np.abs(lowest))


def content_digest(value: Any, row: int) -> bytes:
    """A digest that rows with equal content share; only texts, arrays and files are compared."""
    if isinstance(value, str):
        return text_digest(f"text {value}")
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise ValueError(f"row {row:,} has an array of objects; give an array of numbers")
        head = f"array {value.dtype} {value.shape} "
        return _hex_digest(head, np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    if isinstance(value, bytes):
        return _hex_digest("bytes ", memoryview(value))
    return text_digest(f"row {row}")


def _hex_digest(head: str, content: memoryview) -> bytes:
    """The digest of a text followed by the content in hexadecimal, converted part by part."""
    digest = hashlib.blake2b(head.encode(), digest_size=16)
    for first in range(0, len(content), _HASHED_AT_ONCE):
        digest.update(content[first : first + _HASHED_AT_ONCE].hex().encode())
    return digest.digest()


def _rows_with_shared_label(labels: Int[np.ndarray, " n"]) -> Int[np.ndarray, " _"]:
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return np.flatnonzero(counts[inverse] > 1)
