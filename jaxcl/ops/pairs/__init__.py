"""Reductions of the scores between queries and keys, without storing the full matrix."""

from jaxcl.ops.pairs.reduce import (
    EXCHANGES,
    IMPLEMENTATIONS,
    pair_count,
    pair_logsumexp,
    pair_softplus,
    pair_sum,
)
from jaxcl.ops.pairs.sides import Labels, PairLabels

__all__ = [
    "EXCHANGES",
    "IMPLEMENTATIONS",
    "Labels",
    "PairLabels",
    "pair_count",
    "pair_logsumexp",
    "pair_softplus",
    "pair_sum",
]
