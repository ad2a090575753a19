"""Losses that train embeddings to match the scores or the embeddings of a teacher."""

from collections.abc import Mapping
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.losses.comparison import TEMPERATURES, checked_batch
from jaxcl.losses.protocol import NO_MASKS, Masks
from jaxcl.losses.reduce_negatives import own_products
from jaxcl.negatives.sets import ExplicitNegatives
from jaxcl.ops.arguments import as_vectors, check_numbers
from jaxcl.ops.vectors import inner_product, normalise
from jaxcl.typing import Array, Bool, Float, Range

__all__ = [
    "DistillationOptions",
    "EmbeddingDistillationOptions",
    "distillation_loss",
    "embedding_distillation_loss",
    "margin_mse_loss",
]

_EXPLICIT = "explicit"


class DistillationOptions(NamedTuple):
    """Options of `distillation_loss` and `margin_mse_loss` in a config."""

    teacher_temperature: Annotated[float, Range(above=0)] | None = None


class EmbeddingDistillationOptions(NamedTuple):
    """Options of `embedding_distillation_loss` in a config."""

    truncate_teacher: bool | None = None


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
    teacher's scores divided by $\tau'$, and $s_{ij}$ the model's scores divided by $\tau$,

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
    candidates = _candidates(
        queries,
        keys,
        teacher_scores,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        masks=masks,
        negatives=negatives,
    )
    log_target, log_model = (
        jnp.where(candidates.valid, jax.nn.log_softmax(logits, where=candidates.valid), 0)
        for logits in (candidates.teacher_scores, candidates.scores)
    )
    target = jnp.where(candidates.valid, jnp.exp(log_target), 0)
    loss = (target * (log_target - log_model)).sum(1)
    return loss if masks.valid is None else jnp.where(masks.valid, loss, 0)


def margin_mse_loss(
    queries: Float[Array, "q d"],
    keys: Float[Array, "q d"],
    *,
    teacher_scores: Float[Array, "q _"],
    temperature: float | Float[Array, ""] | Float[Array, " q"] = 1.0,
    teacher_temperature: float = 1.0,
    masks: Masks = NO_MASKS,
    negatives: dict[str, ExplicitNegatives] | None = None,
) -> Float[Array, " q"]:
    r"""The squared difference between a teacher's and the model's margins, one value per query.

    Row $i$'s candidates are its key, $j = 0$, and its $n$ explicit negatives. With $s_{ij}$ the
    model's scores divided by $\tau$ and $t_{ij}$ the teacher's scores divided by $\tau'$,

    $$\ell_i = \frac{1}{n} \sum_{j=1}^{n} \big((s_{i0} - s_{ij}) - (t_{i0} - t_{ij})\big)^2.$$

    Candidates are not shared between rows, so devices do not communicate.

    Args:
      queries: this device's queries.
      keys: this device's keys.
      teacher_scores: the scores of the key and of each explicit negative, such as a cross-encoder's
        logits.
      temperature: $\tau > 0$. Margins of unit vectors are at most 2, and margins of logits may be
        20, so one of the temperatures has to bring both to the same scale; a learned temperature
        adapts by itself.
      teacher_temperature: $\tau' > 0$.
      masks: only `valid` is allowed.
      negatives: `{"explicit": …}`; the teacher's scores of invalid negatives are ignored.

    Returns:
      For each of this device's queries, the mean over its negatives, at least 0; 0 without
      negatives.

    Raises:
      ValueError: if the shapes of queries, keys, scores and negatives do not match, or for masks
        other than `valid`.

    Example:
      >>> import jax.numpy as jnp
      >>> sides, others = jnp.eye(2), ExplicitNegatives(jnp.eye(2)[::-1, None])
      >>> scores = jnp.array([[3.0, 2.0], [3.0, 0.0]])  # the model's margins are 1 and 1
      >>> margin_mse_loss(
      ...     sides, sides, negatives={"explicit": others}, teacher_scores=scores
      ... ).tolist()
      [0.0, 4.0]

    Reference:
      Hofstätter et al., "Improving Efficient Neural Ranking Models with Cross-Architecture
      Knowledge Distillation", 2020.
    """
    candidates = _candidates(
        queries,
        keys,
        teacher_scores,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        masks=masks,
        negatives=negatives,
    )
    margins, teacher_margins = (
        scores[:, :1] - scores[:, 1:] for scores in (candidates.scores, candidates.teacher_scores)
    )
    valid = candidates.valid[:, 1:]
    squares = jnp.where(valid, margins - teacher_margins, 0) ** 2
    loss = squares.sum(1) / jnp.maximum(valid.sum(1), 1)
    return loss if masks.valid is None else jnp.where(masks.valid, loss, 0)


def embedding_distillation_loss(
    queries: Float[Array, "q d"],
    keys: Float[Array, "q d"],
    *,
    teacher_vectors: Mapping[str, Float[Array, "q t"]],
    truncate_teacher: bool = False,
    masks: Masks = NO_MASKS,
) -> Float[Array, " q"]:
    r"""One minus the cosine between the model's and a teacher's embeddings, one value per row.

    With the teacher's embeddings $t_i$ of query $i$ and $u_i$ of key $i$,

    $$\ell_i = 1 - \frac{\cos(q_i, t_i) + \cos(k_i, u_i)}{2}.$$

    Rows are not compared with each other, so devices do not communicate, and there is no
    temperature.

    Args:
      queries: this device's queries.
      keys: this device's keys.
      teacher_vectors: the teacher's embeddings of both sides, `"query"` and `"key"`.
      truncate_teacher: whether to truncate the embeddings of a teacher with more features than the
        model, which suits teachers trained with `matryoshka`. By default, it is an error.
      masks: only `valid` is allowed.

    Returns:
      The loss of each of this device's rows, from 0 to 2.

    Raises:
      ValueError: if the shapes of the model's and the teacher's embeddings do not match, or for
        masks other than `valid`.

    Example:
      >>> import jax.numpy as jnp
      >>> sides, teacher = jnp.eye(2), {"query": jnp.eye(2), "key": jnp.eye(2)[::-1]}
      >>> embedding_distillation_loss(sides, sides, teacher_vectors=teacher).round(4).tolist()
      [0.5, 0.5]

    Relations:
      For unit vectors with `d` features, the loss is `d / 2` times the mean squared error over both
      sides.

    Reference:
      Reimers and Gurevych, "Making Monolingual Sentence Embeddings Multilingual using Knowledge
      Distillation", 2020, with the cosine instead of the squared error.
    """
    queries, keys, masks = checked_batch(
        queries, keys, masks, directions=("query_to_key",), temperature=1.0
    )
    if any(field is not None for field in masks._replace(valid=None)):
        raise ValueError("rows are not compared with each other, so only masks.valid is allowed")
    cosines = []
    for side, vectors in (("query", queries), ("key", keys)):
        teacher = as_vectors(f"teacher_vectors[{side!r}]", teacher_vectors[side])
        if truncate_teacher:
            teacher = teacher[:, : vectors.shape[1]]
        if teacher.shape != vectors.shape:
            raise ValueError(
                f"teacher_vectors[{side!r}] have the shape {teacher.shape}, and the model's have "
                f"{vectors.shape}; give the model as many features as the teacher has, or set "
                "truncate_teacher to use the first features of a wider teacher"
            )
        teacher = jax.lax.stop_gradient(normalise(teacher.astype(vectors.dtype)))
        cosines.append(inner_product(normalise(vectors), teacher))
    loss = 1 - (cosines[0] + cosines[1]) / 2
    return loss if masks.valid is None else jnp.where(masks.valid, loss, 0)


class _Candidates(NamedTuple):
    """The key and the explicit negatives of each row.

    Attributes:
      scores: the model's scores.
      teacher_scores: the teacher's scores divided by its temperature, without gradient; 0 where
        invalid.
      valid: `False` for the padding of rows with fewer negatives than others.
    """

    scores: Float[Array, "q _"]
    teacher_scores: Float[Array, "q _"]
    valid: Bool[Array, "q _"]


def _candidates(
    queries: Float[Array, "q d"],
    keys: Float[Array, "q d"],
    teacher_scores: Float[Array, "q _"],
    *,
    temperature: float | Float[Array, ""] | Float[Array, " q"],
    teacher_temperature: float,
    masks: Masks,
    negatives: dict[str, ExplicitNegatives] | None,
) -> _Candidates:
    """Check the arguments of a loss with teacher scores, and score the candidates of each row."""
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
    return _Candidates(scores, jax.lax.stop_gradient(teacher), valid)
