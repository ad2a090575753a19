"""Retrieval metrics for graded relevance and several relevant documents per query, in NumPy.

Every metric is a function of the ranks of the relevant documents, `GradedRanks`, and returns one
value per query. Documents with equal scores are in random order: a metric is the expectation over
all orders of the tied documents. trec_eval breaks ties by the documents' ids, so its values agree
if there are no ties, and otherwise only by chance.

Reference:
  McSherry and Najork, "Computing Information Retrieval Performance Measures Efficiently in the
  Presence of Tied Scores", ECIR 2008.
"""

import operator
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from jaxcl.typing import Float, Int

__all__ = [
    "CUTOFFS",
    "GRADED_METRICS",
    "GradedRanks",
    "graded_map_metric",
    "graded_mrr_metric",
    "graded_ndcg_metric",
    "graded_precision_metric",
    "graded_recall_metric",
    "places_of",
]

CUTOFFS = (1, 5, 10, 100)


class GradedRanks(NamedTuple):
    """The ranks of all relevant documents, one entry per pair of a query and a document.

    Attributes:
      queries: index of the pair's query, in ascending order.
      grades: relevance of the document, greater than 0.
      better: number of documents with a higher score; infinity for a document that is not ranked.
      tied: number of documents with the same score, including itself.
      num_queries: number of queries, with or without a relevant document.
    """

    queries: Int[np.ndarray, " n"]
    grades: Int[np.ndarray, " n"]
    better: Float[np.ndarray, " n"]
    tied: Int[np.ndarray, " n"]
    num_queries: int


def places_of(
    scores: Float[np.ndarray, " n"], documents: Int[np.ndarray, " m"]
) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"]]:
    """For each of some documents, count the documents with a higher and with an equal score.

    Args:
      scores: the scores of all documents for one query, without NaN; higher is better.
      documents: indices into `scores`.

    Returns:
      `(better, tied)`, as in `GradedRanks`.

    Example:
      >>> places_of(np.array([0.5, 0.9, 0.5, 0.1]), np.array([0, 1]))
      (array([1, 0]), array([2, 1]))
    """
    ordered = np.sort(scores)
    own = scores[documents]
    end = np.searchsorted(ordered, own, side="right")
    return len(scores) - end, end - np.searchsorted(ordered, own, side="left")


def graded_ndcg_metric(ranks: GradedRanks, *, cutoff: int) -> Float[np.ndarray, " q"]:
    """Normalised discounted cumulative gain (nDCG), with the grade as the gain.

    `ndcg = Σ_{rank_i <= cutoff} grade_i / log2(1 + rank_i)`, divided by its value for the ideal
    order.

    Args:
      ranks: ranks of the relevant documents.
      cutoff: the last rank taken into account, at least 1.

    Returns:
      Values in [0, 1]; 0 for a query without a relevant document.

    Raises:
      ValueError: if `cutoff` is less than 1.

    Example:
      >>> ranks = GradedRanks(
      ...     queries=np.array([0, 0]), grades=np.array([3, 1]), better=np.array([1.0, 0.0]),
      ...     tied=np.array([1, 1]), num_queries=1,
      ... )
      >>> graded_ndcg_metric(ranks, cutoff=10).round(3).tolist()  # (3 / log2(3) + 1) / (3 + …)
      [0.797]

    Reference:
      Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR techniques", TOIS 2002.
    """
    cutoff = _checked(cutoff)
    sums = np.concatenate([[0.0], np.cumsum(1 / np.log2(1 + np.arange(1, cutoff + 1)))])
    discounts = _mean_over_ties(ranks, sums)
    order = np.lexsort((-ranks.grades, ranks.queries))
    first = np.searchsorted(ranks.queries, ranks.queries, side="left")
    ideal = np.diff(sums, append=sums[-1])[np.minimum(np.arange(len(order)) - first, cutoff)]
    return _ratio(
        _per_query(ranks, ranks.grades * discounts), _per_query(ranks, ranks.grades[order] * ideal)
    )


def graded_precision_metric(ranks: GradedRanks, *, cutoff: int) -> Float[np.ndarray, " q"]:
    """Share of the first `cutoff` documents that are relevant.

    If there are fewer documents, the missing ones count as irrelevant.

    Arguments and errors are as for `graded_ndcg_metric`.
    """
    return _hits(ranks, _checked(cutoff)) / cutoff


def graded_recall_metric(ranks: GradedRanks, *, cutoff: int) -> Float[np.ndarray, " q"]:
    """Share of a query's relevant documents that are among the first `cutoff`.

    Arguments, return values and errors are as for `graded_ndcg_metric`.
    """
    return _ratio(_hits(ranks, _checked(cutoff)), _per_query(ranks, np.ones(len(ranks.queries))))


def graded_mrr_metric(ranks: GradedRanks, *, cutoff: int) -> Float[np.ndarray, " q"]:
    """Reciprocal rank of the first relevant document, or 0 if it ranks below `cutoff`.

    If the best `r` relevant documents share a score with `t` documents in all, after `a` better
    ones, the first of them is at rank `a + j` with the probability `C(t - j, r - 1) / C(t, r)`.

    Arguments, return values and errors are as for `graded_ndcg_metric`.
    """
    cutoff = _checked(cutoff)
    groups = _tie_groups(ranks)
    is_first = groups.before == 0
    better, tied, relevant = groups.better[is_first], groups.tied[is_first], groups.size[is_first]
    values = np.zeros(len(better))
    chance = relevant / tied  # that the first one is the j-th of the tie
    for position in range(1, cutoff + 1):
        rank = better + position
        values += np.where(rank <= cutoff, chance / rank, 0)
        left = tied - position
        chance *= np.maximum(left - relevant + 1, 0) / np.maximum(left, 1)
    return _sums(groups.queries[is_first], values, ranks.num_queries)


def graded_map_metric(ranks: GradedRanks) -> Float[np.ndarray, " q"]:
    """Average precision over the whole ranking; its mean over queries is MAP.

    `ap = Σ_i precision@rank_i / R` over the `R` relevant documents; unranked documents add 0.

    Args:
      ranks: ranks of the relevant documents.

    Returns:
      Values in [0, 1]; 0 for a query without a relevant document.
    """
    groups = _tie_groups(ranks)
    values = (groups.before + 1) / (groups.better + 1)
    for number in np.flatnonzero(groups.tied > 1):
        positions = np.arange(1, groups.tied[number] + 1)
        # The expected number of the tie's other relevant documents before this position.
        others = (groups.size[number] - 1) * (positions - 1) / (groups.tied[number] - 1)
        precision = (groups.before[number] + 1 + others) / (groups.better[number] + positions)
        values[number] = groups.size[number] * precision.mean()
    sums = _sums(groups.queries, values, ranks.num_queries)
    return _ratio(sums, _per_query(ranks, np.ones(len(ranks.queries))))


GRADED_METRICS: dict[str, Callable[[GradedRanks], Float[np.ndarray, " q"]]] = {
    **{f"ndcg@{cutoff}": partial(graded_ndcg_metric, cutoff=cutoff) for cutoff in CUTOFFS},
    **{f"mrr@{cutoff}": partial(graded_mrr_metric, cutoff=cutoff) for cutoff in CUTOFFS},
    **{f"recall@{cutoff}": partial(graded_recall_metric, cutoff=cutoff) for cutoff in CUTOFFS},
    **{
        f"precision@{cutoff}": partial(graded_precision_metric, cutoff=cutoff) for cutoff in CUTOFFS
    },
    "map": graded_map_metric,
}
"""Name -> function from ranks to one value per query."""


class _TieGroups(NamedTuple):
    """Groups of a query's relevant documents with equal scores, the highest score first.

    Attributes:
      queries, better, tied: as in `GradedRanks`.
      size: relevant documents in the group.
      before: relevant documents of the query with higher scores.
    """

    queries: Int[np.ndarray, " n"]
    better: Float[np.ndarray, " n"]
    tied: Int[np.ndarray, " n"]
    size: Int[np.ndarray, " n"]
    before: Int[np.ndarray, " n"]


def _tie_groups(ranks: GradedRanks) -> _TieGroups:
    order = np.lexsort((ranks.better, ranks.queries))
    order = order[np.isfinite(ranks.better[order])]
    queries, better = ranks.queries[order], ranks.better[order]
    is_start = np.ones(len(order), bool)
    is_start[1:] = (queries[1:] != queries[:-1]) | (better[1:] != better[:-1])
    starts = np.flatnonzero(is_start)
    return _TieGroups(
        queries=queries[starts],
        better=better[starts],
        tied=ranks.tied[order][starts],
        size=np.diff(starts, append=len(order)),
        before=starts - np.searchsorted(queries, queries[starts], side="left"),
    )


def _hits(ranks: GradedRanks, cutoff: int) -> Float[np.ndarray, " q"]:
    """The expected number of relevant documents among the first `cutoff`."""
    return _per_query(ranks, _mean_over_ties(ranks, np.arange(cutoff + 1.0)))


def _mean_over_ties(ranks: GradedRanks, sums: Float[np.ndarray, " k"]) -> Float[np.ndarray, " n"]:
    """For each document, the mean value of the positions that its tie occupies.

    Args:
      ranks: ranks of the documents.
      sums: sums of the values of the first 0, 1, … positions; later positions have the value 0.
    """
    last = len(sums) - 1
    start = np.minimum(ranks.better, last).astype(np.int64)
    end = np.minimum(ranks.better + ranks.tied, last).astype(np.int64)
    return (sums[end] - sums[start]) / ranks.tied


def _per_query(ranks: GradedRanks, values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " q"]:
    return _sums(ranks.queries, values, ranks.num_queries)


def _sums(
    queries: Int[np.ndarray, " n"], values: Float[np.ndarray, " n"], num_queries: int
) -> Float[np.ndarray, " q"]:
    sums = np.bincount(queries, weights=values, minlength=num_queries)
    return sums.astype(np.float64)  # without values, bincount returns integers


def _ratio(
    values: Float[np.ndarray, " q"], totals: Float[np.ndarray, " q"]
) -> Float[np.ndarray, " q"]:
    return np.divide(values, totals, out=np.zeros(len(values)), where=totals > 0)


def _checked(cutoff: int) -> int:
    if operator.index(cutoff) < 1:
        raise ValueError(f"cutoff={cutoff} is too small; use a cutoff of 1 or more")
    return cutoff
