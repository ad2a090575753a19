"""A trained model on the present devices: texts in, embeddings out."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from tokenizers import Tokenizer

from jaxcl.models import Towers
from jaxcl.settings.sections import TextSpec
from jaxcl.step.embedder import Embedder, make_embedder, pad_texts
from jaxcl.typing import Float, Int, PyTree

__all__ = ["Encoder"]


class Encoder(NamedTuple):
    """What is needed to embed: no loss, no optimizer, no training data.

    Attributes:
      mesh: the devices.
      towers: the model.
      embedder: its compiled forward pass, `(params, side, tokens) -> embeddings`.
      params: the parameters of the towers.
      tokenizer: the run's own.
      text: how texts become tokens.
    """

    mesh: Mesh
    towers: Towers
    embedder: Embedder
    params: PyTree
    tokenizer: Tokenizer
    text: TextSpec

    def tokens(self, side: str, texts: Sequence[str]) -> Int[np.ndarray, "n t"]:
        """Token ids of texts, padded to the longest that the side reads."""
        return pad_texts(
            self.tokenizer,
            texts,
            max_tokens=getattr(self.text.max_tokens, side),
            add_cls=self.text.add_cls,
            distinct=self.text.distinct_tokens,
        )

    def embed(
        self,
        side: str,
        tokens: Int[np.ndarray, "n t"],
        *,
        advance: Callable[[int], None] = lambda rows: None,
    ) -> Float[np.ndarray, "n d"]:
        """Embeddings of token ids: float32 unit vectors on the host.

        Args:
          side: `"query"` or `"key"`.
          tokens: ids, padded.
          advance: called with the number of rows as they are done.
        """
        return self.embedder(self.params, side, tokens, advance=advance)

    def encode(self, side: str, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """Embeddings of texts."""
        return self.embed(side, self.tokens(side, texts))

    def for_batches_of(self, rows: int) -> "Encoder":
        """The same encoder, compiled for batches of this many rows."""
        return self._replace(embedder=make_embedder(self.towers.encode, self.mesh, batch_size=rows))
