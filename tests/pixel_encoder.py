"""A small encoder of images for tests of data: a linear layer on the pixels."""

import jax.numpy as jnp
from flax import nnx

from jaxcl.ops.vectors import normalise


class PixelEncoder(nnx.Module):
    """A linear layer on all pixels, in [-1, 1]."""

    def __init__(self, size, *, dim, rngs):
        self.linear = nnx.Linear(3 * size * size, dim, rngs=rngs)

    def __call__(self, inputs, rngs=None):
        image = inputs["image"]
        pixels = image.reshape(len(image), -1).astype(jnp.float32) / 127.5 - 1
        return normalise(self.linear(pixels))
