"""The two sides of a pair matrix, and the scores and the mask that follow from them."""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.ops.arguments import as_labels
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
    "checked_labels",
    "pair_scores",
]

Labels: TypeAlias = Integer[Array, " r"] | Integer[Array, "r s"]
"""One label per row, or several."""


class PairLabels(NamedTuple):
    """One side's labels, which decide which pairs are allowed. Both sides fill the same fields.

    A pair is allowed if it passes all tests; without labels, every pair is allowed.

    Attributes:
      different: labels that must differ, such as row ids and groups. The queries' n-th label is
        compared with the keys' n-th label. A row may have several labels, `[r, s]`, padded with
        negative labels; two rows then match if they share any label.
      equal: labels that must be equal, compared in the same way.
      valid: `False` for padding.
      ceiling: the maximum similarity of an allowed pair; each side may omit it.
      guide: embeddings whose similarity is compared with the ceilings instead of the similarity of
        the pair's vectors.
    """

    different: tuple[Labels, ...] = ()
    equal: tuple[Labels, ...] = ()
    valid: Bool[Array, " r"] | None = None
    ceiling: Float[Array, " r"] | None = None
    guide: Float[Array, "r g"] | None = None


ALL_COUNT = PairLabels()
"""No labels: every pair is allowed."""


class PairQueries(NamedTuple):
    """The rows of a pair matrix.

    Attributes:
      vectors: one per row.
      scale: the factor of a row's similarities, which is the inverse temperature.
      labels: the rows' labels.
    """

    vectors: Float[Array, "q d"]
    scale: Float[Array, " q"]
    labels: PairLabels


class PairKeys(NamedTuple):
    """The columns of a pair matrix.

    Attributes:
      vectors: one per column.
      bias: an offset of a column's scores, in nats; `None` for none.
      labels: the columns' labels.
    """

    vectors: Float[Array, "k d"]
    bias: Float[Array, " k"] | None
    labels: PairLabels


def checked_labels(name: str, labels: PairLabels) -> PairLabels:
    """Convert one side's labels to int32; `as_labels` documents the errors."""
    return labels._replace(
        different=tuple(as_labels(f"{name}.different", label) for label in labels.different),
        equal=tuple(as_labels(f"{name}.equal", label) for label in labels.equal),
    )


def pair_scores(
    queries: PairQueries, keys: PairKeys, *, hardness: float
) -> tuple[Float[Array, "q k"], Bool[Array, "q k"]]:
    r"""The scores $s_{ij} = a_i x_{ij} + b_j + \alpha \bar x_{ij}$ and the mask of allowed pairs.

    $x$ is the inner product; $\bar x$ is the same without gradient, and gives hard pairs more
    weight.
    """
    columns, rows = as_columns(queries), as_rows(keys)
    similarity = inner_products(queries.vectors, keys.vectors)
    guided = None
    if queries.labels.guide is not None and keys.labels.guide is not None:
        guided = inner_products(queries.labels.guide, keys.labels.guide)
    # For hardness weights and ceilings, which must not contribute to the gradient.
    constant = lax.stop_gradient(similarity)
    return block_scores(similarity, constant, guided, columns, rows, hardness=hardness)


def as_columns(queries: PairQueries) -> PairQueries:
    """Drop the queries' vectors and guides, and reshape all other arrays to `[q, 1]`.

    Labels become tuples with one array per label of a row.
    """
    return _shaped(queries, lambda rows: rows[:, None])


def as_rows(keys: PairKeys) -> PairKeys:
    """Drop the keys' vectors and guides, and reshape all other arrays to `[1, k]`.

    Labels become tuples with one array per label of a row.
    """
    return _shaped(keys, lambda rows: rows[None, :])


def block_scores(
    similarity: Float[Array, "q k"],
    constant: Float[Array, "q k"],
    guided: Float[Array, "q k"] | None,
    columns: PairQueries,
    rows: PairKeys,
    *,
    hardness: float,
) -> tuple[Float[Array, "q k"], Bool[Array, "q k"]]:
    """Compute `pair_scores` from inner products and the results of `as_columns` and `as_rows`.

    This only broadcasts, so that kernels can use it on a tile. `constant` is the similarity without
    gradient, `guided` the similarity of the guides.
    """
    scores = similarity * columns.scale
    if rows.bias is not None:
        scores += rows.bias
    if hardness:
        scores += hardness * constant
    return scores, _mask(columns.labels, rows.labels, constant if guided is None else guided)


def _shaped(side: PyTree, shape: Callable[[Array], Array]) -> PyTree:
    labels = side.labels
    sets = {
        name: tuple(_columns_of(label) for label in getattr(labels, name))
        for name in ("different", "equal")
    }
    rest = side._replace(vectors=None, labels=labels._replace(guide=None, **sets))
    return jax.tree.map(shape, rest)


def _columns_of(label: Labels) -> tuple[Array, ...]:
    if label.ndim == 1:
        return (label,)
    columns = tuple(label.T)
    # `[r, 1]` differs from `[r]`: its negative labels are padding, which `_agree` only ignores in
    # tuples of several labels.
    return columns if len(columns) > 1 else (*columns, jnp.full_like(columns[0], -1))


def _mask(
    columns: PairLabels, rows: PairLabels, similarity: Float[Array, "q k"]
) -> Bool[Array, "q k"]:
    parts = [
        *(~_agree(*both) for both in zip(columns.different, rows.different, strict=True)),
        *(_agree(*both) for both in zip(columns.equal, rows.equal, strict=True)),
        *(valid for valid in (columns.valid, rows.valid) if valid is not None),
        *(similarity <= side.ceiling for side in (columns, rows) if side.ceiling is not None),
    ]
    return functools.reduce(jnp.logical_and, parts, jnp.ones(similarity.shape, bool))


def _agree(column_labels: PyTree, row_labels: PyTree) -> Bool[Array, "..."]:
    """Whether the two sides of each pair share a label, from tuples of columns and of rows."""
    if len(column_labels) == len(row_labels) == 1:
        return column_labels[0] == row_labels[0]
    pairs = itertools.product(column_labels, row_labels)
    return functools.reduce(jnp.logical_or, ((a == b) & (a >= 0) for a, b in pairs))
