"""A loss that trains the similarities of pairs to have the same order as their scores."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.losses.comparison import checked_batch
from jaxcl.losses.protocol import NO_MASKS, Masks
from jaxcl.ops.collectives import gather
from jaxcl.ops.varying import full_like_varying
from jaxcl.ops.vectors import inner_product
from jaxcl.typing import Array, AxisName, Bool, Float

__all__ = ["cosent_loss"]


def cosent_loss(
    queries: Float[Array, "q d"],
    keys: Float[Array, "q d"],
    *,
    scores: Float[Array, " q"],
    temperature: float | Float[Array, ""] = 0.05,
    masks: Masks = NO_MASKS,
    axis_name: AxisName | None = None,
) -> Float[Array, " q"]:
    r"""CoSENT: order the similarities of pairs like their scores; each row has the same value.

    Row $i$ is a pair of texts with a score $y_i$, such as a person's rating of their similarity.
    With $s_i = \langle q_i, k_i\rangle / \tau$ and $i, j$ over the rows of all devices,

    $$\ell = \log\Big(1 + \sum_{y_i > y_j} e^{s_j - s_i}\Big).$$

    Only the order of the scores matters; pairs with equal scores are not compared. The loss is not
    a mean over rows, so each row of the batch has the whole value, and the mean over rows is the
    loss. Devices exchange one similarity and one score per row. The sum takes O(B log B) time and
    O(B) memory for B rows: after sorting by score, the terms of a row sum to one entry of a
    cumulative log-sum-exp.

    Args:
      queries: the first text of each of this device's pairs.
      keys: the second text of each pair.
      scores: the score of each pair; a larger score means more similar texts, on any scale.
      temperature: $\tau > 0$, the inverse of the reference's scale, which is 20.
      masks: only `valid` is allowed.
      axis_name: as for `LossFn`.

    Returns:
      The loss of the global batch for each of this device's rows, in nats. It is 0 for invalid
      rows, and for all rows if no two valid rows have different scores.

    Raises:
      ValueError: if the shapes of queries, keys and scores do not match, or for masks other than
        `valid`.

    Example:
      >>> import jax.numpy as jnp
      >>> scores = jnp.array([5.0, 0.0])  # the second pair should be less similar than the first
      >>> queries, keys = jnp.eye(2), jnp.eye(2)
      >>> cosent_loss(queries, keys, scores=scores, temperature=1.0).round(4).tolist()
      [0.6931, 0.6931]
      >>> cosent_loss(queries, keys * scores, scores=scores, temperature=1.0).round(4).tolist()
      [0.0067, 0.0067]

    Reference:
      Huang et al., "CoSENT: Consistent Sentence Embedding via Similarity Ranking", 2024.
    """
    queries, keys, masks = checked_batch(
        queries, keys, masks, directions=("query_to_key",), temperature=temperature
    )
    if any(field is not None for field in masks._replace(valid=None)):
        raise ValueError("pairs are compared by their scores, so only masks.valid is allowed")
    scores = jnp.asarray(scores)
    if scores.shape != queries.shape[:1]:
        raise ValueError(
            f"scores have the shape {scores.shape}, not {queries.shape[:1]}; give one per row"
        )
    similarities = inner_product(queries, keys) / temperature
    valid = jnp.ones(scores.shape, bool) if masks.valid is None else masks.valid
    rows = _Rows(similarities, scores, valid)
    if axis_name is not None:
        rows = gather(rows, axis_name)
    return jnp.where(valid, _ranking_loss(rows), 0)


class _Rows(NamedTuple):
    """The values of each row that devices exchange."""

    similarities: Float[Array, " b"]
    scores: Float[Array, " b"]
    valid: Bool[Array, " b"]


def _ranking_loss(rows: _Rows) -> Float[Array, ""]:
    """The loss of the rows of all devices."""
    # Invalid rows come last, so no valid row has a higher score.
    scores = jnp.where(rows.valid, rows.scores, jnp.inf)
    order = jnp.argsort(scores)
    scores, valid = scores[order], rows.valid[order]
    similarities = jnp.where(valid, rows.similarities[order], 0)
    nothing = full_like_varying(1, -jnp.inf, similarities.dtype, similarities)
    sums = jnp.concatenate([nothing, lax.cumlogsumexp(similarities)])
    num_lower = jnp.searchsorted(scores, scores)  # the number of rows with a lower score
    terms = jnp.where(valid & (num_lower > 0), sums[num_lower] - similarities, -jnp.inf)
    return jax.nn.logsumexp(jnp.concatenate([jnp.zeros_like(nothing), terms]))
