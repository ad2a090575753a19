"""Static embeddings: one vector per token, independent of its context."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcl.models.embedding_bag import embedding_bag
from jaxcl.models.layers import Hidden, TokenMask, activation_dtype
from jaxcl.models.pretrained.description import PLAIN, Computation, Family, Tensor
from jaxcl.typing import Embeddings, RowKeys, Tokens

__all__ = ["MODEL2VEC", "STATIC_EMBEDDING", "StaticEmbedding"]


class StaticEmbedding(nnx.Module):
    """Look up the embeddings of a text's tokens.

    Args:
      vocabulary_size: rows of the token table.
      dim: width of the embeddings.
      weighted: whether each token has a weight that scales its embedding.
      compute_dtype: type of the output; `None` means bfloat16 on accelerators and float32 on CPUs.
      rngs: random streams for the initial parameters.
    """

    def __init__(
        self,
        vocabulary_size: int,
        dim: int,
        *,
        weighted: bool = False,
        compute_dtype: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.token_table = nnx.Param(
            jax.random.normal(rngs.params(), (vocabulary_size, dim)) * dim**-0.5
        )
        self.token_weight = nnx.Param(jnp.ones((vocabulary_size,))) if weighted else None
        self.dtype = activation_dtype(compute_dtype)

    def __call__(self, tokens: Tokens, mask: TokenMask, rngs: RowKeys | None = None) -> Hidden:
        """Look up the embedding of each token, in the same way in training and evaluation."""
        hidden = self.token_table[...][tokens]
        if self.token_weight is not None:
            hidden *= self.token_weight[...][tokens][..., None]
        return hidden.astype(self.dtype)

    def mean(self, tokens: Tokens, mask: TokenMask) -> Embeddings:
        """The mean embedding of each text, computed without the array `[b, t, d]`."""
        table = self.token_table[...]
        weights = (mask / jnp.maximum(mask.sum(1, keepdims=True), 1)).astype(table.dtype)
        if self.token_weight is not None:
            weights *= self.token_weight[...][tokens]
        return embedding_bag(table, tokens, weights)


def _shape(config: Mapping[str, Any], name: str) -> tuple[int, ...]:
    return tuple(config["tensors"][name])


def static_family(table: str, weights: str | None = None) -> Family:
    """A family of static embeddings.

    Folders of static embeddings have no sizes in `config.json`. The config passed to this family
    instead holds the shapes of the tensors, `{"tensors": {name: shape}}`.

    Args:
      table: name of the tensor of embeddings, `[v, d]`.
      weights: name of the optional tensor of token weights, `[v]`.
    """

    def weighted(config: Mapping[str, Any]) -> bool:
        return weights in config["tensors"]

    def make(
        config: Mapping[str, Any], computation: Computation = PLAIN, *, rngs: nnx.Rngs
    ) -> nnx.Module:
        if "mapping" in config["tensors"]:
            raise ValueError(
                "the tokens of these embeddings share rows (the tensor 'mapping'), which is not "
                "supported; save them without vocabulary quantization"
            )
        dropout, remat, compute_dtype = computation
        if dropout or remat:
            option = f"dropout={dropout}" if dropout else "remat=True"
            raise ValueError(f"{option} has no effect on static embeddings; leave it out")
        v, d = _shape(config, table)
        return StaticEmbedding(
            v, d, weighted=weighted(config), compute_dtype=compute_dtype, rngs=rngs
        )

    def tensors(config: Mapping[str, Any]) -> dict[str, Tensor]:
        of_weights = {"token_weight": Tensor(weights)} if weights and weighted(config) else {}
        return {"token_table": Tensor(table)} | of_weights

    return Family(
        prefixes=(),
        make=make,
        tensors=tensors,
        hidden_dim=lambda config: _shape(config, table)[1],
        vocabulary_size=lambda config: _shape(config, table)[0],
        max_tokens=lambda config: None,
        any_width=False,
    )


STATIC_EMBEDDING = static_family("embedding.weight")
MODEL2VEC = static_family("embeddings", "weights")
