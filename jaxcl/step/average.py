r"""An exponential moving average of the weights.

After update $t$, the average of the weights $\theta_1, …, \theta_t$ is
$\bar\theta_t = (1 - c_t) \bar\theta_{t-1} + c_t \theta_t$ with $c_t = (1 - d) / (1 - d^t)$ for the
decay $d$. This is $\sum_s d^{t-s} \theta_s / \sum_s d^{t-s}$: since $c_1 = 1$, the initial weights
have no share in it, so that it is not biased towards them at the start.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.typing import Float, Int, PyTree, Scalar

__all__ = ["WeightAverage", "init_average", "update_average"]


class WeightAverage(NamedTuple):
    """The average of the weights.

    Attributes:
      towers: the average of the towers' trained parameters; a copy of them before the first update.
      updates: the number of updates averaged so far.
    """

    towers: PyTree
    updates: Int[jax.Array, ""]


def init_average(towers: PyTree) -> WeightAverage:
    """The average before the first update."""
    return WeightAverage(jax.tree.map(jnp.copy, towers), jnp.int32(0))


def update_average(average: WeightAverage, towers: PyTree, *, decay: float) -> WeightAverage:
    """The average after an update.

    Args:
      average: the average before the update.
      towers: the weights after the update.
      decay: the factor by which the share of older weights falls from update to update, in (0, 1).
    """
    updates = average.updates + 1
    share = _newest_share(updates, decay)
    moved = jax.tree.map(
        lambda old, new: ((1 - share) * old + share * new).astype(old.dtype), average.towers, towers
    )
    return WeightAverage(moved, updates)


def _newest_share(updates: Int[jax.Array, ""], decay: float) -> Float[jax.Array, ""] | Scalar:
    # expm1, since 1 - decay**updates would lose digits for a decay near 1.
    log_decay = math.log(decay)
    share = math.expm1(log_decay) / jnp.expm1(log_decay * updates.astype(jnp.float32))
    return jnp.where(updates == 1, 1.0, share)
