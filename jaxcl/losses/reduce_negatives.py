"""Reduce each row's negatives, from the batch and from outside it, to one number."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxcl.losses.comparison import Comparison
from jaxcl.losses.protocol import Masks, NegativesByName
from jaxcl.negatives.masks import batch_labels
from jaxcl.negatives.sets import ExplicitNegatives, Negatives, OwnNegatives, SharedNegatives
from jaxcl.ops.arguments import as_vectors, label_fields
from jaxcl.ops.pairs import PairLabels, pair_count, pair_logsumexp, pair_sum
from jaxcl.ops.pairs.reductions import LOGSUMEXP, log_add_exp
from jaxcl.typing import Array, Bool, Float

__all__ = [
    "COUNT",
    "SIMILARITY",
    "Reduce",
    "log_sum_exp",
    "own_products",
    "reduce_all",
    "reduce_outside",
]


class Reduce(NamedTuple):
    """A reduction of each row's negatives to one number.

    Attributes:
      pairs: an operation of `jaxcl.ops.pairs`, for negatives that all rows share.
      own: the same reduction of each row's separate negatives: (similarities `[q, n]`, mask) ->
        values.
      join: (values, values) -> the values of both parts combined.
      by_row: whether `pairs` treats rows differently, such as with a temperature per row, and so
        cannot return one value per column.
    """

    pairs: Callable[..., tuple[Array, Array]]
    own: Callable[[Array, Array], Array]
    join: Callable[[Array, Array], Array]
    by_row: bool = False


def log_sum_exp(
    temperature: float | Array, *, hardness: float = 0.0, own_hardness: float = 0.0
) -> Reduce:
    """The log-sum-exp of each row's scores, in nats; −∞ for no negatives."""

    def own(similarities: Float[Array, "q n"], allowed: Bool[Array, "q n"]) -> Float[Array, " q"]:
        scores = similarities / jnp.reshape(jnp.asarray(temperature), (-1, 1))  # scalar, or per row
        scores += own_hardness * lax.stop_gradient(similarities)
        return LOGSUMEXP.reduce(jnp.where(allowed, scores, -jnp.inf), 1)

    pairs = functools.partial(pair_logsumexp, temperature=temperature, hardness=hardness)
    return Reduce(pairs, own, log_add_exp, by_row=jnp.ndim(temperature) > 0)


COUNT = Reduce(
    pair_count, lambda similarities, allowed: allowed.sum(1).astype(similarities.dtype), jnp.add
)
"""The number of allowed negatives."""

SIMILARITY = Reduce(
    functools.partial(pair_sum, temperature=1.0),
    lambda similarities, allowed: jnp.where(allowed, similarities, 0).sum(1),
    jnp.add,
)
"""The sum of the allowed negatives' similarities."""


def reduce_all(
    reduce: Reduce,
    comparison: Comparison,
    negatives: NegativesByName | None,
    *,
    directions: tuple[str, ...],
) -> dict[str, Float[Array, " q"]]:
    """Reduce negatives from the batch and from outside it together, for each direction."""
    total = comparison.reduced(reduce.pairs, directions)
    outside = reduce_outside(reduce, comparison, negatives or {}, directions=directions)
    for by_direction in outside.values():
        for direction, values in by_direction.items():
            total[direction] = reduce.join(total[direction], values)
    return total


def reduce_outside(
    reduce: Reduce,
    comparison: Comparison,
    negatives: NegativesByName,
    *,
    directions: tuple[str, ...],
) -> dict[str, dict[str, Float[Array, " q"]]]:
    """Reduce the negatives from outside the batch: name -> direction -> values.

    They are all keys, so they serve only the directions with keys as candidates.

    Raises:
      ValueError: if negatives do not match the batch, or no direction can use them.
    """
    ceilings = comparison.ceilings() if negatives else None
    reduced: dict[str, dict[str, Float[Array, " q"]]] = {}
    for name, tier in negatives.items():
        axes = 2 if isinstance(tier, SharedNegatives) else 3
        vectors = as_vectors(f"negatives[{name!r}]", tier.vectors, axes=axes)
        tier = tier._replace(vectors=vectors, **label_fields(f"negatives[{name!r}]", tier))
        _check(name, tier, comparison, directions)
        if isinstance(tier, ExplicitNegatives):
            reduced[name] = _of_explicit(reduce, comparison, tier, ceilings, directions=directions)
        elif isinstance(tier, OwnNegatives):
            values = _of_own(reduce, comparison, tier, ceilings)
            reduced[name] = {"query_to_key": values}
        else:
            values = _of_shared(reduce, comparison, tier, ceilings)
            reduced[name] = {"query_to_key": values}
    return reduced


def own_products(rows: Float[Array, "q d"], vectors: Float[Array, "q n d"]) -> Float[Array, "q n"]:
    """The inner products of each row with its own vectors, summed in float32 or wider."""
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    return jnp.einsum("qd,qnd->qn", rows, vectors, preferred_element_type=wide)


def _check(
    name: str, negatives: Negatives, comparison: Comparison, directions: tuple[str, ...]
) -> None:
    masks = comparison.masks
    rows, width = comparison.queries.shape
    shape = negatives.vectors.shape
    explicit = isinstance(negatives, ExplicitNegatives)
    anchors = {"query_to_key", "key_to_key"} if explicit else {"query_to_key"}
    if not anchors & set(directions):
        raise ValueError(
            f"negatives[{name!r}] are keys, but {directions} has no direction that uses them; add "
            f"{' or '.join(sorted(anchors))}"
        )
    axes = 1 if isinstance(negatives, SharedNegatives) else 2
    if len(shape) != axes + 1 or shape[-1] != width or (axes == 2 and shape[0] != rows):
        expected = f"(any number, {width})" if axes == 1 else f"({rows}, any number, {width})"
        raise ValueError(f"negatives[{name!r}] have the shape {shape}; expected {expected}")
    for field in ("ids", "groups", "valid", "guides"):
        array = getattr(negatives, field)
        if array is not None and array.shape[:axes] != shape[:axes]:
            raise ValueError(
                f"negatives[{name!r}].{field} have the shape {array.shape}, not {shape[:axes]}"
            )
    if masks.guides is not None and negatives.guides is None:
        raise ValueError(
            f"masks.guides are given, but negatives[{name!r}] have no guides; give both"
        )
    if explicit and masks.guides is None and negatives.guides is not None:
        raise ValueError(f"negatives[{name!r}] have guides, but masks.guides are None; give both")
    # A memory bank always has groups, even if a loss does not mask by them; explicit negatives
    # have groups only for masking.
    for field in ("ids", "groups") if explicit else ("ids",):
        if getattr(negatives, field) is not None and getattr(masks, field) is None:
            raise ValueError(
                f"negatives[{name!r}].{field} need masks.{field} to compare with; give both"
            )


def _of_explicit(
    reduce: Reduce,
    comparison: Comparison,
    negatives: ExplicitNegatives,
    ceilings: Float[Array, " q"] | None,
    *,
    directions: tuple[str, ...],
) -> dict[str, Float[Array, " q"]]:
    """Reduce the explicit negatives of all rows, for the directions with keys as candidates."""
    guides = comparison.masks.guides
    query_guide, key_guide = (None, None) if guides is None else guides
    values = {
        direction: _of_other_rows(reduce, comparison, rows, guide, negatives, ceilings)
        for direction, rows, guide in (
            ("query_to_key", comparison.queries, query_guide),
            ("key_to_key", comparison.keys, key_guide),
        )
        if direction in directions
    }
    # Explicit negatives belong to queries, not to keys. A query's own negatives are reduced
    # separately, since their hardness may differ from that of other rows' negatives.
    if "query_to_key" in values:
        own = _of_own(reduce, comparison, negatives, ceilings)
        values["query_to_key"] = reduce.join(values["query_to_key"], own)
    return values


def _of_other_rows(
    reduce: Reduce,
    comparison: Comparison,
    rows: Float[Array, "q d"],
    guide: Float[Array, "q g"] | None,
    negatives: ExplicitNegatives,
    ceilings: Float[Array, " q"] | None,
) -> Float[Array, " q"]:
    """Reduce, for each row, the explicit negatives of all other rows."""
    num_rows, width = negatives.vectors.shape[:2]
    (position,) = batch_labels(num_rows, axis_name=comparison.axis_name).different
    valid = jnp.ones((num_rows, width), bool) if negatives.valid is None else negatives.valid
    if comparison.masks.valid is not None:
        valid &= comparison.masks.valid[:, None]  # negatives of padding rows are not used
    flat = SharedNegatives(
        vectors=negatives.vectors.reshape(-1, negatives.vectors.shape[-1]),
        ids=None if negatives.ids is None else negatives.ids.ravel(),
        groups=None if negatives.groups is None else negatives.groups.ravel(),
        valid=valid.ravel(),
    )
    row_labels, negative_labels = _labels(comparison.masks, flat, ceilings)
    # The position in the global batch excludes a row's own negatives, which the caller adds.
    row_labels = row_labels._replace(different=(position, *row_labels.different))
    negative_labels = negative_labels._replace(
        different=(jnp.repeat(position, width), *negative_labels.different)
    )
    if guide is not None and negatives.guides is not None:
        row_labels = row_labels._replace(guide=lax.stop_gradient(guide))
        guides = negatives.guides.reshape(-1, guide.shape[-1])
        negative_labels = negative_labels._replace(guide=lax.stop_gradient(guides))
    values, _ = reduce.pairs(
        rows,
        flat.vectors,
        query_labels=row_labels,
        key_labels=negative_labels,
        **comparison.reduction_options(),
    )
    return values


def _of_own(
    reduce: Reduce,
    comparison: Comparison,
    negatives: ExplicitNegatives | OwnNegatives,
    ceilings: Float[Array, " q"] | None,
) -> Float[Array, " q"]:
    """Reduce each query's separate negatives."""
    queries, masks = comparison.queries, comparison.masks
    similarities = own_products(queries, negatives.vectors.astype(queries.dtype))
    allowed = jnp.ones(similarities.shape, bool)
    if negatives.valid is not None:
        allowed &= negatives.valid
    for query_labels, negative_labels in _compared(masks, negatives):
        allowed &= negative_labels != query_labels[:, None]
    if ceilings is not None:
        compared = lax.stop_gradient(similarities)
        if masks.guides is not None and negatives.guides is not None:
            compared = own_products(masks.guides[0], negatives.guides)
        allowed &= compared <= ceilings[:, None]
    if masks.valid is not None:
        allowed &= masks.valid[:, None]
    return reduce.own(similarities, allowed)


def _of_shared(
    reduce: Reduce,
    comparison: Comparison,
    negatives: SharedNegatives,
    ceilings: Float[Array, " q"] | None,
) -> Float[Array, " q"]:
    """Reduce, for each query, the shared negatives of all devices.

    If there are more negatives than queries, the negatives are the rows of the matrix product and
    stay in place, and devices exchange only the queries, which are the columns.
    """
    queries = comparison.queries
    query_labels, negative_labels = _labels(comparison.masks, negatives, ceilings)
    if comparison.masks.guides is not None:
        query_labels = query_labels._replace(guide=lax.stop_gradient(comparison.masks.guides[0]))
        negative_labels = negative_labels._replace(guide=negatives.guides)
    vectors = negatives.vectors.astype(queries.dtype)
    if vectors.shape[0] <= queries.shape[0] or reduce.by_row:
        values, _ = reduce.pairs(
            queries,
            vectors,
            query_labels=query_labels,
            key_labels=negative_labels,
            **comparison.reduction_options(),
        )
    else:
        _, values = reduce.pairs(
            vectors,
            queries,
            query_labels=negative_labels,
            key_labels=query_labels,
            **comparison.reduction_options(),
        )
    return values


def _labels(
    masks: Masks, negatives: SharedNegatives, ceilings: Float[Array, " q"] | None
) -> tuple[PairLabels, PairLabels]:
    compared = _compared(masks, negatives)
    return (
        PairLabels(tuple(labels for labels, _ in compared), valid=masks.valid, ceiling=ceilings),
        PairLabels(tuple(labels for _, labels in compared), valid=negatives.valid),
    )


def _compared(masks: Masks, negatives: Negatives) -> list[tuple[Array, Array]]:
    """The labels in which a row and its negatives must differ, for each kind that both have."""
    pairs = ((masks.ids, negatives.ids), (masks.groups, negatives.groups))
    return [
        (row_labels, negative_labels)
        for row_labels, negative_labels in pairs
        if row_labels is not None and negative_labels is not None
    ]
