"""Every pair a question of its own: does this key belong to this query?"""

import jax
import jax.numpy as jnp

from jaxcl.losses.comparison import check_sides
from jaxcl.negatives.masks import batch_labels
from jaxcl.ops.pairs import pair_softplus
from jaxcl.ops.vectors import inner_product
from jaxcl.typing import Array, AxisName, Bool, Float, Integer

__all__ = ["sigmoid_pair_loss"]


def sigmoid_pair_loss(
    queries: Float[Array, "q d"],
    keys: Float[Array, "q d"],
    *,
    temperature: float | Float[Array, ""] = 0.1,
    bias: float | Float[Array, ""] = -10.0,
    ids: Integer[Array, " q"] | None = None,
    groups: Integer[Array, " q"] | None = None,
    valid: Bool[Array, " q"] | None = None,
    axis_name: AxisName | None = None,
    exchange: str = "gather",
    implementation: str | None = None,
) -> Float[Array, " q"]:
    r"""SigLIP: the logistic loss of all pairs, one value per query.

    With $s_{ij} = \langle q_i, k_j\rangle / \tau + b$,

    $$\ell_i = \log(1 + e^{-s_{ii}}) + \sum_{j \ne i} m_{ij} \log(1 + e^{s_{ij}}).$$

    Nothing is normalised over the batch, so that no device waits for another's sums. Arguments as
    for `infonce_loss`, besides:

    Args:
      queries: this device's queries.
      keys: this device's keys.
      temperature: $\tau > 0$; the paper starts at 0.1 and learns it.
      bias: $b$; the paper starts at -10 and learns it, since nearly all pairs are negatives.
      ids: row numbers.
      groups: labels.
      valid: `False` for padding.
      axis_name: the mesh axes over which rows are sharded.
      exchange: `"gather"` or `"ring"`.
      implementation: of `jaxcl.ops.pairs`.

    Returns:
      The loss of each of this device's queries, in nats.

    Example:
      >>> import jax.numpy as jnp
      >>> sigmoid_pair_loss(jnp.eye(2), jnp.eye(2), temperature=1.0, bias=0.0).round(4).tolist()
      [1.0064, 1.0064]

    Reference:
      Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023, equation 2 and algorithm 1.
    """
    check_sides(queries, keys, ("query_to_key",))
    labels = batch_labels(
        queries.shape[0], ids=ids, groups=groups, valid=valid, axis_name=axis_name
    )
    rows, _ = pair_softplus(
        queries,
        keys,
        scale=1 / jnp.asarray(temperature),
        bias=bias,
        query_labels=labels,
        key_labels=labels,
        axis_name=axis_name,
        exchange=exchange,
        implementation=implementation,
    )
    loss = rows + jax.nn.softplus(-(inner_product(queries, keys) / temperature + bias))
    return loss if valid is None else jnp.where(valid, loss, 0)
