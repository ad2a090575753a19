"""The position of a device's rows among all rows, and collectives over the devices."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxcl.ops.varying import as_varying
from jaxcl.typing import Array, AxisName

__all__ = ["Place"]


class Place(NamedTuple):
    """This device's range of rows, inside `jax.shard_map` or on a single device.

    Attributes:
      axis_name: the mesh axes over which rows are sharded; `None` for one device.
      here: the number of rows on this device, equal on all devices.
    """

    axis_name: AxisName | None
    here: int

    @property
    def num_devices(self) -> int:
        """The number of devices that hold rows."""
        return 1 if self.axis_name is None else lax.axis_size(self.axis_name)

    @property
    def device(self) -> Array | int:
        """This device's number."""
        return 0 if self.axis_name is None else lax.axis_index(self.axis_name)

    @property
    def num_rows(self) -> int:
        """The number of rows on all devices."""
        return self.here * self.num_devices

    @property
    def first(self) -> Array | int:
        """The number of this device's first row."""
        return self.device * self.here

    def mine(self, everyone: Array) -> Array:
        """This device's slice of an array over all rows."""
        return lax.dynamic_slice_in_dim(everyone, self.first, self.here)

    def total(self, numbers: Array) -> Array:
        """The sum over all devices, on every device."""
        return numbers if self.axis_name is None else lax.psum(numbers, self.axis_name)

    def everyone(self, mine: Array) -> Array:
        """The concatenated arrays of all devices, on every device."""
        if self.axis_name is None:
            return mine
        # A sum of zero-padded parts, since JAX types the result of a sum as equal on all devices.
        zeros = as_varying(jnp.zeros((self.num_rows, *mine.shape[1:]), mine.dtype), mine)
        return self.total(lax.dynamic_update_slice_in_dim(zeros, mine, self.first, 0))
