"""One embedding that is good at several lengths."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from jaxcl.ops.vectors import normalise
from jaxcl.typing import Array, Float

__all__ = ["matryoshka"]


def matryoshka(
    loss_fn: Callable[..., Float[Array, " q"]],
    *,
    dims: Sequence[int],
    weights: Sequence[float] | None = None,
) -> Callable[..., Float[Array, " q"]]:
    r"""Sums a loss over nested lengths of the embeddings: $\sum_d w_d\, \ell(q_{1:d}, k_{1:d})$.

    Each length is normalised anew.

    Args:
      loss_fn: of `jaxcl.losses`.
      dims: the lengths, each once, at most that of the embeddings.
      weights: one per length; 1 each by default.

    Returns:
      A loss of the same signature.

    Raises:
      ValueError: for lengths or weights that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxcl.losses import infonce_loss
      >>> nested_loss = matryoshka(infonce_loss, dims=(2, 4))
      >>> nested_loss(jnp.eye(4)[:2], jnp.eye(4)[:2], temperature=1.0).round(4).tolist()
      [0.6265, 0.6265]

    Reference:
      Kusupati et al., "Matryoshka Representation Learning", 2022, equation 1.
    """
    weights = [1.0] * len(dims) if weights is None else list(weights)
    if not dims or min(dims) < 1 or len(set(dims)) < len(dims) or len(weights) != len(dims):
        raise ValueError(
            f"dims={tuple(dims)}, weights={tuple(weights)}: give lengths of at least 1, each once, "
            "and one weight for each"
        )

    @functools.wraps(loss_fn)
    def nested_loss(
        queries: Float[Array, "q d"], keys: Float[Array, "q d"], **options: Any
    ) -> Float[Array, " q"]:
        if max(dims) > queries.shape[1]:
            raise ValueError(f"dims={tuple(dims)} of embeddings that have {queries.shape[1]}")
        parts = (
            weight * loss_fn(normalise(queries[:, :dim]), normalise(keys[:, :dim]), **options)
            for dim, weight in zip(dims, weights, strict=True)
        )
        return functools.reduce(lambda total, part: total + part, parts)

    return nested_loss
