"""Vectors of integers, whose sums are exact in any order and on any number of devices."""

import jax.numpy as jnp

from jaxcl.typing import Array, Float

__all__ = ["LENGTH", "length_on_grid", "on_grid"]

LENGTH = 4_096
"""The maximum length of a vector on the grid, which limits inner products to 2^24."""


def on_grid(vectors: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Scale vectors to almost the same length, and round them to integers.

    Inner products of the results are integers of at most 2^24, as are all their partial sums
    (Cauchy–Schwarz), which float32 represents exactly. A product therefore does not depend on the
    tiling, nor do decisions based on it. Rounding changes a cosine by about 1e-4.

    Args:
      vectors: vectors of any length; zero vectors stay zero.

    Returns:
      Integers as float32. A row is at most `length_on_grid(d)` long before rounding and at most
      `LENGTH` after, and rarely more than 0.5% shorter.
    """
    vectors = vectors.astype(jnp.float32)
    largest = jnp.abs(vectors).max(1, keepdims=True)
    scaled = vectors / jnp.maximum(largest, jnp.finfo(jnp.float32).tiny)
    # Compute lengths from integers too, since sums of floats depend on their order. The number of
    # steps keeps the sum of `dim` squares at or below 2^30.
    dim = vectors.shape[1]
    steps = 2.0 ** ((30 - (dim - 1).bit_length()) // 2)
    coarse = jnp.round(scaled * steps).astype(jnp.int32)
    squares = jnp.maximum((coarse * coarse).sum(1, keepdims=True), 1).astype(jnp.float32)
    # An upper bound of the length: coarse rounding shortens a vector by at most √dim / 2 steps.
    longest = (jnp.sqrt(squares) + dim**0.5 / 2) / steps
    return jnp.round(scaled / longest * length_on_grid(dim))


def length_on_grid(dim: int) -> float:
    """The maximum length, before rounding, of vectors with `dim` features."""
    # Rounding can lengthen a vector by √dim / 2.
    return LENGTH - dim**0.5 / 2
