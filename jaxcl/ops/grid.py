"""Vectors of integers, whose sums are exact in any order and on any number of devices."""

import jax.numpy as jnp

from jaxcl.typing import Array, Float

__all__ = ["LENGTH", "length_on_grid", "on_grid"]

LENGTH = 4_096
"""The greatest length of a vector on the grid: inner products are then at most 2^24."""


def on_grid(vectors: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Vectors scaled to almost the same length and rounded to integers.

    Inner products of the results are integers of at most 2^24, as are all their partial sums
    (Cauchy–Schwarz), and float32 holds these exactly. A product is therefore the same however it is
    tiled, and so are all decisions based on it. Rounding changes a cosine by about 1e-4.

    Args:
      vectors: vectors of any length; zero vectors stay zero.

    Returns:
      Integers as float32. A row is at most `length_on_grid(d)` long before it is rounded, at most
      `LENGTH` after, and rarely .5 % shorter.
    """
    vectors = vectors.astype(jnp.float32)
    greatest = jnp.abs(vectors).max(1, keepdims=True)
    scaled = vectors / jnp.maximum(greatest, jnp.finfo(jnp.float32).tiny)
    # Lengths come from integers, too, since a sum of floats depends on its order. The number of
    # steps keeps the sum of `dim` squares at most 2^30.
    dim = vectors.shape[1]
    steps = 2.0 ** ((30 - (dim - 1).bit_length()) // 2)
    coarse = jnp.round(scaled * steps).astype(jnp.int32)
    squares = jnp.maximum((coarse * coarse).sum(1, keepdims=True), 1).astype(jnp.float32)
    # Coarse rounding can shorten a vector by √dim / 2 steps at most: an upper bound of its length.
    longest = (jnp.sqrt(squares) + dim**0.5 / 2) / steps
    return jnp.round(scaled / longest * length_on_grid(dim))


def length_on_grid(dim: int) -> float:
    """The length of vectors with `dim` features before they are rounded."""
    # Rounding can lengthen a vector by √dim / 2.
    return LENGTH - dim**0.5 / 2
