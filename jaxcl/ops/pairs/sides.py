"""What the two sides of a pair matrix bring along, and the matrix that they describe."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxcl.ops.vectors import inner_products
from jaxcl.typing import Array, Bool, Float, Integer

__all__ = ["ALL_COUNT", "PairKeys", "PairLabels", "PairQueries", "pair_mask", "pair_scores"]


class PairLabels(NamedTuple):
    """One side's part in the question which pairs count. Both sides fill the same fields.

    A pair counts if all of these say so, and every pair counts if none is given.

    Attributes:
      different: labels by which the two must differ: row ids, groups. The first of one side is
        compared with the first of the other, and so on.
      equal: labels in which the two must agree.
      valid: `False` for padding.
      ceiling: the greatest similarity at which a pair counts; a side may leave it out.
      guide: embeddings whose similarity is held against the ceilings, in place of the pair's own.
    """

    different: tuple[Integer[Array, " r"], ...] = ()
    equal: tuple[Integer[Array, " r"], ...] = ()
    valid: Bool[Array, " r"] | None = None
    ceiling: Float[Array, " r"] | None = None
    guide: Float[Array, "r g"] | None = None


ALL_COUNT = PairLabels()
"""No labels: every pair counts."""


class PairQueries(NamedTuple):
    """The rows of a pair matrix.

    Attributes:
      vectors: one per row.
      scale: what a row's similarities are multiplied by: the inverse temperature.
      labels: which pairs count.
    """

    vectors: Float[Array, "q d"]
    scale: Float[Array, " q"]
    labels: PairLabels


class PairKeys(NamedTuple):
    """The columns of a pair matrix.

    Attributes:
      vectors: one per column.
      bias: what is added to a column's scores, in nats; `None` for nothing.
      labels: which pairs count.
    """

    vectors: Float[Array, "k d"]
    bias: Float[Array, " k"] | None
    labels: PairLabels


def pair_scores(
    queries: PairQueries, keys: PairKeys, *, hardness: float
) -> tuple[Float[Array, "q k"], Bool[Array, "q k"]]:
    r"""The scores of all pairs, $s_{ij} = a_i x_{ij} + b_j + \alpha \bar x_{ij}$, and which count.

    $x$ is the inner product, $\bar x$ the same as a constant, by which hard pairs weigh more.
    """
    similarity = inner_products(queries.vectors, keys.vectors)
    scores = similarity * queries.scale[:, None]
    if keys.bias is not None:
        scores += keys.bias
    if hardness:
        scores += hardness * lax.stop_gradient(similarity)
    return scores, pair_mask(queries.labels, keys.labels, lax.stop_gradient(similarity))


def pair_mask(
    queries: PairLabels, keys: PairLabels, similarity: Float[Array, "q k"]
) -> Bool[Array, "q k"]:
    """`True` where a pair counts."""
    mask = jnp.ones(similarity.shape, bool)
    for ours, theirs in zip(queries.different, keys.different, strict=True):
        mask &= ours[:, None] != theirs[None, :]
    for ours, theirs in zip(queries.equal, keys.equal, strict=True):
        mask &= ours[:, None] == theirs[None, :]
    if queries.valid is not None:
        mask &= queries.valid[:, None]
    if keys.valid is not None:
        mask &= keys.valid[None, :]
    if queries.guide is not None and keys.guide is not None:
        similarity = inner_products(queries.guide, keys.guide)
    if queries.ceiling is not None:
        mask &= similarity <= queries.ceiling[:, None]
    if keys.ceiling is not None:
        mask &= similarity <= keys.ceiling[None, :]
    return mask
