"""Embeds many rows with a trained model: forward only, in batches over the mesh."""

from collections.abc import Callable, Collection
from typing import TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh

from jaxcl.models import Encode
from jaxcl.ops.mesh import batch_sharding, current_mesh, fetch, local_rows, put_batch
from jaxcl.step.length_batches import padded_width
from jaxcl.step.length_buckets import cut_texts
from jaxcl.typing import PADDING_ID, Float, Int, PyTree

__all__ = ["Embedder", "Forward", "ReadRows", "make_embedder", "make_forward"]

ReadRows: TypeAlias = Callable[[Int[np.ndarray, " b"]], PyTree]
"""Row numbers -> a side's inputs of these rows."""

Embedder: TypeAlias = Callable[..., Float[np.ndarray, "n d"]]
"""`(params, side, read, num_rows, *, advance) -> embeddings` of all rows, float32 on the host."""


Forward: TypeAlias = Callable[[PyTree, str, PyTree], jax.Array]
"""`(params, side, inputs) -> embeddings [b, d]`; the number of devices must divide `b`."""


def make_forward(encode: Encode, mesh: Mesh) -> Forward:
    """Compile an encoder for batches that every process holds in full, once per shape.

    Args:
      encode: `Towers.encode`.
      mesh: the devices; rows are sharded over all axes.
    """
    compiled = jax.jit(
        lambda params, side, inputs: encode(params, side, inputs),
        static_argnums=1,
        in_shardings=(None, batch_sharding(mesh)),
        out_shardings=batch_sharding(mesh),
    )

    def forward(params: PyTree, side: str, inputs: PyTree) -> jax.Array:
        with current_mesh(mesh):
            return compiled(params, side, put_batch(jax.tree.map(local_rows, inputs), mesh))

    return forward


def make_embedder(
    encode: Encode, mesh: Mesh, *, batch_size: int = 1024, cut_sides: Collection[str] = ()
) -> Embedder:
    """Compile an encoder for embedding any number of rows.

    Args:
      encode: `Towers.encode`.
      mesh: the devices; rows are sharded over all axes.
      batch_size: number of rows to encode at a time; rounded up to a multiple of the number of
        devices.
      cut_sides: the sides with texts whose embeddings do not depend on their padding. Each batch is
        cut to `jaxcl.step.length_batches.padded_width` of its longest text, one of a few widths.

    Returns:
      `(params, side, read, num_rows, *, lengths=None, advance=None) -> float32[n, d]`, where
      `params` are the towers' parameters, and `read(rows)` returns the inputs of some of the rows
      `0 … num_rows - 1`. With `lengths`, numbers that increase with the number of tokens, texts of
      similar length are embedded together. Only one batch of inputs is held at a time.
      `advance(rows)` is called with the number of rows of each embedded batch.
    """
    batch_size += -batch_size % mesh.size
    forward = make_forward(encode, mesh)

    def embed(
        params: PyTree,
        side: str,
        read: ReadRows,
        num_rows: int,
        *,
        lengths: Int[np.ndarray, " n"] | None = None,
        advance: Callable[[int], None] = lambda rows: None,
    ) -> Float[np.ndarray, "n d"]:
        order = np.arange(num_rows)
        if lengths is not None and side in cut_sides:
            order = np.argsort(-lengths, kind="stable")
        parts = []
        for first in range(0, max(num_rows, 1), batch_size):
            count = min(batch_size, num_rows - first)
            # Every batch has one shape, so that one program is compiled; the surplus is cut off.
            inputs = jax.tree.map(
                lambda leaf, missing=batch_size - count: np.pad(
                    leaf, ((0, missing), *[(0, 0)] * (leaf.ndim - 1))
                ),
                read(order[first : first + count]),
            )
            if side in cut_sides:
                inputs = _cut(inputs)
            vectors = forward(params, side, inputs)
            with current_mesh(mesh):
                parts.append(fetch(vectors)[:count].astype(np.float32))
            advance(count)
        in_order = np.concatenate(parts)
        return in_order if lengths is None else in_order[np.argsort(order)]

    return embed


def _cut(inputs: PyTree) -> PyTree:
    """The inputs of texts, cut to one of a few widths."""
    tokens = inputs["tokens"]
    if "length" in inputs:
        length = int(inputs["length"].max(initial=0))
    else:
        length = int(np.flatnonzero((tokens != PADDING_ID).any(0)).max(initial=-1)) + 1
    return cut_texts(inputs, padded_width(length, tokens.shape[1]))
