"""Truncate, quantise and compare embeddings on the host."""

from collections.abc import Callable, Mapping

import numpy as np
from scipy.spatial.distance import cdist

from jaxcl.typing import Float

__all__ = [
    "QUANTIZATIONS",
    "SIMILARITIES",
    "check_quantize",
    "for_inner_products",
    "pairwise_similarities",
    "quantized",
    "similarities",
    "truncated",
]

QUANTIZATIONS = ("int8", "binary")
"""The values of `quantize` in `EmbeddingModel.encode`."""


def truncated(
    vectors: Float[np.ndarray, "n d"], dim: int | None, *, normalizes: bool
) -> Float[np.ndarray, "n _"]:
    """Keep the first `dim` dimensions, and normalise unit vectors again."""
    if dim is None or dim == vectors.shape[1]:
        return vectors
    vectors = vectors[:, :dim]
    return _unit(vectors).astype(np.float32) if normalizes else vectors


def check_quantize(quantize: str | None, *, normalizes: bool) -> None:
    """Raise a `ValueError` for a quantisation that a model does not support."""
    if quantize not in (None, *QUANTIZATIONS):
        raise ValueError(f"quantize={quantize!r} is unknown; use {' or '.join(QUANTIZATIONS)}")
    if quantize == "int8" and not normalizes:
        raise ValueError(
            "quantize='int8' maps -1 to 1 onto -127 to 127, but the vectors of this model are not "
            "normalised; use 'binary', or quantise them with your own ranges"
        )


def quantized(vectors: Float[np.ndarray, "n d"], quantize: str | None) -> np.ndarray:
    """Quantise vectors as `EmbeddingModel.encode` does.

    Example:
      >>> quantized(np.array([[0.6, -0.8, 0.0]]), "int8").tolist()
      [[76, -102, 0]]
      >>> quantized(np.array([[0.6, -0.8, 0.0]]), "binary").tolist()
      [[128]]
    """
    if quantize == "int8":
        return np.rint(127 * np.clip(vectors, -1, 1)).astype(np.int8)
    return np.packbits(vectors > 0, axis=1) if quantize == "binary" else vectors


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a @ b.T


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return _unit(a) @ _unit(b).T


def _unit(vectors: np.ndarray) -> np.ndarray:
    wide = vectors.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    return wide / np.where(norms > 0, norms, 1)


SIMILARITIES: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "cosine": _cosine,
    "dot": _dot,
    "euclidean": lambda a, b: -cdist(a, b),
    "manhattan": lambda a, b: -cdist(a, b, "cityblock"),
}
"""Functions `([n, d], [m, d]) -> [n, m]`, by their name in sentence-transformers."""


def similarities(function: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute the similarities of vectors.

    Args:
      function: one of `SIMILARITIES`.
      a: `[n, d]`, or `[d]`; float or int8.
      b: `[m, d]`, or `[d]`.

    Returns:
      Similarities `[n, m]` in float32, without the axis of a single vector.

    Raises:
      ValueError: for other shapes or types.

    Example:
      >>> similarities("cosine", np.array([3.0, 4.0]), np.eye(2)).tolist()
      [0.6, 0.8]
      >>> float(similarities("euclidean", np.array([3.0, 4.0]), np.zeros(2)))
      -5.0
    """
    a, b = np.asarray(a), np.asarray(b)
    _check_comparable(a, b)
    wide = (np.atleast_2d(vectors).astype(np.float64) for vectors in (a, b))
    return SIMILARITIES[function](*wide).astype(np.float32).reshape(a.shape[:-1] + b.shape[:-1])


def _check_comparable(a: np.ndarray, b: np.ndarray) -> None:
    for vectors in (a, b):
        if vectors.dtype == np.uint8:
            raise ValueError(
                "vectors of uint8 have eight dimensions per byte; unpack them with "
                "np.unpackbits(vectors, axis=-1)"
            )
        if vectors.ndim not in (1, 2) or vectors.shape[-1] != a.shape[-1]:
            raise ValueError(
                f"vectors of the shapes {a.shape} and {b.shape} cannot be compared; give [n, d] "
                "and [m, d]"
            )


_PAIRWISE: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "cosine": lambda a, b: np.einsum("nd,nd->n", _unit(a), _unit(b)),
    "dot": lambda a, b: np.einsum("nd,nd->n", a, b),
    "euclidean": lambda a, b: -np.linalg.norm(a - b, axis=1),
    "manhattan": lambda a, b: -np.abs(a - b).sum(axis=1),
}


def pairwise_similarities(function: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute the similarity of each row of `a` to the same row of `b`.

    Args:
      function: one of `SIMILARITIES`.
      a: `[n, d]`; float or int8.
      b: `[n, d]`; float or int8.

    Returns:
      Similarities `[n]` in float32.

    Raises:
      ValueError: for other shapes or types.

    Example:
      >>> pairwise_similarities("cosine", np.array([[3.0, 4.0], [0.0, 2.0]]), np.eye(2)).tolist()
      [0.6, 1.0]
    """
    a, b = np.asarray(a), np.asarray(b)
    _check_comparable(a, b)
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(
            f"vectors of the shapes {a.shape} and {b.shape} are not pairs; give [n, d] twice"
        )
    return _PAIRWISE[function](a.astype(np.float64), b.astype(np.float64)).astype(np.float32)


def for_inner_products(
    function: str, side: str, vectors: Float[np.ndarray, "n d"]
) -> Float[np.ndarray, "n _"]:
    r"""Transform vectors so that inner products rank keys as a similarity function does.

    For `"euclidean"`, the vectors get one more dimension, because $-\lVert q - k \rVert^2 / 2$
    equals $q \cdot k - \lVert k \rVert^2 / 2$ up to a constant per query.

    Raises:
      ValueError: for `"manhattan"`, since no inner product ranks keys by it.
    """
    if function == "dot":
        return vectors
    if function == "cosine":
        return _unit(vectors).astype(np.float32)
    if function != "euclidean":
        raise ValueError(f"keys cannot be ranked by similarity {function!r}; use cosine or dot")
    if side == "query":
        last = np.ones(len(vectors), vectors.dtype)
    else:
        last = -np.square(vectors, dtype=np.float64).sum(1) / 2
    return np.column_stack([vectors, last])
