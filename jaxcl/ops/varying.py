"""The types that `jax.shard_map` gives to arrays: over which mesh axes they differ."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.typing import Array, PyTree

__all__ = ["as_varying", "full_like_varying", "shape_like_varying"]


def full_like_varying(
    shape: int | tuple[int, ...], value: float, dtype: jnp.dtype, like: PyTree
) -> Array:
    """A constant that varies over the mesh axes of `like`, as a loop's carry must at its start."""
    return as_varying(jnp.full(shape, value, dtype), like)


def shape_like_varying(
    shape: tuple[int, ...], dtype: jnp.dtype, like: Array
) -> jax.ShapeDtypeStruct:
    """What a kernel returns whose results vary over the mesh axes of `like`."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def as_varying(tree: PyTree, like: PyTree) -> PyTree:
    """The same arrays, declared to vary over every mesh axis over which a leaf of `like` does.

    A custom derivative must return what its inputs are: an input that is equal on all devices
    would need a sum over them, which JAX adds by itself behind this declaration.
    """
    axes = frozenset().union(*(_axes(leaf) for leaf in jax.tree.leaves(like)))

    def declare(array: Array) -> Array:
        missing = tuple(sorted(axes - _axes(array), key=str))
        return lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(declare, tree)


def _axes(array: Array) -> frozenset:
    return frozenset(jax.typeof(array).manual_axis_type.varying)
