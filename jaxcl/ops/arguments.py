"""Checks of what callers give, before JAX converts it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.typing import Array, Float, Int, Integer, Range

__all__ = [
    "as_integers",
    "as_labels",
    "as_vectors",
    "check_numbers",
    "host_labels",
    "label_fields",
    "native",
]

_INT32 = np.iinfo(np.int32)


def as_vectors(name: str, vectors: Any, *, axes: int = 2) -> Float[Array, "..."]:
    """Embeddings as an array of JAX.

    Raises:
      TypeError: for a list, or numbers that are not floating-point.
      ValueError: for another number of axes, or vectors without features.
    """
    if not isinstance(vectors, jax.Array | np.ndarray):
        kind = type(vectors).__name__
        raise TypeError(f"{name} is a {kind}; give an array of floats, such as jnp.asarray({name})")
    if not jnp.issubdtype(vectors.dtype, jnp.floating):
        raise TypeError(f"{name} has the type {vectors.dtype}; give floats")
    if vectors.ndim != axes or not vectors.shape[-1]:
        raise ValueError(
            f"{name} has the shape {vectors.shape}; give {axes} axes, the last one of features"
        )
    return jnp.asarray(native(vectors) if isinstance(vectors, np.ndarray) else vectors)


def native(array: np.ndarray) -> np.ndarray:
    """The array in the byte order of this machine, the only one that JAX takes."""
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def as_integers(name: str, values: Any) -> Int[np.ndarray, "..."]:
    """Integers of any width on the host, such as a list's.

    Raises:
      TypeError: for other types; fractions would be cut off.
    """
    integers = np.asarray(values)
    if not integers.size:
        integers = integers.astype(np.int64)  # an empty list has no type
    if not np.issubdtype(integers.dtype, np.integer):
        raise TypeError(f"{name} has the type {integers.dtype}; give integers")
    return integers


def as_labels(name: str, labels: Any) -> Integer[Array, "..."]:
    """Ids, groups or row numbers as int32.

    Of a traced array, and of one on several hosts, only the type is checked; it stays as it is.

    Raises:
      TypeError: for labels that are not integers.
      ValueError: for a label that int32 cannot hold, which JAX would cut without a word.
    """
    if _is_unknown(labels):
        if not jnp.issubdtype(labels.dtype, jnp.integer):
            raise TypeError(f"{name} has the type {labels.dtype}; give integers")
        return labels
    if isinstance(labels, jax.Array) and labels.dtype == np.int32:
        return labels  # unread: a device may still compute its values
    values = host_labels(name, labels)
    # Where a device holds them, they stay there.
    return jnp.asarray(labels if isinstance(labels, jax.Array) else values, jnp.int32)


def host_labels(name: str, labels: Any) -> Integer[np.ndarray, "..."]:
    """Ids, groups or row numbers as int32 on the host, whatever is traced meanwhile.

    Raises:
      TypeError: for labels that are not integers.
      ValueError: for a label that int32 cannot hold.
    """
    integers = as_integers(name, labels)
    outside = integers[(integers < _INT32.min) | (integers > _INT32.max)]
    if outside.size:
        raise ValueError(
            f"{name} holds {outside[0]}, which int32 cannot hold; number the labels from 0, such "
            "as by np.unique(labels, return_inverse=True)[1]"
        )
    return integers.astype(np.int32)


def check_numbers(name: str, numbers: Any, allowed: Range) -> None:
    """Raise a `ValueError` for a number, or an array that holds one, out of range.

    The values of a traced array, and of one on several hosts, are unknown and pass.
    """
    if _is_unknown(numbers):
        return
    values = np.asarray(numbers)
    if values.size:
        for extreme in (values.min(), values.max()):  # of a NaN among them, both are NaN
            allowed.check(name, extreme.item())


def _is_unknown(array: Any) -> bool:
    return isinstance(array, jax.core.Tracer) or not getattr(array, "is_fully_addressable", True)


def label_fields(name: str, holder: Any) -> dict[str, Any]:
    """The fields `ids` and `groups` of a NamedTuple as `as_labels`, where there are any."""
    fields = {field: getattr(holder, field) for field in ("ids", "groups")}
    return {
        field: as_labels(f"{name}.{field}", labels)
        for field, labels in fields.items()
        if labels is not None
    }
