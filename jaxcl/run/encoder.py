"""A trained model on the present devices: texts, or whatever its sides hold, in; embeddings out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxcl.data.modality import Reader
from jaxcl.data.table import Table
from jaxcl.models import Towers
from jaxcl.step.embedder import Embedder
from jaxcl.typing import Float, Int, PyTree

__all__ = ["Encoder"]


class Encoder(NamedTuple):
    """What is needed to embed: no loss, no optimizer, no training data.

    Attributes:
      mesh: the devices.
      towers: the model.
      embedder: its compiled forward pass.
      params: the parameters of the towers.
      readers: side -> the function that turns its values into inputs.
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
          advance: called with the number of rows as they are done.

        Returns:
          Unit vectors in float32, on the host.
        """
        read = self.readers[side]
        return self.embedder(
            self.params,
            side,
            lambda rows: read([values[row] for row in rows]),
            len(values),
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
          table: the rows.
          rows: their numbers.
          advance: called with the number of rows as they are done.
        """
        if rows is None:
            rows = np.arange(table.num_rows)
        return self.embedder(
            self.params,
            side,
            lambda places: table.side(side, rows[places]),
            len(rows),
            advance=advance,
        )
