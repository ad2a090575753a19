"""Synthetic negatives: mixtures of a query's hardest negatives, and rotated hard negatives."""

import jax
import jax.numpy as jnp

from jaxcl.ops.vectors import normalise
from jaxcl.typing import Array, Bool, Float, Int, Key

__all__ = ["mixed", "mixed_with_query", "perturbed"]


def mixed(
    keys: Key[Array, " q"],
    hardest: Float[Array, "q n d"],
    valid: Bool[Array, "q n"],
    *,
    count: int,
) -> tuple[Float[Array, "q _ d"], Bool[Array, "q _"]]:
    r"""Mix two of each query's hardest negatives: $\alpha h_i + (1-\alpha) h_j$, normalised.

    The two negatives differ, unless a query has only one.

    Args:
      keys: a random key for each query.
      hardest: each query's hardest negatives, of unit norm; valid negatives come first.
      valid: `False` where a query has fewer negatives.
      count: mixtures per query; $i$, $j$ and $\alpha \in [0, 1)$ are drawn uniformly.

    Returns:
      The mixtures, and whether each is valid; mixtures of a query without negatives are not.

    Reference:
      Kalantidis et al., "Hard Negative Mixing for Contrastive Learning" (MoCHi), 2020, equation 4.
    """
    uniform = _uniform(keys, 3, count)
    num_valid = valid.sum(1, dtype=jnp.int32)[:, None]
    first = _below(num_valid, uniform[:, 0])
    # An offset from 1 to n - 1, so that two negatives never coincide.
    second = (first + 1 + _below(num_valid - 1, uniform[:, 1])) % jnp.maximum(num_valid, 1)
    share = uniform[:, 2, :, None].astype(hardest.dtype)
    mixture = share * _at(hardest, first) + (1 - share) * _at(hardest, second)
    return normalise(mixture), _any(valid, count)


def mixed_with_query(
    keys: Key[Array, " q"],
    queries: Float[Array, "q d"],
    hardest: Float[Array, "q n d"],
    valid: Bool[Array, "q n"],
    *,
    count: int,
) -> tuple[Float[Array, "q _ d"], Bool[Array, "q _"]]:
    r"""Mix a query with one of its hardest negatives: $\beta q + (1 - \beta) h$, normalised.

    A mixture is at least as hard as its negative; with $\beta \in [0, 1/2)$, the negative has the
    larger share. Arguments as for `mixed`.

    Reference:
      Kalantidis et al., 2020, as for `mixed`, equation 5.
    """
    uniform = _uniform(keys, 2, count)
    share = uniform[:, 1, :, None].astype(hardest.dtype) / 2
    drawn = _at(hardest, _below(valid.sum(1, dtype=jnp.int32)[:, None], uniform[:, 0]))
    return normalise(share * queries[:, None] + (1 - share) * drawn), _any(valid, count)


def perturbed(
    keys: Key[Array, " q"],
    hardest: Float[Array, "q n d"],
    valid: Bool[Array, "q n"],
    *,
    count: int,
    degrees: float,
) -> tuple[Float[Array, "q _ d"], Bool[Array, "q _"]]:
    r"""Rotate hard negatives in a random direction: $\cos\theta\, h + \sin\theta\, u$.

    $u$ is a Gaussian vector without its component along $h$, scaled to unit norm, so that all
    directions are equally likely.

    Args:
      keys: a random key for each query.
      hardest: each query's hardest negatives, of unit norm; valid negatives come first.
      valid: `False` where a query has fewer negatives.
      count: rotated negatives per query.
      degrees: $\theta$.
    """
    num_valid = valid.sum(1, dtype=jnp.int32)[:, None]
    drawn = _at(hardest, _below(num_valid, _uniform(keys, 1, count)[:, 0]))
    width = hardest.shape[-1]

    # A different key from `_uniform`, so that the direction does not depend on the choice.
    def normal(key: Key[Array, ""]) -> Float[Array, "_ d"]:
        return jax.random.normal(jax.random.fold_in(key, 1), (count, width), jnp.float32)

    noise = jax.vmap(normal)(keys).astype(hardest.dtype)
    along = jnp.sum(noise * drawn, -1, keepdims=True) * drawn
    angle = jnp.deg2rad(jnp.asarray(degrees, hardest.dtype))
    rotated = jnp.cos(angle) * drawn + jnp.sin(angle) * normalise(noise - along)
    return rotated, _any(valid, count)


def _uniform(keys: Key[Array, " q"], rows: int, count: int) -> Float[Array, "q _ _"]:
    # Always float32, since enabling 64-bit types would otherwise change the draws.
    return jax.vmap(lambda key: jax.random.uniform(key, (rows, count), jnp.float32))(keys)


def _below(limit: Int[Array, "q 1"], uniform: Float[Array, "q _"]) -> Int[Array, "q _"]:
    """Integers in [0, limit); 0 if the limit is 0."""
    # Clipped, since a uniform number close to 1 may round up to the limit.
    return jnp.clip((uniform * limit).astype(jnp.int32), 0, jnp.maximum(limit - 1, 0))


def _at(hardest: Float[Array, "q n d"], indices: Int[Array, "q _"]) -> Float[Array, "q _ d"]:
    return jnp.take_along_axis(hardest, indices[:, :, None], axis=1)


def _any(valid: Bool[Array, "q n"], count: int) -> Bool[Array, "q _"]:
    return jnp.broadcast_to(valid.any(1, keepdims=True), (valid.shape[0], count))
