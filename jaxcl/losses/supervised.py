"""Many positives for a query: all keys of its group."""

from typing import Any

import jax.numpy as jnp

from jaxcl.losses.comparison import check_sides
from jaxcl.ops.pairs import PairLabels, pair_count, pair_logsumexp, pair_sum
from jaxcl.typing import Array, AxisName, Bool, Float, Integer

__all__ = ["supervised_infonce_loss"]


def supervised_infonce_loss(
    queries: Float[Array, "q d"],
    keys: Float[Array, "q d"],
    *,
    groups: Integer[Array, " q"],
    temperature: float | Float[Array, ""] | Float[Array, " q"] = 0.1,
    symmetric: bool = True,
    valid: Bool[Array, " q"] | None = None,
    axis_name: AxisName | None = None,
    exchange: str = "gather",
    implementation: str | None = None,
) -> Float[Array, " q"]:
    r"""InfoNCE in which every key of a query's group is its positive, one value per query.

    With $P_i$ the keys of row $i$'s group, its own among them, and $s_{ij} = \langle q_i,
    k_j\rangle / \tau$,

    $$\ell_i^{q \to k} = \log \sum_j e^{s_{ij}} - \frac{1}{|P_i|} \sum_{p \in P_i} s_{ip},$$

    and, if symmetric, the mean with the same of the keys over the queries. Other arguments as for
    `infonce_loss`.

    Args:
      queries: this device's queries.
      keys: this device's keys.
      groups: labels; rows of one group are positives of each other.
      temperature: $\tau > 0$.
      symmetric: both directions, or the queries' alone.
      valid: `False` for padding.
      axis_name: the mesh axes over which rows are sharded.
      exchange: `"gather"` or `"ring"`.
      implementation: of `jaxcl.ops.pairs`.

    Returns:
      The loss of each of this device's rows, in nats.

    Relations:
      With groups of one it is `infonce_loss`.

    Reference:
      Khosla et al., "Supervised Contrastive Learning", 2020, equation 2, between two sides.
    """
    check_sides(queries, keys, ("query_to_key",))
    how: dict[str, Any] = {
        "axis_name": axis_name,
        "exchange": exchange,
        "implementation": implementation,
    }
    everyone = PairLabels(valid=valid)
    group = PairLabels(equal=(groups,), valid=valid)
    everything = pair_logsumexp(
        queries, keys, temperature=temperature, query_labels=everyone, key_labels=everyone, **how
    )
    of_group: dict[str, Any] = {"query_labels": group, "key_labels": group, **how}
    sums = pair_sum(queries, keys, temperature=temperature, **of_group)
    counts = pair_count(queries, keys, **of_group)
    both = [
        jnp.where(count > 0, whole, 0) - total / jnp.maximum(count, 1)
        for whole, total, count in zip(everything, sums, counts, strict=True)
    ]
    return (both[0] + both[1]) / 2 if symmetric else both[0]
