"""Negatives from outside of the batch: explicit negatives and tiers."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxcl.losses.comparison import Comparison, own_products
from jaxcl.negatives.masks import batch_labels
from jaxcl.negatives.sets import OwnNegatives, SharedNegatives
from jaxcl.ops.pairs import PairLabels, pair_count, pair_logsumexp, pair_sum
from jaxcl.ops.pairs.reductions import LOGSUMEXP
from jaxcl.typing import Array, Bool, Float

__all__ = [
    "COUNT",
    "SIMILARITY",
    "Reduce",
    "check_explicit",
    "log_sum_exp",
    "of_explicit",
    "of_tiers",
]


class Reduce(NamedTuple):
    """A reduction of each row's negatives to one number.

    Attributes:
      pairs: an operation of `jaxcl.ops.pairs`, for negatives that all rows share.
      own: the same for separate negatives of each row: (similarities `[q, n]`, mask) -> values.
      join: (values, values) -> values of both parts together.
    """

    pairs: Callable[..., tuple[Array, Array]]
    own: Callable[[Array, Array], Array]
    join: Callable[[Array, Array], Array]


def log_sum_exp(temperature: float | Array, *, hardness: float, own_hardness: float) -> Reduce:
    """The log-sum-exp of each row's scores, in nats; −∞ for no negatives."""

    def own(similarities: Float[Array, "q n"], counted: Bool[Array, "q n"]) -> Float[Array, " q"]:
        scores = similarities / jnp.reshape(jnp.asarray(temperature), (-1, 1))  # for all or by row
        scores += own_hardness * lax.stop_gradient(similarities)
        return LOGSUMEXP.reduce(jnp.where(counted, scores, -jnp.inf), 1)

    pairs = functools.partial(pair_logsumexp, temperature=temperature, hardness=hardness)
    return Reduce(pairs, own, jnp.logaddexp)


COUNT = Reduce(
    pair_count, lambda similarities, counted: counted.sum(1).astype(similarities.dtype), jnp.add
)
"""The number of allowed negatives."""

SIMILARITY = Reduce(
    functools.partial(pair_sum, temperature=1.0),
    lambda similarities, counted: jnp.where(counted, similarities, 0).sum(1),
    jnp.add,
)
"""The sum of the allowed negatives' similarities."""


def of_explicit(
    reduce: Reduce,
    comparison: Comparison,
    queries: Float[Array, "q d"],
    keys: Float[Array, "q d"],
    negatives: OwnNegatives,
    *,
    directions: tuple[str, ...],
) -> dict[str, Float[Array, " q"]]:
    """Reduce all rows' explicit negatives, for the directions with keys as candidates."""
    if not {"query_to_key", "key_to_key"} & set(directions):
        raise ValueError(f"negatives are keys, and nobody looks for one in {directions}")
    ceilings = comparison.ceilings(queries, keys)
    query_guide, key_guide = (None, None) if comparison.guides is None else comparison.guides
    found = {
        direction: _of_other_rows(reduce, comparison, rows, guide, negatives, ceilings)
        for direction, rows, guide in (
            ("query_to_key", queries, query_guide),
            ("key_to_key", keys, key_guide),
        )
        if direction in directions
    }
    # Explicit negatives belong to queries; keys have none. A query's own are reduced separately,
    # since their hardness may differ from that of other rows' negatives.
    if "query_to_key" in found:
        own = _of_own(reduce, comparison, queries, negatives, ceilings)
        found["query_to_key"] = reduce.join(found["query_to_key"], own)
    return found


def of_tiers(
    reduce: Reduce,
    comparison: Comparison,
    queries: Float[Array, "q d"],
    keys: Float[Array, "q d"],
    tiers: Mapping[str, SharedNegatives | OwnNegatives],
) -> dict[str, Float[Array, " q"]]:
    """Reduce each tier's keys for this device's queries."""
    ceilings = comparison.ceilings(queries, keys)
    found = {}
    for name, negatives in tiers.items():
        if negatives.vectors.shape[-1] != queries.shape[1]:
            raise ValueError(
                f"the tier {name!r} has {negatives.vectors.shape[-1]} features, and the batch "
                f"{queries.shape[1]}"
            )
        if negatives.ids is not None and comparison.ids is None:
            raise ValueError(f"the tier {name!r} has ids, compared with ids, the rows'; give both")
        if comparison.guides is not None and negatives.guides is None:
            raise ValueError(f"guides judge all negatives, but the tier {name!r} has no guides")
        if isinstance(negatives, OwnNegatives):
            found[name] = _of_own(reduce, comparison, queries, negatives, ceilings)
        else:
            found[name] = _of_shared(reduce, comparison, queries, negatives, ceilings)
    return found


def check_explicit(
    comparison: Comparison, negatives: OwnNegatives, queries: Float[Array, "q d"]
) -> None:
    """Raise a `ValueError` for explicit negatives that do not fit these rows."""
    (rows, width), shape = queries.shape, negatives.vectors.shape
    if shape[0] != rows or shape[2] != width:
        raise ValueError(
            f"negatives have the shape {shape}; wanted are ({rows}, any number, {width})"
        )
    for name, array in (
        ("negative_ids", negatives.ids),
        ("negative_groups", negatives.groups),
        ("negatives_valid", negatives.valid),
        ("negative_guides", negatives.guides),
    ):
        if array is not None and array.shape[:2] != shape[:2]:
            raise ValueError(f"{name} have the shape {array.shape}, not {shape[:2]}")
    if (negatives.guides is None) != (comparison.guides is None):
        raise ValueError("guides judge explicit negatives by negative_guides; give both")
    if negatives.ids is not None and comparison.ids is None:
        raise ValueError("negative_ids are compared with ids, the rows' own; give both")
    if negatives.groups is not None and comparison.groups is None:
        raise ValueError("negative_groups are compared with groups, the rows'; give both")


def _of_other_rows(
    reduce: Reduce,
    comparison: Comparison,
    rows: Float[Array, "q d"],
    guide: Float[Array, "q g"] | None,
    negatives: OwnNegatives,
    ceilings: Float[Array, " q"] | None,
) -> Float[Array, " q"]:
    """Reduce, for each row, the explicit negatives of all other rows."""
    num_rows, width = negatives.vectors.shape[:2]
    (place,) = batch_labels(num_rows, axis_name=comparison.axis_name).different
    valid = jnp.ones((num_rows, width), bool) if negatives.valid is None else negatives.valid
    if comparison.valid is not None:
        valid &= comparison.valid[:, None]  # padding brings no negatives for others
    flat = SharedNegatives(
        vectors=negatives.vectors.reshape(-1, negatives.vectors.shape[-1]),
        ids=None if negatives.ids is None else negatives.ids.ravel(),
        groups=None if negatives.groups is None else negatives.groups.ravel(),
        valid=valid.ravel(),
    )
    ours, theirs = _labels(comparison, flat, ceilings)
    # The row's place in the global batch excludes its own negatives, which the caller adds.
    ours = ours._replace(different=(place, *ours.different))
    theirs = theirs._replace(different=(jnp.repeat(place, width), *theirs.different))
    if guide is not None and negatives.guides is not None:
        ours = ours._replace(guide=lax.stop_gradient(guide))
        guides = negatives.guides.reshape(-1, guide.shape[-1])
        theirs = theirs._replace(guide=lax.stop_gradient(guides))
    found, _ = reduce.pairs(
        rows, flat.vectors, query_labels=ours, key_labels=theirs, **comparison.how()
    )
    return found


def _of_own(
    reduce: Reduce,
    comparison: Comparison,
    queries: Float[Array, "q d"],
    negatives: OwnNegatives,
    ceilings: Float[Array, " q"] | None,
) -> Float[Array, " q"]:
    """Reduce each query's separate negatives."""
    similarities = own_products(queries, negatives.vectors.astype(queries.dtype))
    counted = jnp.ones(similarities.shape, bool)
    if negatives.valid is not None:
        counted &= negatives.valid
    for ours, theirs in _compared(comparison, negatives):
        counted &= theirs != ours[:, None]
    if ceilings is not None:
        judged = lax.stop_gradient(similarities)
        if comparison.guides is not None and negatives.guides is not None:
            judged = own_products(comparison.guides[0], negatives.guides)
        counted &= judged <= ceilings[:, None]
    if comparison.valid is not None:
        counted &= comparison.valid[:, None]
    return reduce.own(similarities, counted)


def _of_shared(
    reduce: Reduce,
    comparison: Comparison,
    queries: Float[Array, "q d"],
    negatives: SharedNegatives,
    ceilings: Float[Array, " q"] | None,
) -> Float[Array, " q"]:
    """Reduce, for each query, the shared negatives of all devices.

    If there are more negatives than queries, the negatives are the rows of the product and stay on
    their devices; only the queries, its columns, are exchanged.
    """
    ours, theirs = _labels(comparison, negatives, ceilings)
    if comparison.guides is not None:
        ours = ours._replace(guide=lax.stop_gradient(comparison.guides[0]))
        theirs = theirs._replace(guide=negatives.guides)
    vectors = negatives.vectors.astype(queries.dtype)
    if vectors.shape[0] <= queries.shape[0] or _by_row(reduce):
        found, _ = reduce.pairs(
            queries, vectors, query_labels=ours, key_labels=theirs, **comparison.how()
        )
    else:
        _, found = reduce.pairs(
            vectors, queries, query_labels=theirs, key_labels=ours, **comparison.how()
        )
    return found


def _by_row(reduce: Reduce) -> bool:
    """Whether temperatures are per row, which columns of a product cannot have."""
    keywords = getattr(reduce.pairs, "keywords", {})
    return jnp.ndim(keywords.get("temperature", 0.0)) > 0


def _labels(
    comparison: Comparison, negatives: SharedNegatives, ceilings: Float[Array, " q"] | None
) -> tuple[PairLabels, PairLabels]:
    compared = _compared(comparison, negatives)
    return (
        PairLabels(tuple(ours for ours, _ in compared), valid=comparison.valid, ceiling=ceilings),
        PairLabels(tuple(theirs for _, theirs in compared), valid=negatives.valid),
    )


def _compared(
    comparison: Comparison, negatives: SharedNegatives | OwnNegatives
) -> list[tuple[Array, Array]]:
    """Pairs of row labels and negatives' labels that must differ, where both sides have them."""
    pairs = ((comparison.ids, negatives.ids), (comparison.groups, negatives.groups))
    return [(ours, theirs) for ours, theirs in pairs if ours is not None and theirs is not None]
