"""Train embeddings that can be truncated to several lengths."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxcl.losses.protocol import Loss, NegativesByName
from jaxcl.ops.arguments import as_vectors, check_numbers
from jaxcl.ops.vectors import normalise
from jaxcl.typing import Array, Float, PyTree, Range

__all__ = ["matryoshka", "nested"]


def matryoshka(
    loss_fn: Callable[..., Any],
    *,
    dims: Sequence[int],
    weights: Sequence[float] | None = None,
) -> Callable[..., Any]:
    r"""Sum a loss over nested lengths of the embeddings: $\sum_d w_d\, \ell(q_{1:d}, k_{1:d})$.

    Each length is normalised separately. Negatives from outside the batch are truncated in the same
    way; the embeddings of a guide model are not.

    Args:
      loss_fn: a loss of `jaxcl.losses`, or any `LossFn`.
      dims: distinct lengths, at most the length of the embeddings.
      weights: a weight for each length; 1 by default.

    Returns:
      A loss with the same arguments. If `loss_fn` takes and returns `memory`, the returned loss has
      a memory that maps each length to the memory of `loss_fn`.

    Raises:
      ValueError: if lengths or weights are invalid.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxcl.losses import infonce_loss
      >>> nested_loss = matryoshka(infonce_loss, dims=(2, 4))
      >>> nested_loss(jnp.eye(4)[:2], jnp.eye(4)[:2], temperature=1.0).round(4).tolist()
      [0.6265, 0.6265]

    Reference:
      Kusupati et al., "Matryoshka Representation Learning", 2022, equation 1.
    """
    check_numbers("weights", [] if weights is None else list(weights), Range(least=0))
    weights = [1.0] * len(dims) if weights is None else list(weights)
    if not dims or min(dims) < 1 or len(set(dims)) < len(dims) or len(weights) != len(dims):
        raise ValueError(
            f"dims={tuple(dims)}, weights={tuple(weights)}; give distinct lengths of at least 1, "
            "and one weight per length"
        )

    def nested_loss(
        queries: Float[Array, "q d"],
        keys: Float[Array, "q d"],
        *,
        negatives: NegativesByName | None = None,
        memory: Mapping[str, PyTree] | None = None,
        **options: Any,
    ) -> Any:
        queries, keys = as_vectors("queries", queries), as_vectors("keys", keys)
        if max(dims) > queries.shape[1]:
            raise ValueError(
                f"dims={tuple(dims)} exceed the {queries.shape[1]} features of the embeddings"
            )
        parts, updated = [], {}
        for dim, weight in zip(dims, weights, strict=True):
            arguments = dict(options)
            if negatives is not None:
                arguments["negatives"] = {
                    name: _truncated(tier, dim) for name, tier in negatives.items()
                }
            if memory is not None:
                arguments["memory"] = memory[_name(dim)]
            loss = loss_fn(normalise(queries[:, :dim]), normalise(keys[:, :dim]), **arguments)
            if memory is not None:
                loss, updated[_name(dim)] = loss
            elif isinstance(loss, tuple):
                raise ValueError(
                    f"{getattr(loss_fn, '__name__', loss_fn)} returns more than the loss; use a "
                    "loss with memory, such as "
                    "jaxcl.losses.running_estimate.remembered_estimate_loss"
                )
            parts.append(weight * loss)
        total = functools.reduce(lambda total, part: total + part, parts)
        return total if memory is None else (total, updated)

    return nested_loss


def nested(loss: Loss, *, dims: Sequence[int]) -> Loss:
    """Declare `matryoshka(loss.function, dims=dims)` as a `Loss`."""
    init_memory = loss.init_memory

    def init_each(num_rows: int, **options: Any) -> dict[str, PyTree]:
        assert init_memory is not None
        return {_name(dim): init_memory(num_rows, **options) for dim in dims}

    return loss._replace(
        function=matryoshka(loss.function, dims=dims),
        init_memory=None if init_memory is None else init_each,
    )


def _truncated(negatives: Any, dim: int) -> Any:
    vectors = as_vectors("negatives", negatives.vectors, axes=jnp.ndim(negatives.vectors))
    return negatives._replace(vectors=normalise(vectors[..., :dim]))


def _name(dim: int) -> str:
    """The key of a length in the memory; checkpoints need string keys."""
    return str(dim)
