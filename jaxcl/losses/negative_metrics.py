"""The number of each query's negatives, and their weight in the loss, by kind."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.losses.comparison import Comparison, checked_batch
from jaxcl.losses.protocol import NO_MASKS, Masks, NegativesByName
from jaxcl.losses.reduce_negatives import COUNT, SIMILARITY, Reduce, log_sum_exp, reduce_outside
from jaxcl.ops.arguments import check_numbers
from jaxcl.ops.vectors import inner_product
from jaxcl.typing import Array, AxisName, Float, Range

__all__ = ["NegativeMetrics", "measure_negatives"]

_TO_KEYS = ("query_to_key",)


class NegativeMetrics(NamedTuple):
    """Metrics of each query's negatives of one kind.

    Attributes:
      counted: number of allowed negatives.
      masked: number of negatives masked by ids, groups or margins.
      similarity: mean similarity of the allowed negatives; 0 if there are none.
      share: the share of these negatives in the softmax's sum over all kinds and the positive.
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
    negative_hardness: float = 0.0,
    masks: Masks = NO_MASKS,
    negatives: NegativesByName | None = None,
    axis_name: AxisName | None = None,
    exchange: str = "gather",
    implementation: str | None = None,
) -> dict[str, NegativeMetrics]:
    """Measure each query's negatives in the direction `"query_to_key"` of `infonce_loss`.

    Arguments as for `infonce_loss`.

    Returns:
      The metrics of in-batch negatives as `"batch"`, and of each set in `negatives` by its name.

    Example:
      >>> import jax.numpy as jnp
      >>> masks = Masks(groups=jnp.array([1, 1, 2]))
      >>> batch = measure_negatives(jnp.eye(3), jnp.eye(3), masks=masks)["batch"]
      >>> batch.counted.tolist(), batch.masked.tolist()
      ([1.0, 1.0, 2.0], [1.0, 1.0, 0.0])
    """
    queries, keys, masks = checked_batch(
        queries, keys, masks, directions=_TO_KEYS, temperature=temperature
    )
    check_numbers("hardness", hardness, Range(least=0))
    check_numbers("negative_hardness", negative_hardness, Range(least=0))
    comparison = Comparison(queries, keys, masks, axis_name, exchange, implementation)
    unmasked = comparison._replace(masks=Masks(valid=masks.valid))
    reduce = log_sum_exp(temperature, hardness=hardness, own_hardness=negative_hardness)
    negatives = negatives or {}
    sums = _each(reduce, comparison, negatives)
    counted = _each(COUNT, comparison, negatives)
    similarity_sums = _each(SIMILARITY, comparison, negatives)
    unlabelled = {
        name: tier._replace(ids=None, groups=None, guides=None) for name, tier in negatives.items()
    }
    present = _each(COUNT, unmasked, unlabelled)
    positives = inner_product(queries, keys) / temperature
    everything = jax.scipy.special.logsumexp(jnp.stack([positives, *sums.values()]), axis=0)
    return {
        name: NegativeMetrics(
            counted=counted[name],
            masked=present[name] - counted[name],
            similarity=similarity_sums[name] / jnp.maximum(counted[name], 1),
            share=jnp.exp(sums[name] - everything),
        )
        for name in sums
    }


def _each(
    reduce: Reduce,
    comparison: Comparison,
    negatives: NegativesByName,
) -> dict[str, Float[Array, " q"]]:
    """Reduce each query's negatives to one number per kind."""
    reduced = {"batch": comparison.reduced(reduce.pairs, _TO_KEYS)}
    reduced |= reduce_outside(reduce, comparison, negatives, directions=_TO_KEYS)
    return {name: values["query_to_key"] for name, values in reduced.items()}
