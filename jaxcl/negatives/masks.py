"""Masks of false negatives, described by labels and ceilings instead of a full matrix."""

import jax.numpy as jnp
from jax import lax

from jaxcl.ops.arguments import check_numbers
from jaxcl.ops.pairs import PairLabels
from jaxcl.ops.pairs.sides import checked_labels
from jaxcl.typing import Array, AxisName, Bool, Float, Integer, Range

__all__ = ["RELATIVE_MARGINS", "batch_labels", "similarity_ceilings"]

RELATIVE_MARGINS = Range(least=-1, most=1)


def batch_labels(
    num_rows: int,
    *,
    ids: Integer[Array, " q"] | None = None,
    groups: Integer[Array, " q"] | None = None,
    valid: Bool[Array, " q"] | None = None,
    axis_name: AxisName | None = None,
) -> PairLabels:
    """Build the labels of a batch's rows, which mask at least each row's own pair.

    Args:
      num_rows: rows of this device.
      ids: row numbers; rows with the same id are not negatives. By default all rows are distinct.
      groups: class, topic, source or text hash; rows of the same group are not negatives.
      valid: `False` for padding.
      axis_name: the mesh axes of an enclosing `jax.shard_map` over which rows are sharded.

    Returns:
      Labels for either side of a pair matrix.

    Example:
      >>> batch_labels(2).different[0].tolist()
      [0, 1]
    """
    if ids is None:
        first = 0 if axis_name is None else lax.axis_index(axis_name) * num_rows
        ids = first + jnp.arange(num_rows, dtype=jnp.int32)
    different = (ids,) if groups is None else (ids, groups)
    return checked_labels("the batch's labels", PairLabels(different, valid=valid))


def similarity_ceilings(
    positives: Float[Array, " q"],
    *,
    margin: float | None = None,
    relative_margin: float | None = None,
) -> Float[Array, " q"] | None:
    r"""The maximum similarity of each row's negatives; closer keys may be false negatives.

    $u_i = x_{ii} - \delta$, or $u_i = x_{ii} - \delta\, |x_{ii}|$ with a relative margin.

    Args:
      positives: $x_{ii}$, the similarity of each row's positive, by the model or a guide model.
      margin: $\delta$ as a difference of similarities.
      relative_margin: $\delta$ as a fraction of the positive's absolute similarity, from -1 to 1.

    Returns:
      Ceilings without gradient; `None` without a margin.

    Raises:
      ValueError: if both margins are given, or one is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> similarity_ceilings(jnp.array([0.8]), relative_margin=0.05).round(4).tolist()
      [0.76]

    Reference:
      Margins to the positive: de Souza Moreira et al., "NV-Retriever", 2024. Guides: Solatorio,
      "GISTEmbed", 2024.
    """
    if margin is not None and relative_margin is not None:
        raise ValueError(
            f"margin={margin} and relative_margin={relative_margin} are both given; choose one"
        )
    for name, value, allowed in (
        ("margin", margin, Range()),
        ("relative_margin", relative_margin, RELATIVE_MARGINS),
    ):
        if value is not None:
            check_numbers(name, value, allowed)
    positives = lax.stop_gradient(positives)
    if margin is not None:
        return positives - margin
    return None if relative_margin is None else positives - relative_margin * abs(positives)
