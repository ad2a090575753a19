"""What the two sides of a pair matrix bring along, and the matrix that they describe."""

import itertools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.ops.vectors import inner_products
from jaxcl.typing import Array, Bool, Float, Integer, PyTree

__all__ = [
    "ALL_COUNT",
    "Labels",
    "PairKeys",
    "PairLabels",
    "PairQueries",
    "as_columns",
    "as_rows",
    "block_scores",
    "pair_scores",
]

Labels: TypeAlias = Integer[Array, " r"] | Integer[Array, "r s"]
"""One label per row, or several."""


class PairLabels(NamedTuple):
    """One side's part in the question which pairs count. Both sides fill the same fields.

    A pair counts if all of these say so, and every pair counts if none is given.

    Attributes:
      different: labels by which the two must differ: row ids, groups. The first of one side is
        compared with the first of the other, and so on. A row may have several labels, `[r, s]`,
        filled up with negative ones: two rows then agree if they have one in common.
      equal: labels in which the two must agree.
      valid: `False` for padding.
      ceiling: the greatest similarity at which a pair counts; a side may leave it out.
      guide: embeddings whose similarity is held against the ceilings, in place of the pair's own.
    """

    different: tuple[Labels, ...] = ()
    equal: tuple[Labels, ...] = ()
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
    return block_scores(as_columns(queries), as_rows(keys), hardness=hardness)


def as_columns(queries: PairQueries) -> PairQueries:
    """The same with one row per query in every array: all but vectors and guide are `[q, s]`."""
    return _shaped(queries, lambda rows: rows[:, None] if rows.ndim == 1 else rows)


def as_rows(keys: PairKeys) -> PairKeys:
    """The same with one column per key in every array but vectors and guide: `[t, k]`."""
    return _shaped(keys, lambda rows: rows[None, :] if rows.ndim == 1 else rows.T)


def block_scores(
    columns: PairQueries, rows: PairKeys, *, hardness: float
) -> tuple[Float[Array, "q k"], Bool[Array, "q k"]]:
    """`pair_scores` of sides that `as_columns` and `as_rows` have shaped: broadcasts alone."""
    similarity = inner_products(columns.vectors, rows.vectors)
    constant = lax.stop_gradient(similarity)
    scores = similarity * columns.scale
    if rows.bias is not None:
        scores += rows.bias
    if hardness:
        scores += hardness * constant
    return scores, _mask(columns.labels, rows.labels, constant)


def _shaped(side: PyTree, shape: Callable[[Array], Array]) -> PyTree:
    shaped = jax.tree.map(shape, side)
    labels = shaped.labels._replace(guide=side.labels.guide)
    return shaped._replace(vectors=side.vectors, labels=labels)


def _mask(
    columns: PairLabels, rows: PairLabels, similarity: Float[Array, "q k"]
) -> Bool[Array, "q k"]:
    mask = jnp.ones(similarity.shape, bool)
    for ours, theirs in zip(columns.different, rows.different, strict=True):
        mask &= ~_agree(ours, theirs)
    for ours, theirs in zip(columns.equal, rows.equal, strict=True):
        mask &= _agree(ours, theirs)
    for valid in (columns.valid, rows.valid):
        if valid is not None:
            mask &= valid
    if columns.guide is not None and rows.guide is not None:
        similarity = inner_products(columns.guide, rows.guide)
    for ceiling in (columns.ceiling, rows.ceiling):
        if ceiling is not None:
            mask &= similarity <= ceiling
    return mask


def _agree(ours: Integer[Array, "q s"], theirs: Integer[Array, "t k"]) -> Bool[Array, "q k"]:
    """Which pairs have a label in common."""
    num_ours, num_theirs = ours.shape[1], theirs.shape[0]
    if num_ours == num_theirs == 1:
        return ours == theirs
    agree = jnp.zeros((ours.shape[0], theirs.shape[1]), bool)
    for i, j in itertools.product(range(num_ours), range(num_theirs)):
        ours_i = ours[:, i : i + 1]
        agree |= (ours_i == theirs[j : j + 1]) & (ours_i >= 0)
    return agree
