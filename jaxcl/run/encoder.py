"""A trained model on the available devices, which embeds texts or other inputs of its sides."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxcl.data.modality import Reader
from jaxcl.data.table import Table, row_lengths
from jaxcl.models import Towers
from jaxcl.step.embedder import Embedder
from jaxcl.typing import Float, Int, PyTree

__all__ = ["Encoder"]


class Encoder(NamedTuple):
    """The parts of a model that compute embeddings, without loss, optimizer or training data.

    Attributes:
      mesh: the devices.
      towers: the model.
      embedder: the compiled forward pass of the model.
      params: the parameters of the towers.
      readers: for each side, the function that converts its values to inputs.
    """

    mesh: Mesh
    towers: Towers
    embedder: Embedder
    params: PyTree
    readers: Mapping[str, Reader]

    def encode(
        self,
        side: str,
        values: Sequence[Any],
        *,
        advance: Callable[[int], None] = lambda rows: None,
    ) -> Float[np.ndarray, "n d"]:
        """Embed values, such as texts, reading one batch at a time.

        Args:
          side: `"query"` or `"key"`.
          values: texts, or other values as a data source returns them.
          advance: a function that is called with the number of newly embedded rows.

        Returns:
          Unit vectors in float32, on the host.
        """
        read = self.readers[side]
        lengths = None
        if len(values) and isinstance(values[0], str):  # images, for example, are read only once
            lengths = np.array([len(text) for text in values], np.int64)
        return self.embedder(
            self.params,
            side,
            lambda rows: read([values[row] for row in rows]),
            len(values),
            lengths=lengths,
            advance=advance,
        )

    def embed(
        self,
        side: str,
        table: Table,
        rows: Int[np.ndarray, " n"] | None = None,
        *,
        advance: Callable[[int], None] = lambda rows: None,
    ) -> Float[np.ndarray, "n d"]:
        """Embed rows of a table, all by default, reading one batch at a time.

        Args:
          side: `"query"` or `"key"`.
          table: the table.
          rows: numbers of the rows to embed; `None` for all rows.
          advance: a function that is called with the number of newly embedded rows.

        Returns:
          Unit vectors in float32, on the host.
        """
        if rows is None:
            rows = np.arange(table.num_rows)
        return self.embedder(
            self.params,
            side,
            lambda positions: table.side(side, rows[positions]),
            len(rows),
            lengths=row_lengths(table, side, rows),
            advance=advance,
        )
