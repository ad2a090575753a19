"""Refuse embeddings with NaN or infinity, and name the first row that has one."""

import numpy as np

from jaxcl.typing import Float

__all__ = ["check_finite"]


def check_finite(vectors: Float[np.ndarray, "n d"], noun: str, *, first: int = 0) -> None:
    """Raise a `ValueError` if a vector contains NaN or infinity.

    Args:
      vectors: embeddings or other features, one row per item.
      noun: names the rows in the message, in the plural.
      first: number of the first row, if `vectors` is a part of a table.
    """
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if bad.size:
        raise ValueError(
            f"{bad.size:,} of {len(vectors):,} {noun} contain NaN or infinity; the first is row "
            f"{first + bad[0]:,}. Look for NaN in the model's parameters, or for a zero vector "
            "that is divided by its norm"
        )
