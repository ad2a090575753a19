"""InfoNCE: the cross entropy of finding a query's key among all keys."""

import math

import jax.numpy as jnp
from jax import lax

from jaxcl.negatives.masks import different_label_mask
from jaxcl.typing import Array, AxisName, Bool, Float, Int

__all__ = ["DIRECTIONS", "infonce_loss"]

DIRECTIONS = ("symmetric", "query_to_key", "key_to_query")


def infonce_loss(
    queries: Float[Array, "q d"],
    keys: Float[Array, "q d"],
    *,
    temperature: float | Float[Array, ""] = 0.05,
    direction: str = "symmetric",
    ids: Int[Array, " q"] | None = None,
    groups: Int[Array, " q"] | None = None,
    valid: Bool[Array, " q"] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, " q"]:
    r"""InfoNCE with in-batch negatives from every device, one value per query.

    With $s_{ij} = \langle q_i, k_j\rangle / \tau$ and $m_{ij}$ saying which pairs count,

    $$\ell_i^{q \to k} = \log\big(e^{s_{ii}} + \sum_{j \ne i} m_{ij} e^{s_{ij}}\big) - s_{ii},
    \qquad
    \ell_i^{k \to q} = \log\big(e^{s_{ii}} + \sum_{j \ne i} m_{ji} e^{s_{ji}}\big) - s_{ii},$$

    and `"symmetric"` is their mean. This is the dense reference: it stores a block of
    `q × (devices · q)` scores per device, and both directions come from that one block.

    Args:
      queries: this device's queries, of unit norm in general; row `i` belongs to key `i`.
      keys: this device's keys. Their gradient covers what every device's queries ask of them.
      temperature: $\tau > 0$; a traced scalar may be learned. 0.05 suits unit vectors.
      direction: `"symmetric"`, `"query_to_key"` or `"key_to_query"`.
      ids: row numbers. Two rows of one id are never each other's negative, so that a row that a
        batch holds twice does no harm.
      groups: labels. Two rows of one group are never each other's negative.
      valid: `False` for padding, which counts for nobody and has the value 0.
      axis_name: the mesh axis or axes of an enclosing `jax.shard_map` over which rows are
        sharded. All devices' keys are then negatives. Moves `(devices - 1) · q · d` numbers per
        device forward (`all_gather`) and as many backward (`reduce_scatter`).

    Returns:
      The loss of each of this device's queries, in nats. Reduce it outside: a mean over devices
      is a global sum over a global count. Differentiate outside of the `shard_map`.

    Raises:
      ValueError: for an unknown direction, or sides of different shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> sides = jnp.eye(2)
      >>> infonce_loss(sides, sides, temperature=1.0).round(4).tolist()
      [0.3133, 0.3133]

    Relations:
      A batch of one row has no negatives and costs 0. As $\tau \to 0$ the loss nears the gap
      between the best counted score and the positive's, over $\tau$.

    Reference:
      van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018,
      equation 4; the symmetric form is that of Radford et al., 2021, figure 3.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction={direction!r} is unknown; use one of {', '.join(DIRECTIONS)}")
    if queries.shape != keys.shape:
        raise ValueError(
            f"queries have the shape {queries.shape} and keys {keys.shape}; row i of one belongs "
            "to row i of the other, so give as many, of one width"
        )
    num_rows = queries.shape[0]
    all_keys = _gather(keys, axis_name)
    scores = _scores(queries, all_keys, temperature)
    own_column = _first_row(num_rows, axis_name) + jnp.arange(num_rows)
    is_positive = own_column[:, None] == jnp.arange(all_keys.shape[0])[None, :]
    counted = is_positive | _negative_mask(scores, ids, groups, valid, axis_name)

    positives = jnp.take_along_axis(scores, own_column[:, None], axis=1)[:, 0]
    loss = -positives
    share = 0.5 if direction == "symmetric" else 1.0
    if direction != "key_to_query":
        loss += share * _logsumexp(scores, counted, axis=1)
    if direction != "query_to_key":
        columns = _logsumexp(scores, counted, axis=0, axis_name=axis_name)
        loss += share * columns[own_column]
    return loss if valid is None else jnp.where(valid, loss, 0.0)


def _scores(
    queries: Float[Array, "q d"], keys: Float[Array, "k d"], temperature: float | Array
) -> Float[Array, "q k"]:
    # A sum of bf16 products kept in bf16 costs 12 % of the gradient at temperature 0.01.
    wide = jnp.promote_types(queries.dtype, jnp.float32)
    return jnp.einsum("qd,kd->qk", queries, keys, preferred_element_type=wide) / temperature


def _negative_mask(
    scores: Float[Array, "q k"],
    ids: Int[Array, " q"] | None,
    groups: Int[Array, " q"] | None,
    valid: Bool[Array, " q"] | None,
    axis_name: AxisName | None,
) -> Bool[Array, "q k"]:
    mask = jnp.ones(scores.shape, bool)
    for labels in (ids, groups):
        if labels is not None:
            mask &= different_label_mask(labels, _gather(labels, axis_name))
    if valid is not None:
        mask &= valid[:, None] & _gather(valid, axis_name)[None, :]
    return mask


def _logsumexp(
    scores: Float[Array, "q k"],
    counted: Bool[Array, "q k"],
    *,
    axis: int,
    axis_name: AxisName | None = None,
) -> Float[Array, " _"]:
    """Log-sum-exp along `axis`, and over the devices of `axis_name` where the axis is spread.

    At least one entry must count in all. On one device all may be masked: its sum is then 0, which
    has a gradient, where the log-sum-exp of that device alone would have none.
    """
    scores = jnp.where(counted, scores, -math.inf)
    # The maximum is a shift that cancels; `pmax` has no derivative, so its input must be constant.
    top = lax.stop_gradient(scores.max(axis))
    if axis_name is not None:
        top = lax.pmax(top, axis_name)
    total = jnp.exp(scores - jnp.expand_dims(top, axis)).sum(axis)
    if axis_name is not None:
        total = lax.psum(total, axis_name)
    return top + jnp.log(total)


def _gather(array: Array, axis_name: AxisName | None) -> Array:
    return array if axis_name is None else lax.all_gather(array, axis_name, tiled=True)


def _first_row(num_rows: int, axis_name: AxisName | None) -> int | Int[Array, ""]:
    return 0 if axis_name is None else lax.axis_index(axis_name) * num_rows
