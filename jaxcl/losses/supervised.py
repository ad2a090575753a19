"""Many positives for a query: all keys of its group."""

from typing import Any

import jax.numpy as jnp

from jaxcl.losses.comparison import check_sides
from jaxcl.ops.pairs import Labels, PairLabels, pair_count, pair_logsumexp, pair_sum
from jaxcl.typing import Array, AxisName, Bool, Float

__all__ = ["supervised_infonce_loss"]


def supervised_infonce_loss(
    queries: Float[Array, "q d"],
    keys: Float[Array, "q d"],
    *,
    groups: Labels,
    key_groups: Labels | None = None,
    temperature: float | Float[Array, ""] | Float[Array, " q"] = 0.1,
    directions: tuple[str, ...] = ("query_to_key", "key_to_query"),
    valid: Bool[Array, " q"] | None = None,
    axis_name: AxisName | None = None,
    exchange: str = "gather",
    implementation: str | None = None,
) -> Float[Array, " q"]:
    r"""InfoNCE in which every key of a query's group is its positive, one value per query.

    With $P_i$ the keys of row $i$'s group, its own among them, and $s_{ij} = \langle q_i,
    k_j\rangle / \tau$,

    $$\ell_i^{q \to k} = \log \sum_j e^{s_{ij}} - \frac{1}{|P_i|} \sum_{p \in P_i} s_{ip},$$

    the same of the keys over the queries, or the mean of both. A row without a positive has the
    value 0. Other arguments as for `infonce_loss`.

    Args:
      queries: this device's queries.
      keys: this device's keys.
      groups: labels; rows of one group are positives of each other. With several per row, filled
        up with negative numbers, `[q, s]`, rows that share one are: many positives to many.
      key_groups: the keys' labels where they are not the queries', such as row numbers where
        `groups` has those of each query's positives.
      temperature: $\tau > 0$.
      directions: `"query_to_key"`, `"key_to_query"`, or both.
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
    check_sides(queries, keys, directions)
    if set(directions) - {"query_to_key", "key_to_query"}:
        raise ValueError(f"directions={directions}: positives are on the other side")
    how: dict[str, Any] = {
        "axis_name": axis_name,
        "exchange": exchange,
        "implementation": implementation,
    }
    everyone = PairLabels(valid=valid)
    group = PairLabels(equal=(groups,), valid=valid)
    key_group = group if key_groups is None else PairLabels(equal=(key_groups,), valid=valid)
    everything = pair_logsumexp(
        queries, keys, temperature=temperature, query_labels=everyone, key_labels=everyone, **how
    )
    of_group: dict[str, Any] = {"query_labels": group, "key_labels": key_group, **how}
    sums = pair_sum(queries, keys, temperature=temperature, **of_group)
    counts = pair_count(queries, keys, **of_group)
    both = {
        direction: jnp.where(count > 0, whole, 0) - total / jnp.maximum(count, 1)
        for direction, whole, total, count in zip(
            ("query_to_key", "key_to_query"), everything, sums, counts, strict=True
        )
    }
    return jnp.stack([both[direction] for direction in directions]).mean(0)
