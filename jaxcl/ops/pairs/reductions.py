"""The ways to reduce a row or a column of scores to one number."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.typing import Array, AxisName, Float

__all__ = ["COUNT", "LOGSUMEXP", "SOFTPLUS", "SUM", "Reduction"]


class Reduction(NamedTuple):
    """A reduction that can be taken in parts. A pair that does not count has the score −∞.

    Attributes:
      empty: the reduction of nothing.
      reduce: (scores, axis, keepdims=False) -> values.
      join: (values, values) -> values of both parts together.
      join_devices: (values of all columns, axis name) -> this device's columns, over all devices.
      weigh: (scores, values, cotangents) -> the scores' gradients; the last two broadcast.
    """

    empty: float
    reduce: Callable[..., Array]
    join: Callable[[Array, Array], Array]
    join_devices: Callable[[Array, AxisName], Array]
    weigh: Callable[[Array, Array, Array], Array]


def _logsumexp(scores: Float[Array, "q k"], axis: int, *, keepdims: bool = False) -> Array:
    """−∞ for nothing, with the gradient 0, where XLA's own formula would give NaN."""
    top = lax.stop_gradient(_finite(scores.max(axis, keepdims=True)))
    total = jnp.exp(scores - top).sum(axis, keepdims=True)
    values = _log(total, top)
    return values if keepdims else jnp.squeeze(values, axis)


def _logsumexp_over_devices(values: Float[Array, " k"], axis_name: AxisName) -> Float[Array, " q"]:
    # The shift cancels; pmax has no derivative, so its input must be constant.
    top = _finite(lax.pmax(lax.stop_gradient(values), axis_name))
    total = lax.psum_scatter(jnp.exp(values - top), axis_name, tiled=True)
    size, start = total.shape[0], lax.axis_index(axis_name) * total.shape[0]
    return _log(total, lax.dynamic_slice(top, (start,), (size,)))


def _sum(terms: Float[Array, "q k"], axis: int, *, keepdims: bool = False) -> Array:
    return terms.sum(axis, keepdims=keepdims)


def _log(total: Array, shift: Array) -> Array:
    some = total > 0
    return jnp.where(some, jnp.log(jnp.where(some, total, 1)) + shift, -jnp.inf)


def _finite(values: Array) -> Array:
    return jnp.where(jnp.isfinite(values), values, 0)


def _softmax_weights(scores: Array, values: Array, cotangents: Array) -> Array:
    some = jnp.isfinite(values)
    return jnp.exp(scores - jnp.where(some, values, 0)) * jnp.where(some, cotangents, 0)


LOGSUMEXP = Reduction(
    empty=-jnp.inf,
    reduce=_logsumexp,
    join=jnp.logaddexp,
    join_devices=_logsumexp_over_devices,
    weigh=_softmax_weights,
)
r"""$\log \sum_j e^{s_j}$, in nats; −∞ where nothing counts."""

SOFTPLUS = Reduction(
    empty=0.0,
    reduce=lambda scores, axis, **how: _sum(jnp.logaddexp(scores, 0), axis, **how),
    join=jnp.add,
    join_devices=lambda values, axis_name: lax.psum_scatter(values, axis_name, tiled=True),
    weigh=lambda scores, values, cotangents: jax.nn.sigmoid(scores) * cotangents,
)
r"""$\sum_j \log(1 + e^{s_j})$, in nats; 0 where nothing counts."""

SUM = Reduction(
    empty=0.0,
    reduce=lambda scores, axis, **how: _sum(jnp.where(scores > -jnp.inf, scores, 0), axis, **how),
    join=jnp.add,
    join_devices=lambda values, axis_name: lax.psum_scatter(values, axis_name, tiled=True),
    weigh=lambda scores, values, cotangents: jnp.where(scores > -jnp.inf, cotangents, 0),
)
r"""$\sum_j s_j$, in nats; 0 where nothing counts."""

COUNT = Reduction(
    empty=0.0,
    reduce=lambda scores, axis, **how: _sum((scores > -jnp.inf).astype(scores.dtype), axis, **how),
    join=jnp.add,
    join_devices=lambda values, axis_name: lax.psum_scatter(values, axis_name, tiled=True),
    weigh=lambda scores, values, cotangents: jnp.zeros_like(scores),
)
"""How many pairs count."""
