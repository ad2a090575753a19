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
"""The types of vectors that `VectorSearch` ranks keys by."""

RESCORE: Mapping[str, int] = {"int8": 2, "binary": 20}
"""Precision -> how many candidates are rescored per hit, by default."""

_BLOCK_NUMBERS = 2**18
"""Numbers of the keys that are converted at once for one query, so that they stay in the cache."""
_MOST_BLOCKS = 16
"""For several queries, products of larger blocks are faster: this many times larger at most."""
_TABLE_NUMBERS = 2**25
"""Scores that are held at once, as far as one query allows."""
_LARGEST_EXACT = 2**24
"""Float32 holds all integers up to this one."""


class Ranking(NamedTuple):
    """A query's best keys.

    Attributes:
      rows: their rows, best first; of equal scores, the lower row first.
      scores: their exact scores.
    """

    rows: Int[np.ndarray, " _"]
    scores: Float[np.ndarray, " _"]


class VectorSearch(NamedTuple):
    """Keys to search by inner products.

    Attributes:
      keys: the keys, ready for inner products; they may be mapped to memory.
      codes: with a quantised precision, the keys' codes as `quantized` computes them.
      precision: one of `PRECISIONS`. `"int8"` ranks by integer products, `"binary"` by the number
        of equal bits.
      rescore: the number of candidates per hit whose exact scores decide the ranking.
    """

    keys: Float[np.ndarray, "n d"]
    codes: np.ndarray | None = None
    precision: str = "float32"
    rescore: int = 1

    def best(self, queries: Float[np.ndarray, "q d"], top: int) -> list[Ranking]:
        """The best keys of each query.

        Args:
          queries: ready for inner products.
          top: the number of keys; fewer if there are fewer keys.
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
        """Scores `[q, n]` that order all keys, the first `top` of them as `best` does.

        Args:
          queries: ready for inner products.
          top: the number of keys that `best` would return.
        """
        table = self._coarse(queries)
        if self.codes is None:
            return table
        ordered = table.astype(np.float64)
        for row, (query, scores) in enumerate(zip(queries, table, strict=True)):
            candidates = best_rows(scores, top * self.rescore)
            exact = _products(query[None], self.keys[candidates])[0]
            # Above every key that is no candidate, by ranks: a sum would round small differences.
            _, ranks = np.unique(exact, return_inverse=True)
            ordered[row, candidates] = float(scores.max()) + 1 + ranks
        return ordered

    def _coarse(self, queries: Float[np.ndarray, "q d"]) -> np.ndarray:
        """Scores of all keys: of their codes if there are any, otherwise exact ones."""
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
    """The rows of the highest scores, best first; of equal scores, the lower row first.

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
    """The share of the reference's first keys that are also among the first keys of a search.

    Args:
      rankings: rows of keys for each query, best first, `top + 1` of them.
      reference: the same of the reference.
      own: each query's own key, which is left out of both.
      top: the number of keys that are compared.

    Returns:
      The mean over the queries, in 0..1; 1 where there are no other keys.

    Example:
      >>> share_kept([np.array([7, 1, 2])], [np.array([7, 2, 3])], own=[7], top=2)
      0.5
    """
    shares = []
    for found, wanted, row in zip(rankings, reference, own, strict=True):
        first = wanted[wanted != row][:top]
        kept = np.isin(first, found[found != row][:top])
        shares.append(kept.mean() if kept.size else 1.0)
    return float(np.mean(shares))


def _in_blocks(
    scores: Callable[[np.ndarray, np.ndarray], np.ndarray],
    queries: np.ndarray,
    keys: np.ndarray,
    dtype: type,
) -> np.ndarray:
    """Scores `[q, n]`, computed for some keys at a time."""
    table: np.ndarray = np.empty((len(queries), len(keys)), dtype)
    numbers = _BLOCK_NUMBERS * min(_MOST_BLOCKS, len(queries))
    step = max(1, numbers // max(1, keys.shape[1]))
    for first in range(0, len(keys), step):
        table[:, first : first + step] = scores(queries, keys[first : first + step])
    return table


def _products(queries: np.ndarray, keys: np.ndarray) -> Float[np.ndarray, "q n"]:
    # Summed in float64, so that equal keys have equal scores however the keys are blocked.
    return (queries.astype(np.float64) @ keys.astype(np.float64).T).astype(np.float32)


def _integer_products(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    # Products of int8 would overflow, and NumPy multiplies wider integers slowly.
    return queries @ keys.astype(queries.dtype).T


def _words(codes: np.ndarray) -> np.ndarray:
    """Packed bits, 64 at a time."""
    padding = -codes.shape[1] % 8
    padded = np.pad(codes, ((0, 0), (0, padding))) if padding else np.ascontiguousarray(codes)
    return padded.view(np.uint64)


def _equal_bits(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The negative number of different bits."""
    return np.stack(
        [-np.bitwise_count(keys ^ query).sum(axis=1, dtype=np.int32) for query in queries]
    )
