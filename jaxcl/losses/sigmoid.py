"""A loss that classifies every pair separately as positive or negative."""

import functools
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.losses.comparison import Comparison, checked_batch
from jaxcl.losses.protocol import NO_MASKS, Masks, NegativesByName
from jaxcl.losses.reduce_negatives import Reduce, reduce_all
from jaxcl.ops.arguments import check_numbers
from jaxcl.ops.pairs import pair_softplus
from jaxcl.ops.vectors import inner_product
from jaxcl.typing import Array, AxisName, Float, Range

__all__ = ["SigmoidOptions", "sigmoid_pair_loss"]


class SigmoidOptions(NamedTuple):
    """Options of `sigmoid_pair_loss` in a config."""

    bias: Annotated[float, Range()] | None = None


def sigmoid_pair_loss(
    queries: Float[Array, "q d"],
    keys: Float[Array, "q d"],
    *,
    temperature: float | Float[Array, ""] = 0.1,
    bias: float | Float[Array, ""] = -10.0,
    masks: Masks = NO_MASKS,
    negatives: NegativesByName | None = None,
    axis_name: AxisName | None = None,
    exchange: str = "gather",
    implementation: str | None = None,
) -> Float[Array, " q"]:
    r"""SigLIP: the logistic loss of all pairs, one value per query.

    With $s_{ij} = \langle q_i, k_j\rangle / \tau + b$ and the mask $m_{ij}$ of allowed pairs,

    $$\ell_i = \log(1 + e^{-s_{ii}}) + \sum_{j \ne i} m_{ij} \log(1 + e^{s_{ij}}).$$

    There is no denominator over the batch, so devices need not wait for other devices' sums.

    Args:
      queries: this device's queries.
      keys: this device's keys.
      temperature: $\tau > 0$; the paper starts at 0.1 and learns it.
      bias: $b$; the paper starts at -10 and learns it, since nearly all pairs are negatives.
      masks, negatives, axis_name, exchange, implementation: as for `LossFn`.

    Returns:
      The loss of each of this device's queries, in nats.

    Raises:
      ValueError: if the shapes of queries, keys and negatives do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> sigmoid_pair_loss(jnp.eye(2), jnp.eye(2), temperature=1.0, bias=0.0).round(4).tolist()
      [1.0064, 1.0064]

    Reference:
      Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023, equation 2 and algorithm 1.
    """
    directions = ("query_to_key",)
    queries, keys, masks = checked_batch(
        queries, keys, masks, directions=directions, temperature=temperature
    )
    check_numbers("bias", bias, Range())
    scale = 1 / jnp.asarray(temperature)
    reduce = Reduce(
        functools.partial(pair_softplus, scale=scale, bias=bias),
        lambda similarities, allowed: jnp.where(
            allowed, jax.nn.softplus(similarities * scale + bias), 0
        ).sum(1),
        jnp.add,
    )
    comparison = Comparison(queries, keys, masks, axis_name, exchange, implementation)
    sums = reduce_all(reduce, comparison, negatives, directions=directions)
    positives = inner_product(queries, keys) / temperature + bias
    loss = sums["query_to_key"] + jax.nn.softplus(-positives)
    return loss if masks.valid is None else jnp.where(masks.valid, loss, 0)
