"""Which pairs may count as negatives: false-negative masks, described by labels.

A mask is `True` where the pair *may count* as a negative. Masks are conjunctions: a pair counts
when every mask says so. A query's own positive is no negative and is not the business of a mask.
"""

from jaxcl.typing import Array, Bool, Int

__all__ = ["different_label_mask"]


def different_label_mask(
    query_labels: Int[Array, " q"], key_labels: Int[Array, " k"]
) -> Bool[Array, "q k"]:
    r"""Lets a pair count as a negative only where its two labels differ.

    $m_{ij} = [\,l_i \neq l'_j\,]$. With row ids as labels it keeps a row that stands in the batch
    twice from being its own negative; with group ids (class, topic, source, hash of the text) it
    keeps members of one group from being pushed apart.

    Args:
      query_labels: one label per query.
      key_labels: one label per key, from the same numbering.

    Returns:
      `True` where the pair may count as a negative.

    Example:
      >>> import jax.numpy as jnp
      >>> different_label_mask(jnp.array([7, 8]), jnp.array([7, 9])).tolist()
      [[False, True], [True, True]]
    """
    return query_labels[:, None] != key_labels[None, :]
