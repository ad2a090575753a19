"""Embeds many rows or texts with a trained model: forward only, in batches over the mesh."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from tokenizers import Tokenizer

from jaxcl.data.token_table import padded
from jaxcl.data.tokenizer import encode_texts
from jaxcl.models import Encode
from jaxcl.ops.mesh import batch_sharding, fetch, local_rows, put_batch
from jaxcl.typing import Float, Int, PyTree

__all__ = ["Embedder", "make_embedder", "pad_texts"]

Embedder = Callable[..., Float[np.ndarray, "n d"]]
"""`(params, side, inputs, *, advance) -> embeddings` of all rows, float32 on the host."""


def make_embedder(encode: Encode, mesh: Mesh, *, batch_size: int = 1024) -> Embedder:
    """Compiles an encoder for embedding any number of rows.

    Args:
      encode: the towers' function.
      mesh: where it runs; rows are sharded over all of its axes.
      batch_size: rows at once; rounded up to a multiple of the devices.

    Returns:
      `(params, side, tokens, *, advance=None) -> float32[n, d]`, where `params` are those of the
      towers, `tokens` is `int32[n, t]`, and `advance(rows)` is called as rows are done.
    """
    batch_size += -batch_size % mesh.size
    forward = jax.jit(
        lambda params, side, inputs: encode(params, side, inputs),
        static_argnums=1,
        in_shardings=(None, batch_sharding(mesh)),
        out_shardings=batch_sharding(mesh),
    )

    def embed(
        params: PyTree,
        side: str,
        tokens: Int[np.ndarray, "n t"],
        *,
        advance: Callable[[int], None] = lambda rows: None,
    ) -> Float[np.ndarray, "n d"]:
        parts = []
        for first in range(0, max(len(tokens), 1), batch_size):
            rows = tokens[first : first + batch_size]
            # Every batch has one shape, so that one program is compiled; the surplus is cut off.
            inputs = {"tokens": np.pad(rows, ((0, batch_size - len(rows)), (0, 0)))}
            local = jax.tree.map(local_rows, inputs)
            vectors = forward(params, side, put_batch(local, mesh))
            parts.append(fetch(vectors)[: len(rows)].astype(np.float32))
            advance(len(rows))
        return np.concatenate(parts)

    return embed


def pad_texts(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    max_tokens: int,
    add_cls: bool = False,
    distinct: bool = False,
) -> Int[np.ndarray, "n t"]:
    """Token ids of texts, padded to `max_tokens`."""
    rows = list(
        encode_texts(tokenizer, texts, max_tokens=max_tokens, add_cls=add_cls, distinct=distinct)
    )
    lengths = np.array([len(row) for row in rows])
    return padded(np.concatenate(rows), np.cumsum(lengths) - lengths, lengths, width=max_tokens)
