"""Devices in a ring: each hands on to the next."""

import jax
from jax import lax

from jaxcl.typing import AxisName, PyTree

__all__ = ["rotate"]


def rotate(tree: PyTree, axis_name: AxisName) -> PyTree:
    """What the device before held, in the order of the mesh axes given."""
    size = lax.axis_size(axis_name)
    following = [(device, (device + 1) % size) for device in range(size)]
    return jax.tree.map(lambda rows: lax.ppermute(rows, axis_name, following), tree)
