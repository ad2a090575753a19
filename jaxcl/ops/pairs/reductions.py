"""Reductions of a row or column of scores to one number."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.ops.collectives import sum_scatter
from jaxcl.ops.pairs.sides import PairKeys, PairQueries
from jaxcl.ops.varying import full_like_varying
from jaxcl.typing import Array, AxisName, Float

__all__ = [
    "COUNT",
    "LOGSUMEXP",
    "SOFTPLUS",
    "SUM",
    "Reduced",
    "Reduction",
    "Residuals",
    "log_add_exp",
    "nothing",
]


Reduced: TypeAlias = tuple[Float[Array, " q"], Float[Array, " k"]]
"""The result of a reduction: one number for each row and for each column of a pair matrix."""


class Residuals(NamedTuple):
    """The inputs and the result of a reduction, for its backward pass.

    Attributes:
      queries: the rows.
      keys: the columns.
      reduced: the reduction of each row and of each column.
    """

    queries: PairQueries
    keys: PairKeys
    reduced: Reduced


class Reduction(NamedTuple):
    """A reduction that can be computed in parts. Masked pairs have the score −∞.

    Attributes:
      empty: the reduction of no scores.
      reduce: (scores, axis) -> values.
      join: (values, values) -> the values of both parts combined.
      join_devices: (values of all columns, axis name) -> this device's columns, over all devices.
      weigh: (scores, values, cotangents) -> the scores' gradients; values and cotangents broadcast.
    """

    empty: float
    reduce: Callable[[Float[Array, "q k"], int], Float[Array, " _"]]
    join: Callable[[Array, Array], Array]
    join_devices: Callable[[Array, AxisName], Array]
    weigh: Callable[[Array, Array, Array], Array]


def nothing(reduction: Reduction, queries: PairQueries, keys: PairKeys) -> Reduced:
    """The reductions of no scores: the initial values of loops over tiles or devices."""
    wide = jnp.promote_types(queries.vectors.dtype, jnp.float32)
    sides = (queries, keys)
    rows, columns = (
        full_like_varying(side.vectors.shape[0], reduction.empty, wide, sides) for side in sides
    )
    return rows, columns


def log_add_exp(left: Float[Array, "..."], right: Float[Array, "..."]) -> Float[Array, "..."]:
    """`jnp.logaddexp` without an intermediate NaN for two −∞, which `jax_debug_nans` reports."""
    empty = (left == -jnp.inf) & (right == -jnp.inf)
    return jnp.where(empty, -jnp.inf, jnp.logaddexp(jnp.where(empty, 0, left), right))


def _logsumexp(scores: Float[Array, "q k"], axis: int) -> Float[Array, " _"]:
    """Log-sum-exp; −∞ with gradient 0 if all scores are masked, where the usual gradient is NaN."""
    # Do not subtract a maximum of −∞: −∞ − (−∞) is NaN.
    top = lax.stop_gradient(_finite(scores.max(axis)))
    # A single broadcast instead of a reshape and a broadcast, for kernels.
    shift = lax.broadcast_in_dim(top, scores.shape, (1 - axis,))
    return _log(jnp.exp(scores - shift).sum(axis), top)


def _logsumexp_over_devices(values: Float[Array, " k"], axis_name: AxisName) -> Float[Array, " q"]:
    # The shift cancels, so its gradient is 0 anyway; pmax has no derivative.
    top = _finite(lax.pmax(lax.stop_gradient(values), axis_name))
    total = sum_scatter(jnp.exp(values - top), axis_name)
    size, start = total.shape[0], lax.axis_index(axis_name) * total.shape[0]
    return _log(total, lax.dynamic_slice(top, (start,), (size,)))


def _log(total: Array, shift: Array) -> Array:
    nonempty = total != 0  # true for NaN, which must not become the −∞ of an empty sum
    # The inner `where` keeps log(0) out of the gradient: 0 times its infinite slope is NaN.
    return jnp.where(nonempty, jnp.log(jnp.where(nonempty, total, 1)) + shift, -jnp.inf)


def _finite(values: Array) -> Array:
    return jnp.where(jnp.isfinite(values), values, 0)


def _softmax_weights(scores: Array, values: Array, cotangents: Array) -> Array:
    # An empty row has the value −∞, and exp(−∞ − (−∞)) would be NaN.
    nonempty = jnp.isfinite(values)
    return jnp.exp(scores - jnp.where(nonempty, values, 0)) * jnp.where(nonempty, cotangents, 0)


LOGSUMEXP = Reduction(
    empty=-jnp.inf,
    reduce=_logsumexp,
    join=log_add_exp,
    join_devices=_logsumexp_over_devices,
    weigh=_softmax_weights,
)
r"""$\log \sum_j e^{s_j}$, in nats; −∞ if all pairs are masked."""

SOFTPLUS = Reduction(
    empty=0.0,
    reduce=lambda scores, axis: jnp.logaddexp(scores, 0).sum(axis),
    join=jnp.add,
    join_devices=sum_scatter,
    weigh=lambda scores, values, cotangents: jax.nn.sigmoid(scores) * cotangents,
)
r"""$\sum_j \log(1 + e^{s_j})$, in nats; 0 if all pairs are masked."""

SUM = Reduction(
    empty=0.0,
    reduce=lambda scores, axis: jnp.where(scores != -jnp.inf, scores, 0).sum(axis),
    join=jnp.add,
    join_devices=sum_scatter,
    weigh=lambda scores, values, cotangents: jnp.where(scores != -jnp.inf, cotangents, 0),
)
r"""$\sum_j s_j$, in nats; 0 if all pairs are masked."""

COUNT = Reduction(
    empty=0.0,
    reduce=lambda scores, axis: (scores != -jnp.inf).astype(scores.dtype).sum(axis),
    join=jnp.add,
    join_devices=sum_scatter,
    weigh=lambda scores, values, cotangents: jnp.zeros_like(scores),
)
"""The number of allowed pairs."""
