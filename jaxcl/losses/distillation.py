"""A teacher's opinion of each query's candidates, to be shared."""

import jax
import jax.numpy as jnp

from jaxcl.losses.comparison import check_sides, own_products
from jaxcl.ops.vectors import inner_product
from jaxcl.typing import Array, AxisName, Bool, Float

__all__ = ["distillation_loss"]


def distillation_loss(
    queries: Float[Array, "q d"],
    keys: Float[Array, "q d"],
    *,
    teacher_scores: Float[Array, "q _"],
    negatives: Float[Array, "q n d"] | None = None,
    negatives_valid: Bool[Array, "q n"] | None = None,
    temperature: float | Float[Array, ""] | Float[Array, " q"] = 0.05,
    teacher_temperature: float = 1.0,
    valid: Bool[Array, " q"] | None = None,
    axis_name: AxisName | None = None,
    exchange: str = "gather",
    implementation: str | None = None,
) -> Float[Array, " q"]:
    r"""The divergence of a query's candidates' softmax from a teacher's, one value per query.

    With $p_i$ the softmax of the teacher's scores over $\tau'$ and $s_{ij}$ the own scores of row
    $i$'s candidates, its key and its explicit negatives,

    $$\ell_i = \sum_j p_{ij} \Big(\log p_{ij} - \log \frac{e^{s_{ij}}}{\sum_l e^{s_{il}}}\Big).$$

    Args:
      queries: this device's queries.
      keys: this device's keys.
      teacher_scores: the key's, then the explicit negatives', such as a cross-encoder's logits.
      negatives: explicit negatives of each row.
      negatives_valid: `False` where a row has fewer; what the teacher says of those is not read.
      temperature: $\tau > 0$.
      teacher_temperature: $\tau' > 0$.
      valid: `False` for padding, which has the value 0.
      axis_name: taken as by all losses; a row's candidates are its own, so nothing crosses devices.
      exchange: likewise.
      implementation: likewise.

    Returns:
      The divergence of each of this device's queries, in nats, at least 0.

    Raises:
      ValueError: for sides or scores that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> sides, others = jnp.eye(2), jnp.eye(2)[::-1, None]
      >>> scores = jnp.array([[1.0, 0.0], [0.0, 1.0]])  # this teacher finds the second row wrong
      >>> distillation_loss(
      ...     sides, sides, negatives=others, teacher_scores=scores, temperature=1.0
      ... ).round(4).tolist()
      [0.0, 0.4621]

    Reference:
      Hinton et al., "Distilling the Knowledge in a Neural Network", 2015; over the candidates of a
      query, Ren et al., "RocketQAv2", 2021, equation 3.
    """
    del axis_name, exchange, implementation
    check_sides(queries, keys, ("query_to_key",))
    similarities = inner_product(queries, keys)[:, None]
    counted = jnp.ones(similarities.shape, bool)
    if negatives is not None:
        similarities = jnp.concatenate([similarities, own_products(queries, negatives)], 1)
        own = jnp.ones(negatives.shape[:2], bool) if negatives_valid is None else negatives_valid
        counted = jnp.concatenate([counted, own], 1)
    if teacher_scores.shape != similarities.shape:
        raise ValueError(
            f"teacher_scores have the shape {teacher_scores.shape}; wanted is {similarities.shape}:"
            " the key's score, then one for each explicit negative"
        )
    scores = similarities / jnp.reshape(jnp.asarray(temperature), (-1, 1))
    teacher = jnp.where(counted, teacher_scores, 0).astype(scores.dtype) / teacher_temperature
    log_wanted, log_found = (
        jnp.where(counted, jax.nn.log_softmax(given, where=counted), 0)
        for given in (jax.lax.stop_gradient(teacher), scores)
    )
    wanted = jnp.where(counted, jnp.exp(log_wanted), 0)
    loss = (wanted * (log_wanted - log_found)).sum(1)
    return loss if valid is None else jnp.where(valid, loss, 0)
