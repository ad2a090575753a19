"""Synthetic negatives: mixtures of a query's hardest negatives, and slightly rotated ones."""

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
    r"""Normalised mixtures of two of each query's hardest negatives: $\alpha h_i + (1-\alpha) h_j$.

    The two are different, unless a query has only one.

    Args:
      keys: a random key for each query.
      hardest: its hardest negatives, of unit norm; the valid ones come first.
      valid: `False` where a query has fewer negatives.
      count: mixtures per query; $i$, $j$ and $\alpha \in [0, 1)$ are drawn uniformly.

    Returns:
      The mixtures, and whether each is valid: none is for a query without negatives.

    Reference:
      Kalantidis et al., "Hard Negative Mixing for Contrastive Learning" (MoCHi), 2020, equation 4.
    """
    uniform = _uniform(keys, 3, count)
    there = valid.sum(1, dtype=jnp.int32)[:, None]
    first = _below(there, uniform[:, 0])
    # One to n - 1 places further round, so that the two never coincide if there are two.
    second = (first + 1 + _below(there - 1, uniform[:, 1])) % jnp.maximum(there, 1)
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
    r"""Normalised mixtures of a query and one of its hardest negatives: $\beta q + (1 - \beta) h$.

    A mixture is at least as hard as its negative; $\beta \in [0, 1/2)$ keeps the query the smaller
    part. Arguments as for `mixed`.

    Reference:
      The same, equation 5.
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
    r"""Hard negatives rotated in a random direction: $\cos\theta\, h + \sin\theta\, u$.

    $u$ is a Gaussian vector without its part along $h$, of unit norm, so that all directions are
    equally likely.

    Args:
      keys: a random key for each query.
      hardest: its hardest negatives, of unit norm; the valid ones come first.
      valid: `False` where a query has fewer negatives.
      count: rotated negatives per query.
      degrees: $\theta$.
    """
    there = valid.sum(1, dtype=jnp.int32)[:, None]
    drawn = _at(hardest, _below(there, _uniform(keys, 1, count)[:, 0]))
    width = hardest.shape[-1]

    # Another key than `_uniform` uses, so that the direction is independent of the choice.
    def normal(key: Key[Array, ""]) -> Float[Array, "_ d"]:
        return jax.random.normal(jax.random.fold_in(key, 1), (count, width), jnp.float32)

    noise = jax.vmap(normal)(keys).astype(hardest.dtype)
    along = jnp.sum(noise * drawn, -1, keepdims=True) * drawn
    angle = jnp.deg2rad(jnp.asarray(degrees, hardest.dtype))
    turned = jnp.cos(angle) * drawn + jnp.sin(angle) * normalise(noise - along)
    return turned, _any(valid, count)


def _uniform(keys: Key[Array, " q"], rows: int, count: int) -> Float[Array, "q _ _"]:
    # In float32, or 64-bit types would change the draws.
    return jax.vmap(lambda key: jax.random.uniform(key, (rows, count), jnp.float32))(keys)


def _below(limit: Int[Array, "q 1"], uniform: Float[Array, "q _"]) -> Int[Array, "q _"]:
    """Integers from 0 to below the limit; 0 if the limit is 0."""
    # Clipped, since a uniform number close to 1 times the limit may round up to the limit.
    return jnp.clip((uniform * limit).astype(jnp.int32), 0, jnp.maximum(limit - 1, 0))


def _at(hardest: Float[Array, "q n d"], places: Int[Array, "q _"]) -> Float[Array, "q _ d"]:
    return jnp.take_along_axis(hardest, places[:, :, None], axis=1)


def _any(valid: Bool[Array, "q n"], count: int) -> Bool[Array, "q _"]:
    return jnp.broadcast_to(valid.any(1, keepdims=True), (valid.shape[0], count))
