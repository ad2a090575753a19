"""Reductions of a matrix of scores between queries and keys that never exists as a whole."""

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
