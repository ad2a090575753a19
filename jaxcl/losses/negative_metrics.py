"""How many negatives a query had of each kind, and what they weighed."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.losses.beyond_batch import COUNT, SIMILARITY, Reduce, log_sum_exp, of_explicit, of_tiers
from jaxcl.losses.comparison import Comparison
from jaxcl.negatives.sets import OwnNegatives, SharedNegatives
from jaxcl.ops.vectors import inner_product
from jaxcl.typing import Array, AxisName, Bool, Float, Integer

__all__ = ["NegativeMetrics", "measure_negatives"]


class NegativeMetrics(NamedTuple):
    """Of each query, for one kind of its negatives.

    Attributes:
      counted: how many there were.
      masked: how many more there would have been without ids, groups and margins.
      similarity: the mean similarity of those that counted; 0 without any.
      share: their part of the softmax's sum, of which the positive has the rest.
    """

    counted: Float[Array, " q"]
    masked: Float[Array, " q"]
    similarity: Float[Array, " q"]
    share: Float[Array, " q"]


def measure_negatives(
    queries: Float[Array, "q d"],
    keys: Float[Array, "q d"],
    *,
    temperature: float | Float[Array, ""] | Float[Array, " q"] = 0.05,
    hardness: float = 0.0,
    negatives: Float[Array, "q n d"] | None = None,
    negative_ids: Integer[Array, "q n"] | None = None,
    negative_groups: Integer[Array, "q n"] | None = None,
    negatives_valid: Bool[Array, "q n"] | None = None,
    negative_guides: Float[Array, "q n g"] | None = None,
    negative_hardness: float = 0.0,
    tiers: Mapping[str, SharedNegatives | OwnNegatives] | None = None,
    ids: Integer[Array, " q"] | None = None,
    groups: Integer[Array, " q"] | None = None,
    valid: Bool[Array, " q"] | None = None,
    margin: float | None = None,
    relative_margin: float | None = None,
    guides: tuple[Float[Array, "q g"], Float[Array, "q g"]] | None = None,
    axis_name: AxisName | None = None,
    exchange: str = "gather",
    implementation: str | None = None,
) -> dict[str, NegativeMetrics]:
    """What each query's negatives in `infonce_loss` were, in its direction `"query_to_key"`.

    Arguments as there.

    Returns:
      `"batch"`, `"explicit"` if there are any, and each tier -> its part.

    Example:
      >>> import jax.numpy as jnp
      >>> batch = measure_negatives(jnp.eye(3), jnp.eye(3), groups=jnp.array([1, 1, 2]))["batch"]
      >>> batch.counted.tolist(), batch.masked.tolist()
      ([1.0, 1.0, 2.0], [1.0, 1.0, 0.0])
    """
    comparison = Comparison(
        ids, groups, valid, margin, relative_margin, guides, axis_name, exchange, implementation
    )
    explicit = None
    if negatives is not None:
        explicit = OwnNegatives(
            negatives, negative_ids, negative_groups, negatives_valid, negative_guides
        )
    unmasked = Comparison(None, None, valid, None, None, None, axis_name, exchange, implementation)
    reduce = log_sum_exp(temperature, hardness=hardness, own_hardness=negative_hardness)
    tiers = {} if tiers is None else tiers
    sums = _each(reduce, comparison, queries, keys, explicit, tiers)
    counted = _each(COUNT, comparison, queries, keys, explicit, tiers)
    similar = _each(SIMILARITY, comparison, queries, keys, explicit, tiers)
    bare = {name: theirs._replace(ids=None, groups=None) for name, theirs in tiers.items()}
    if explicit is not None:
        explicit = explicit._replace(ids=None, groups=None)
    present = _each(COUNT, unmasked, queries, keys, explicit, bare)
    positives = inner_product(queries, keys) / temperature
    everything = jax.scipy.special.logsumexp(jnp.stack([positives, *sums.values()]), axis=0)
    return {
        name: NegativeMetrics(
            counted=counted[name],
            masked=present[name] - counted[name],
            similarity=similar[name] / jnp.maximum(counted[name], 1),
            share=jnp.exp(sums[name] - everything),
        )
        for name in sums
    }


def _each(
    reduce: Reduce,
    comparison: Comparison,
    queries: Float[Array, "q d"],
    keys: Float[Array, "q d"],
    explicit: OwnNegatives | None,
    tiers: Mapping[str, SharedNegatives | OwnNegatives],
) -> dict[str, Float[Array, " q"]]:
    """One number of each query's negatives, by their kind."""
    to_keys = ("query_to_key",)
    found = {"batch": comparison.reduced(reduce.pairs, queries, keys, to_keys)["query_to_key"]}
    if explicit is not None:
        theirs = of_explicit(reduce, comparison, queries, keys, explicit, directions=to_keys)
        found["explicit"] = theirs["query_to_key"]
    return found | of_tiers(reduce, comparison, queries, keys, tiers)
