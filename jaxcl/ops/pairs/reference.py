"""The reference implementation, which stores all scores and is differentiated by JAX."""

import jax.numpy as jnp

from jaxcl.ops.pairs.reductions import Reduced, Reduction
from jaxcl.ops.pairs.sides import PairKeys, PairQueries, pair_scores

__all__ = ["reduce_pairs"]


def reduce_pairs(
    reduction: Reduction, queries: PairQueries, keys: PairKeys, *, hardness: float
) -> Reduced:
    """Reduce every row and every column of the matrix of scores."""
    scores, allowed = pair_scores(queries, keys, hardness=hardness)
    scores = jnp.where(allowed, scores, -jnp.inf)
    return reduction.reduce(scores, 1), reduction.reduce(scores, 0)
