"""A loss that trains each query's scores to match a teacher's."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.losses.comparison import TEMPERATURES, checked_batch
from jaxcl.losses.protocol import NO_MASKS, Masks
from jaxcl.losses.reduce_negatives import own_products
from jaxcl.negatives.sets import ExplicitNegatives
from jaxcl.ops.arguments import as_vectors, check_numbers
from jaxcl.ops.vectors import inner_product
from jaxcl.typing import Array, Float, Range

__all__ = ["DistillationOptions", "distillation_loss"]

_EXPLICIT = "explicit"


class DistillationOptions(NamedTuple):
    """Options of `distillation_loss` in a config."""

    teacher_temperature: Annotated[float, Range(above=0)] | None = None


def distillation_loss(
    queries: Float[Array, "q d"],
    keys: Float[Array, "q d"],
    *,
    teacher_scores: Float[Array, "q _"],
    temperature: float | Float[Array, ""] | Float[Array, " q"] = 0.05,
    teacher_temperature: float = 1.0,
    masks: Masks = NO_MASKS,
    negatives: dict[str, ExplicitNegatives] | None = None,
) -> Float[Array, " q"]:
    r"""The KL divergence between a teacher's and the model's softmax, one value per query.

    Row $i$'s candidates are its key and its explicit negatives. With $p_i$ the softmax of the
    teacher's scores over $\tau'$ and $s_{ij}$ the model's scores,

    $$\ell_i = \sum_j p_{ij} \Big(\log p_{ij} - \log \frac{e^{s_{ij}}}{\sum_l e^{s_{il}}}\Big).$$

    Candidates are not shared between rows, so devices do not communicate.

    Args:
      queries: this device's queries.
      keys: this device's keys.
      teacher_scores: the scores of the key and of each explicit negative, such as a cross-encoder's
        logits.
      temperature: $\tau > 0$.
      teacher_temperature: $\tau' > 0$.
      masks: only `valid` is allowed.
      negatives: `{"explicit": …}`; the teacher's scores of invalid negatives are ignored.

    Returns:
      The divergence of each of this device's queries, in nats, at least 0.

    Raises:
      ValueError: if the shapes of queries, keys, scores and negatives do not match, or for masks
        other than `valid`.

    Example:
      >>> import jax.numpy as jnp
      >>> sides, others = jnp.eye(2), ExplicitNegatives(jnp.eye(2)[::-1, None])
      >>> scores = jnp.array([[1.0, 0.0], [0.0, 1.0]])  # the teacher disagrees on the second row
      >>> distillation_loss(
      ...     sides, sides, negatives={"explicit": others}, teacher_scores=scores, temperature=1.0
      ... ).round(4).tolist()
      [0.0, 0.4621]

    Reference:
      Hinton et al., "Distilling the Knowledge in a Neural Network", 2015; over the candidates of a
      query, Ren et al., "RocketQAv2", 2021, equation 3.
    """
    queries, keys, masks = checked_batch(
        queries, keys, masks, directions=("query_to_key",), temperature=temperature
    )
    check_numbers("teacher_temperature", teacher_temperature, TEMPERATURES)
    if any(field is not None for field in masks._replace(valid=None)):
        raise ValueError("the teacher scores every candidate, so only masks.valid is allowed")
    if unknown := set(negatives or {}) - {_EXPLICIT}:
        raise ValueError(f"negatives has {sorted(unknown)}; only {_EXPLICIT!r} is allowed")
    teacher_scores = as_vectors("teacher_scores", teacher_scores)
    similarities = inner_product(queries, keys)[:, None]
    valid = jnp.ones(similarities.shape, bool)
    if negatives:
        explicit = negatives[_EXPLICIT]
        vectors = as_vectors(f"negatives[{_EXPLICIT!r}]", explicit.vectors, axes=3)
        similarities = jnp.concatenate([similarities, own_products(queries, vectors)], 1)
        all_valid = jnp.ones(vectors.shape[:2], bool)
        valid = jnp.concatenate([valid, all_valid if explicit.valid is None else explicit.valid], 1)
    if teacher_scores.shape != similarities.shape:
        raise ValueError(
            f"teacher_scores have the shape {teacher_scores.shape}, not {similarities.shape}; give "
            "the key's score, then one per explicit negative"
        )
    scores = similarities / jnp.reshape(jnp.asarray(temperature), (-1, 1))
    teacher = jnp.where(valid, teacher_scores, 0).astype(scores.dtype) / teacher_temperature
    log_target, log_model = (
        jnp.where(valid, jax.nn.log_softmax(logits, where=valid), 0)
        for logits in (jax.lax.stop_gradient(teacher), scores)
    )
    target = jnp.where(valid, jnp.exp(log_target), 0)
    loss = (target * (log_target - log_model)).sum(1)
    return loss if masks.valid is None else jnp.where(masks.valid, loss, 0)
