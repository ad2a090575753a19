"""The common parts of image encoders: preprocessing of the pixels, and the projection head."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcl.models.layers import activation_dtype, images_of, unit_vectors
from jaxcl.models.vision.entry import PixelRule, enter
from jaxcl.typing import Array, Embeddings, Float, PyTree, RowKeys

__all__ = ["HALF", "ImageEncoder", "Pixels", "ProjectionHead"]

HALF = (0.5, 0.5, 0.5)
"""The default mean and standard deviation of pixels, which map [0, 1] to [-1, 1]."""

Pixels = Float[Array, "b s s 3"]


class ProjectionHead(nnx.Module):
    """Linear layers with ReLU between them, from the features of a backbone to embeddings.

    Args:
      features: the width of the features.
      hidden: the widths of the hidden layers; `()` for a single linear layer.
      dim: the dimension of the embeddings.
      dtype: type of activations.
      rngs: random streams for the initial parameters.

    Reference:
      Chen et al., "Improved Baselines with Momentum Contrastive Learning", 2020: a head without
      normalisation.
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int],
        dim: int,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        widths = (features, *hidden, dim)
        self.layers = nnx.List(
            [
                nnx.Linear(before, after, dtype=dtype, rngs=rngs)
                for before, after in itertools.pairwise(widths)
            ]
        )

    def __call__(self, features: Float[Array, "b h"]) -> Float[Array, "b d"]:
        *hidden, last = self.layers
        for layer in hidden:
            features = jax.nn.relu(layer(features))
        return last(features)


class ImageEncoder(nnx.Module):
    """Preprocessing, a backbone that subclasses define in `backbone`, and a projection head.

    Args:
      rule: the size and normalisation of the pixels.
      compute_dtype: type of activations; `None` uses bfloat16 on accelerators and float32
        elsewhere.
    """

    head: ProjectionHead

    def __init__(self, rule: PixelRule, *, compute_dtype: str | None):
        self.rule = rule
        self.dtype = activation_dtype(compute_dtype)

    def backbone(self, pixels: Pixels, rngs: RowKeys | None) -> Float[Array, "b h"]:
        """Compute the features of images below the projection head."""
        raise NotImplementedError

    def __call__(self, inputs: PyTree, rngs: RowKeys | None = None) -> Embeddings:
        """Embed `{"image": [b, height, width, 3]}`: uint8, or floats in [0, 1]."""
        return unit_vectors(self.head(self._backbone_of(inputs, rngs)))

    def features(self, inputs: PyTree, rngs: RowKeys | None = None) -> Embeddings:
        """Embed the same inputs as the backbone's features, scaled to unit vectors."""
        return unit_vectors(self._backbone_of(inputs, rngs))

    def _backbone_of(self, inputs: PyTree, rngs: RowKeys | None) -> Float[Array, "b h"]:
        pixels = enter(images_of(inputs, type(self).__name__), self.rule)
        return self.backbone(pixels.astype(self.dtype), rngs)
