"""Array types in `jax.shard_map`, which record the mesh axes that an array varies over."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.typing import Array, PyTree

__all__ = ["as_varying", "full_like_varying", "shape_like_varying"]


def full_like_varying(
    shape: int | tuple[int, ...], value: float, dtype: jnp.dtype, like: PyTree
) -> Array:
    """Create a constant that varies over the mesh axes of `like`, such as an initial carry."""
    return as_varying(jnp.full(shape, value, dtype), like)


def shape_like_varying(
    shape: tuple[int, ...], dtype: jnp.dtype, like: Array
) -> jax.ShapeDtypeStruct:
    """The output type of a kernel whose results vary over the mesh axes of `like`."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def as_varying(tree: PyTree, like: PyTree) -> PyTree:
    """Declare arrays to vary over every mesh axis that a leaf of `like` varies over.

    A custom derivative must return gradients of the same types as its inputs. The gradient of an
    input that is equal on all devices is a sum over devices; if the input is declared to vary, JAX
    adds this sum.
    """
    axes = frozenset().union(*(_axes(leaf) for leaf in jax.tree.leaves(like)))

    def declare(array: Array) -> Array:
        missing = tuple(sorted(axes - _axes(array), key=str))
        return lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(declare, tree)


def _axes(array: Array) -> frozenset:
    return frozenset(jax.typeof(array).manual_axis_type.varying)
