"""Embed the rows of a run's data with its model, each row with the prompt of its data set."""

from collections.abc import Callable, Sequence

import numpy as np

from jaxcl.data.row_prompts import RowPrompts
from jaxcl.run.embedding_model import EmbeddingModel
from jaxcl.typing import Float

__all__ = ["encode_rows"]


def encode_rows(
    model: EmbeddingModel,
    texts: Sequence[str],
    *,
    side: str,
    prompts: RowPrompts | None,
    batch_size: int | None = None,
    progress: bool | Callable[[int], object] | None = None,
) -> Float[np.ndarray, "n d"]:
    """Embed one side of all rows of a split.

    Args:
      model: the model of the run.
      texts: the texts of all rows, in order.
      side: `"query"` or `"key"`.
      prompts: the prompts of the rows; `None` for the model's prompt.
      batch_size, progress: as for `EmbeddingModel.encode`.

    Returns:
      Embeddings in the order of the rows.
    """
    if prompts is None:
        return model.encode(texts, side=side, batch_size=batch_size, progress=progress)
    return np.concatenate(
        [
            model.encode(
                texts[rows],
                side=side,
                prompt=prompts.prompts[side][number],
                batch_size=batch_size,
                progress=progress,
            )
            for number, rows in prompts.parts(0, len(texts))
        ]
    )
