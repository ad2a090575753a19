"""Exchange rows between devices, with gradients.

CPU processes communicate through gloo, whose reduce-scatter sometimes returns wrong results
silently or hangs (jax-ml/jax issues 40830 and 40831). On CPUs, an all-reduce replaces it, and each
device takes its slice of the sum.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.ops.varying import as_varying
from jaxcl.typing import Array, AxisName, Float, PyTree

__all__ = ["gather", "rotate", "sum_scatter"]


def rotate(tree: PyTree, axis_name: AxisName) -> PyTree:
    """Send arrays to the next device along the mesh axes, and receive the previous device's."""
    size = lax.axis_size(axis_name)
    following = [(device, (device + 1) % size) for device in range(size)]
    return jax.tree.map(lambda rows: lax.ppermute(rows, axis_name, following), tree)


def gather(tree: PyTree, axis_name: AxisName) -> PyTree:
    """Concatenate the rows of all devices, in device order, on every device."""

    def everywhere(rows: Array) -> Array:
        if _by_gloo() and jnp.issubdtype(rows.dtype, jnp.floating):
            return _gathered(as_varying(rows, lax.axis_index(axis_name)), axis_name)
        return lax.all_gather(rows, axis_name, tiled=True)

    return jax.tree.map(everywhere, tree)


def sum_scatter(values: Float[Array, "k ..."], axis_name: AxisName) -> Float[Array, "q ..."]:
    """Sum over all devices, and return the i-th of n equal slices on the i-th of n devices."""
    if not _by_gloo():
        return lax.psum_scatter(values, axis_name, tiled=True)
    size = values.shape[0] // lax.axis_size(axis_name)
    total = lax.psum(values, axis_name)
    return lax.dynamic_slice_in_dim(total, lax.axis_index(axis_name) * size, size)


def _by_gloo() -> bool:
    return jax.process_count() > 1 and jax.default_backend() == "cpu"


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(rows: Float[Array, "q ..."], axis_name: AxisName) -> Float[Array, "k ..."]:
    return lax.all_gather(rows, axis_name, tiled=True)


_gathered.defvjp(
    # Not `_gathered`, so that a second derivative in forward mode exists.
    lambda rows, axis_name: (lax.all_gather(rows, axis_name, tiled=True), None),
    lambda axis_name, _, cotangents: (sum_scatter(cotangents, axis_name),),
)
