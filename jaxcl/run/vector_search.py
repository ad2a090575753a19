"""Exact search over vectors on the host, and faster search over quantised vectors.

A quantised search ranks all keys by their codes, and then the best of them by exact scores:

    search = VectorSearch(keys, codes=quantized(keys, "int8"), precision="int8", rescore=4)
    rows, scores = search.best(queries, top=10)[0]
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxcl.run.host_vectors import QUANTIZATIONS, quantized
from jaxcl.typing import Float, Int

__all__ = ["PRECISIONS", "RESCORE", "Ranking", "VectorSearch", "best_rows", "share_kept"]

PRECISIONS = ("float32", *QUANTIZATIONS)
"""The types of vectors by which `VectorSearch` ranks keys."""

RESCORE: Mapping[str, int] = {"int8": 2, "binary": 20}
"""The default number of candidates to rescore per hit, by precision."""

_BLOCK_NUMBERS = 2**18
"""The number of key elements to convert at once for one query, so that they fit in the cache."""
_MOST_BLOCKS = 16
"""For several queries, larger blocks are faster; blocks are at most this many times larger."""
_TABLE_NUMBERS = 2**25
"""The largest number of scores in memory at once, unless one query has more."""
_LARGEST_EXACT = 2**24
"""All integers up to this number are exact in float32."""


class Ranking(NamedTuple):
    """The best keys of a query.

    Attributes:
      rows: rows of the keys, best first; with equal scores, the lower row is first.
      scores: exact scores of the keys.
    """

    rows: Int[np.ndarray, " _"]
    scores: Float[np.ndarray, " _"]


class VectorSearch(NamedTuple):
    """Keys to search by inner products.

    Attributes:
      keys: the keys, ready for inner products; they may be memory-mapped.
      codes: with a quantised precision, the codes of the keys from `quantized`.
      precision: one of `PRECISIONS`. `"int8"` ranks by integer products, `"binary"` by the number
        of equal bits.
      rescore: number of candidates per hit that are ranked by exact scores.
    """

    keys: Float[np.ndarray, "n d"]
    codes: np.ndarray | None = None
    precision: str = "float32"
    rescore: int = 1

    def best(self, queries: Float[np.ndarray, "q d"], top: int) -> list[Ranking]:
        """Return the best keys of each query.

        Args:
          queries: the queries, ready for inner products.
          top: number of keys per query, if there are that many.
        """
        rankings = []
        step = max(1, _TABLE_NUMBERS // max(1, len(self.keys)))
        for first in range(0, len(queries), step):
            part = queries[first : first + step]
            table = self._coarse(part)
            rankings += [
                self._rescored(query, scores, top)
                for query, scores in zip(part, table, strict=True)
            ]
        return rankings

    def scores(self, queries: Float[np.ndarray, "q d"], top: int) -> np.ndarray:
        """Compute scores `[q, n]` that rank all keys, the first `top` of them as in `best`.

        Args:
          queries: the queries, ready for inner products.
          top: number of keys that `best` would return.
        """
        table = self._coarse(queries)
        if self.codes is None:
            return table
        ordered = table.astype(np.float64)
        for row, (query, scores) in enumerate(zip(queries, table, strict=True)):
            candidates = best_rows(scores, top * self.rescore)
            exact = _products(query[None], self.keys[candidates])[0]
            # Put candidates above all other keys by rank, since sums would round differences.
            _, ranks = np.unique(exact, return_inverse=True)
            ordered[row, candidates] = float(scores.max()) + 1 + ranks
        return ordered

    def _coarse(self, queries: Float[np.ndarray, "q d"]) -> np.ndarray:
        """Compute the scores of all keys, from their codes if there are any."""
        if self.codes is None:
            return _in_blocks(_products, queries, self.keys, np.float32)
        codes = quantized(queries, self.precision)
        if self.precision == "binary":
            return _in_blocks(_equal_bits, _words(codes), _words(self.codes), np.int32)
        exact = 127**2 * self.codes.shape[1] <= _LARGEST_EXACT
        wide = np.float32 if exact else np.float64
        return _in_blocks(_integer_products, codes.astype(wide), self.codes, wide)

    def _rescored(self, query: Float[np.ndarray, " d"], scores: np.ndarray, top: int) -> Ranking:
        if self.codes is None:
            rows = best_rows(scores, top)
            return Ranking(rows, scores[rows])
        candidates = np.sort(best_rows(scores, top * self.rescore))
        exact = _products(query[None], self.keys[candidates])[0]
        order = best_rows(exact, top)
        return Ranking(candidates[order], exact[order])


def best_rows(scores: np.ndarray, count: int) -> Int[np.ndarray, " _"]:
    """The rows of the highest scores, best first; with equal scores, the lower row is first.

    Example:
      >>> best_rows(np.array([2, 3, 2, 1, 2]), 3).tolist()
      [1, 0, 2]
    """
    rows = np.arange(len(scores))
    if count < len(scores):
        least = np.partition(scores, len(scores) - count)[len(scores) - count]
        above = np.flatnonzero(scores > least)
        rows = np.sort(np.append(above, np.flatnonzero(scores == least)[: count - len(above)]))
    return rows[np.argsort(-scores[rows], kind="stable")]


def share_kept(
    rankings: Sequence[Int[np.ndarray, " _"]],
    reference: Sequence[Int[np.ndarray, " _"]],
    *,
    own: Sequence[int],
    top: int,
) -> float:
    """Compute the share of the first keys of a reference that are among the first keys of a search.

    Args:
      rankings: rows of the best `top + 1` keys for each query, best first.
      reference: rows of the best `top + 1` keys by the reference.
      own: the own key of each query, which is left out of both.
      top: number of keys to compare.

    Returns:
      The mean over the queries, in [0, 1]; a query without other keys counts as 1.

    Example:
      >>> share_kept([np.array([7, 1, 2])], [np.array([7, 2, 3])], own=[7], top=2)
      0.5
    """
    shares = []
    for ranking, expected, row in zip(rankings, reference, own, strict=True):
        first = expected[expected != row][:top]
        kept = np.isin(first, ranking[ranking != row][:top])
        shares.append(kept.mean() if kept.size else 1.0)
    return float(np.mean(shares))


def _in_blocks(
    scores: Callable[[np.ndarray, np.ndarray], np.ndarray],
    queries: np.ndarray,
    keys: np.ndarray,
    dtype: type,
) -> np.ndarray:
    """Compute scores `[q, n]` for one block of keys at a time."""
    table: np.ndarray = np.empty((len(queries), len(keys)), dtype)
    numbers = _BLOCK_NUMBERS * min(_MOST_BLOCKS, len(queries))
    step = max(1, numbers // max(1, keys.shape[1]))
    for first in range(0, len(keys), step):
        table[:, first : first + step] = scores(queries, keys[first : first + step])
    return table


def _products(queries: np.ndarray, keys: np.ndarray) -> Float[np.ndarray, "q n"]:
    # Summed in float64, so that equal keys have equal scores, whatever the size of the blocks.
    return (queries.astype(np.float64) @ keys.astype(np.float64).T).astype(np.float32)


def _integer_products(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    # Products of int8 would overflow, and NumPy multiplies wider integers slowly.
    return queries @ keys.astype(queries.dtype).T


def _words(codes: np.ndarray) -> np.ndarray:
    """View packed bits as words of 64 bits."""
    padding = -codes.shape[1] % 8
    padded = np.pad(codes, ((0, 0), (0, padding))) if padding else np.ascontiguousarray(codes)
    return padded.view(np.uint64)


def _equal_bits(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The number of different bits, negated, so that higher is better."""
    return np.stack(
        [-np.bitwise_count(keys ^ query).sum(axis=1, dtype=np.int32) for query in queries]
    )
