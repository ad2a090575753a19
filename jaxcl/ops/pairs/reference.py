"""The definition: the whole matrix, its gradient left to JAX."""

import jax.numpy as jnp

from jaxcl.ops.pairs.reductions import Reduction
from jaxcl.ops.pairs.sides import PairKeys, PairQueries, pair_scores
from jaxcl.typing import Array, Float

__all__ = ["reduce_pairs"]


def reduce_pairs(
    reduction: Reduction, queries: PairQueries, keys: PairKeys, *, hardness: float
) -> tuple[Float[Array, " q"], Float[Array, " k"]]:
    """Reduces every row and every column of the matrix of scores."""
    scores, counted = pair_scores(queries, keys, hardness=hardness)
    scores = jnp.where(counted, scores, -jnp.inf)
    return reduction.reduce(scores, 1), reduction.reduce(scores, 0)
