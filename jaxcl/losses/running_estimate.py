"""InfoNCE over all rows of the data set, with running estimates of the denominators."""

import functools
import math
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.losses.comparison import SYMMETRIC, TEMPERATURES, Comparison, checked_batch
from jaxcl.losses.protocol import NO_MASKS, Masks, NegativesByName
from jaxcl.losses.reduce_negatives import COUNT, log_sum_exp, reduce_all
from jaxcl.negatives.sets import ExplicitNegatives
from jaxcl.ops.arguments import as_vectors, check_numbers
from jaxcl.ops.pairs.reductions import log_add_exp
from jaxcl.ops.row_tables import init_table
from jaxcl.ops.vectors import inner_product
from jaxcl.typing import Array, AxisName, Float, PyTree, Range

__all__ = [
    "NEVER_SEEN",
    "EstimateOptions",
    "estimate_memory",
    "remembered_estimate_loss",
    "running_estimate_loss",
]

NEVER_SEEN = -jnp.inf
"""The estimate of a row that no batch has contained yet."""


class EstimateOptions(NamedTuple):
    """Options of `remembered_estimate_loss` in a config."""

    update_rate: Annotated[float, Range(above=0, most=1)] | None = None
    robustness: Annotated[float, Range()] | None = None
    epsilon: Annotated[float, Range(above=0)] | None = None
    directions: tuple[str, ...] | None = None
    temperature_rate: Annotated[float, Range(above=0)] | None = None


def running_estimate_loss(
    queries: Float[Array, "q d"],
    keys: Float[Array, "q d"],
    *,
    estimates: Float[Array, "q e"],
    temperature: float | Float[Array, ""] | Float[Array, "q e"] = 0.05,
    update_rate: float | Float[Array, ""] = 0.9,
    robustness: float | None = None,
    epsilon: float = 1e-14,
    directions: tuple[str, ...] = SYMMETRIC,
    masks: Masks = NO_MASKS,
    negatives: NegativesByName | None = None,
    axis_name: AxisName | None = None,
    exchange: str = "gather",
    implementation: str | None = None,
) -> tuple[Float[Array, " q"], Float[Array, "q e"]]:
    r"""The global contrastive loss, with a running estimate of each row's denominator.

    With $g_i$ the mean of $e^{s_{ij} - s_{ii}}$ over the $N_i$ negatives of row $i$ in this batch,
    and $\gamma$ the update rate,

    $$u_i \leftarrow (1 - \gamma)\, u_i + \gamma\, g_i, \qquad
    \ell_i = \log(\varepsilon + u_i), \qquad
    \nabla \ell_i = \frac{1}{\varepsilon + u_i} \nabla g_i.$$

    A small batch then has the gradient of a large one, up to the lag of the estimate. At a row's
    first visit, $u_i = g_i$. Other arguments as for `infonce_loss`.

    Args:
      queries: this device's queries.
      keys: this device's keys.
      estimates: $\log u_i$ of these rows by direction, in nats, from the last call with each row;
        −∞ for rows without an estimate.
      temperature: $\tau > 0$, one for all, or one per row and direction.
      update_rate: $\gamma$ in (0, 1]; 1 uses only this batch, for which the loss is the decoupled
        loss minus $\log N_i$.
      robustness: $\rho$; if given, the loss is $\tau\,(\ell_i + \rho)$, which a learned temperature
        minimises. Without it, a learned temperature minimises $\ell_i$.
      epsilon: $\varepsilon > 0$.
      directions: directions of the comparison.
      masks: pairs that are not negatives; padding keeps its estimate.
      negatives: negatives from outside the batch, by name. They have the same weight as in-batch
        negatives in the mean $g_i$.
      axis_name, exchange, implementation: as for `LossFn`.

    Returns:
      The loss of each of this device's rows, in nats (times $\tau$ with `robustness`), and the new
      estimates. A row without negatives in this batch keeps its estimate and contributes no
      gradient to the embeddings; its loss is computed from that estimate, or 0 without an estimate.

    Raises:
      ValueError: if estimates or rates are invalid, and as for `infonce_loss`.

    Reference:
      SogCLR: Yuan et al., "Provable Stochastic Optimization for Global Contrastive Learning", 2022,
      algorithm 1. Robustness and temperatures by row: iSogCLR, Qiu et al., 2023, and "FastCLIP",
      Wei et al., 2024.
    """
    queries, keys, masks = checked_batch(
        queries, keys, masks, directions=directions, temperature=temperature
    )
    estimates = as_vectors("estimates", estimates)
    temperatures = jnp.asarray(temperature)
    by_row = temperatures.ndim > 0
    shape = (queries.shape[0], len(directions))
    for name, array in (("estimates", estimates), ("temperature", temperatures)):
        if array.shape != shape and (name == "estimates" or by_row):
            raise ValueError(
                f"{name} has the shape {array.shape}, not {shape}; give one per row and direction"
            )
    check_numbers("update_rate", update_rate, Range(above=0, most=1))
    check_numbers("epsilon", epsilon, Range(above=0))
    if robustness is not None:
        check_numbers("robustness", robustness, Range())
    comparison = Comparison(queries, keys, masks, axis_name, exchange, implementation)
    counts = reduce_all(COUNT, comparison, negatives, directions=directions)
    if by_row:
        by_direction = {
            direction: _log_sums_by_row(comparison, negatives, temperatures[:, column], direction)
            for column, direction in enumerate(directions)
        }
    else:
        reduce = log_sum_exp(temperatures)
        by_direction = reduce_all(reduce, comparison, negatives, directions=directions)
    positives = inner_product(queries, keys)[:, None] / temperatures
    num_negatives = jnp.stack([counts[direction] for direction in directions], 1)
    # Rows without negatives have log-sums of −∞. Replace these by 0, since the weight of 0 below
    # does not mask −∞ − (−∞), which is NaN, in the loss or its gradient.
    nonempty = num_negatives > 0
    log_sums = jnp.stack([by_direction[direction] for direction in directions], 1)
    log_sums = jnp.where(nonempty, log_sums, 0)
    log_means = log_sums - jnp.log(jnp.maximum(num_negatives, 1)) - positives
    estimates = lax.stop_gradient(estimates)
    current = lax.stop_gradient(log_means)
    # In log space, since u reaches e^100 at a temperature of 0.01, beyond the range of float32.
    mixed = log_add_exp(jnp.log1p(-update_rate) + estimates, jnp.log(update_rate) + current)
    updated = jnp.where(jnp.isfinite(estimates), mixed, current)
    updated = jnp.where(nonempty, updated, estimates).astype(estimates.dtype)
    known = jnp.isfinite(updated)
    values = jnp.where(known, log_add_exp(updated, jnp.log(epsilon)), 0)
    # The value of the loss is the log of the estimate. Its gradient, ∇g / (ε + u), is the gradient
    # of log g times g / (ε + u).
    weights = jnp.where(nonempty, jnp.exp(current - values), 0)
    loss = values + weights * (log_means - current)
    if robustness is not None:
        loss = jnp.where(known, temperatures * (loss + robustness), 0)
    loss = loss.mean(1)
    return loss if masks.valid is None else jnp.where(masks.valid, loss, 0), updated


def _log_sums_by_row(
    comparison: Comparison,
    negatives: NegativesByName | None,
    temperature: Float[Array, " q"],
    direction: str,
) -> Float[Array, " q"]:
    """The log-sum-exp over each row's negatives in one direction, with a temperature per anchor."""
    if direction == "key_to_query":
        # Only rows of the product can have separate temperatures, so the anchors, here the keys,
        # become the rows.
        comparison, direction = comparison.swapped(), "query_to_key"
        negatives = None  # negatives are keys, and this direction compares keys with queries
    elif direction == "query_to_query":
        negatives = None
    elif direction == "key_to_key":
        negatives = {
            name: tier
            for name, tier in (negatives or {}).items()
            if isinstance(tier, ExplicitNegatives)
        }
    reduce = log_sum_exp(temperature)
    return reduce_all(reduce, comparison, negatives, directions=(direction,))[direction]


def remembered_estimate_loss(
    queries: Float[Array, "q d"],
    keys: Float[Array, "q d"],
    *,
    memory: dict[str, Float[Array, "q e"]],
    temperature: float | Float[Array, ""] = 0.05,
    temperature_bounds: tuple[float, float] = (0.01, 1.0),
    temperature_rate: float | None = None,
    negatives: NegativesByName | None = None,
    **options: Any,
) -> tuple[Float[Array, " q"], dict[str, Float[Array, "q e"]]]:
    r"""`running_estimate_loss` with its estimates, and temperatures per row, in the train state.

    Args:
      queries: this device's queries.
      keys: this device's keys.
      memory: the entries of these rows, initially from `estimate_memory`.
      temperature: $\tau$ for all rows; ignored if the memory has a temperature per row.
      temperature_bounds: the range to which a row's temperature is clipped.
      temperature_rate: learning rate of a row's $\log \tau$, which takes one gradient step whenever
        a batch contains the row; `None` for a single temperature.
      negatives: negatives from outside the batch, by name.
      options: other arguments of `running_estimate_loss`.

    Returns:
      The loss of each of this device's rows, and their new entries.
    """
    loss_fn: Callable[..., Any] = functools.partial(
        running_estimate_loss, estimates=memory["estimates"], **options
    )
    if temperature_rate is None:
        loss, updated = loss_fn(queries, keys, negatives=negatives, temperature=temperature)
        return loss, {"estimates": updated}

    def losses(log_temperatures: Array, vectors: PyTree) -> tuple[Array, Array]:
        queries, keys, negatives = vectors
        return loss_fn(queries, keys, negatives=negatives, temperature=jnp.exp(log_temperatures))

    check_numbers("temperature_rate", temperature_rate, Range(above=0))
    check_numbers("temperature_bounds", temperature_bounds, Range(above=0))
    least, most = temperature_bounds
    Range(most=most).check("temperature_bounds[0]", least)
    log_temperatures, vectors = memory["log_temperatures"], (queries, keys, negatives)
    # Each temperature affects only the loss of its row, so the gradient of the sum contains the
    # gradients of all rows. Embeddings are constants here, so that an outer gradient does not
    # differentiate this one.
    constants = lax.stop_gradient(vectors)
    slope = jax.grad(lambda logs: losses(logs, constants)[0].sum())(log_temperatures)
    loss, updated = losses(log_temperatures, vectors)
    moved = jnp.clip(log_temperatures - temperature_rate * slope, math.log(least), math.log(most))
    return loss, {"estimates": updated, "log_temperatures": moved}


def estimate_memory(
    num_rows: int,
    *,
    temperature: float,
    temperature_rate: float | None = None,
    directions: tuple[str, ...] = SYMMETRIC,
    **_: Any,
) -> dict[str, Float[Array, "n e"]]:
    """Create the initial memory of `remembered_estimate_loss` for its options."""
    check_numbers("temperature", temperature, TEMPERATURES)
    width = len(directions)
    memory = {"estimates": init_table(num_rows, width, value=NEVER_SEEN)}
    if temperature_rate is not None:
        log_temperature = math.log(temperature)
        memory["log_temperatures"] = init_table(num_rows, width, value=log_temperature)
    return memory
