"""Checks of callers' arguments, before JAX converts them."""

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
    """Check embeddings, and convert them to a JAX array.

    Raises:
      TypeError: if `vectors` is not an array of floats.
      ValueError: if the number of axes is wrong, or the vectors have no features.
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
    """Convert an array to this machine's byte order, the only one that JAX accepts."""
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def as_integers(name: str, values: Any) -> Int[np.ndarray, "..."]:
    """Convert integers of any width, such as a list of them, to a NumPy array.

    Raises:
      TypeError: for other types, whose fractions would be truncated.
    """
    integers = np.asarray(values)
    if not integers.size:
        integers = integers.astype(np.int64)  # NumPy makes an empty list float64
    if not np.issubdtype(integers.dtype, np.integer):
        raise TypeError(f"{name} has the type {integers.dtype}; give integers")
    return integers


def as_labels(name: str, labels: Any) -> Integer[Array, "..."]:
    """Convert ids, groups or row numbers to int32.

    Traced arrays and arrays on several hosts are returned unchanged; only their type is checked.

    Raises:
      TypeError: if the labels are not integers.
      ValueError: if a label does not fit in int32, where JAX would silently truncate it.
    """
    if _is_unknown(labels):
        if not jnp.issubdtype(labels.dtype, jnp.integer):
            raise TypeError(f"{name} has the type {labels.dtype}; give integers")
        return labels
    if isinstance(labels, jax.Array) and labels.dtype == np.int32:
        return labels  # not read, since a device may still be computing the values
    values = host_labels(name, labels)
    # Labels on a device stay there.
    return jnp.asarray(labels if isinstance(labels, jax.Array) else values, jnp.int32)


def host_labels(name: str, labels: Any) -> Integer[np.ndarray, "..."]:
    """Convert ids, groups or row numbers to int32 on the host, even while JAX traces.

    Raises:
      TypeError: if the labels are not integers.
      ValueError: if a label does not fit in int32.
    """
    integers = as_integers(name, labels)
    outside = integers[(integers < _INT32.min) | (integers > _INT32.max)]
    if outside.size:
        raise ValueError(
            f"{name} holds {outside[0]}, which does not fit in int32; renumber the labels from 0, "
            "for example with np.unique(labels, return_inverse=True)[1]"
        )
    return integers.astype(np.int32)


def check_numbers(name: str, numbers: Any, allowed: Range) -> None:
    """Raise a `ValueError` if a number, or an element of an array, is out of range.

    The values of traced arrays and of arrays on several hosts are unknown and not checked.
    """
    if _is_unknown(numbers):
        return
    values = np.asarray(numbers)
    if values.size:
        for extreme in (values.min(), values.max()):  # both are NaN if any value is
            allowed.check(name, extreme.item())


def _is_unknown(array: Any) -> bool:
    return isinstance(array, jax.core.Tracer) or not getattr(array, "is_fully_addressable", True)


def label_fields(name: str, holder: Any) -> dict[str, Any]:
    """Convert the fields `ids` and `groups` of a NamedTuple with `as_labels`, unless `None`."""
    fields = {field: getattr(holder, field) for field in ("ids", "groups")}
    return {
        field: as_labels(f"{name}.{field}", labels)
        for field, labels in fields.items()
        if labels is not None
    }
