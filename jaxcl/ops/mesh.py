"""The one place that makes a device mesh."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxcl.ops.arguments import native
from jaxcl.ops.row_tables import ENTRIES_MULTIPLE
from jaxcl.typing import PyTree

__all__ = [
    "batch_sharding",
    "current_mesh",
    "default_settings",
    "fetch",
    "local_rows",
    "make_mesh",
    "on_mesh",
    "put_batch",
    "put_rows",
    "replicated_sharding",
    "table_sharding",
]


def make_mesh(axes: Mapping[str, int], *, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over the devices, its axes left to the compiler (`AxisType.Auto`).

    Args:
      axes: axis name to size, in order; one size may be -1, "what is left". `{"data": -1}` is
        all devices in one row.
      devices: all of `jax.devices()` by default.

    Returns:
      The mesh. Batches are sharded over all of its axes.

    Raises:
      ValueError: if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = list(axes.values())
    if not axes or sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(
            f"mesh={dict(axes)} is no mesh; give axis sizes of at least 1, of which one may be -1"
        )
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh={dict(axes)} does not fit {len(devices)} devices; its sizes must multiply to "
            f"{len(devices)} (one may be -1 for what is left)"
        )
    try:
        return jax.make_mesh(
            tuple(sizes),
            tuple(axes),
            # Auto, written out: the default is Explicit, under which a product of two sharded sides
            # raises.
            axis_types=(AxisType.Auto,) * len(sizes),
            devices=np.asarray(devices).tolist(),
        )
    except NotImplementedError as error:  # the wires of a slice of TPUs form a grid
        raise ValueError(
            f"mesh={dict(zip(axes, sizes, strict=True))} cannot be laid out on these devices: "
            f"{' '.join(str(error).split())[:240]}"
        ) from error


@contextlib.contextmanager
def current_mesh(mesh: Mesh) -> Iterator[None]:
    """Let a `shard_map` over this mesh run inside of the `jax.set_mesh` of another one."""
    outer = jax.sharding.get_abstract_mesh()
    if outer.empty or outer == mesh.abstract_mesh:
        yield
        return
    with jax.set_mesh(mesh):
        yield


def on_mesh(tree: PyTree, mesh: Mesh) -> PyTree:
    """Copy arrays that lie on several devices, such as another program's mesh, to this mesh.

    An array of one device stays as it is: a compiled program takes it wherever it runs.
    """

    def placed(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
            return leaf
        if len(leaf.sharding.device_set) == 1:
            return leaf
        return jax.device_put(leaf, replicated_sharding(mesh))

    return jax.tree.map(placed, tree)


@contextlib.contextmanager
def default_settings(mesh: Mesh) -> Iterator[None]:
    """Compile and run a program on a mesh under JAX's defaults, whatever the caller has set.

    For programs of int32 and float32 that are correct under these alone, or that compute with
    numbers that `jax_debug_nans` would report although they are masked later.
    """
    with (
        current_mesh(mesh),
        jax.enable_x64(False),
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
        jax.debug_nans(False),
        jax.debug_infs(False),
    ):
        yield


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over all axes of the mesh, everything behind the first axis whole."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def table_sharding(mesh: Mesh) -> NamedSharding:
    """Entries of `jaxcl.ops.row_tables` over all axes; a copy on each device if they do not fit."""
    alone = mesh.size == 1 or ENTRIES_MULTIPLE % mesh.size
    return replicated_sharding(mesh) if alone else batch_sharding(mesh)


def fetch(array: jax.Array) -> np.ndarray:
    """The whole of an array on every host, whichever devices hold it."""
    if jax.process_count() == 1:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def local_rows(rows: np.ndarray) -> np.ndarray:
    """This host's part of the rows of a global batch."""
    return np.split(rows, jax.process_count())[jax.process_index()]


def put_batch(local_batch: PyTree, mesh: Mesh) -> PyTree:
    """Puts this host's part of a global batch on its devices.

    Args:
      local_batch: NumPy arrays; the first axis is this host's rows.
      mesh: where they go, rows sharded over all of its axes.

    Returns:
      The same tree with arrays of the whole batch.
    """
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(sharding, rows), local_batch
    )


def put_rows(rows: jax.Array | np.ndarray, mesh: Mesh, *, num_rows: int) -> jax.Array:
    """Puts an entry for each row of a data set on the mesh, filled up with zeros for all devices.

    Args:
      rows: of all hosts, equal on each; or on the mesh already, where all of it stays as it is.
      mesh: where they go, sharded over all of its axes.
      num_rows: entries that are wanted of a host's array.
    """
    sharding = batch_sharding(mesh)
    if isinstance(rows, jax.Array) and rows.shape[0] % mesh.size == 0:
        return jax.device_put(rows, sharding)
    host = native(np.asarray(rows)[:num_rows])
    missing = num_rows + -num_rows % mesh.size - len(host)
    filled = np.pad(host, [(0, missing), *[(0, 0)] * (host.ndim - 1)])
    return jax.make_array_from_callback(filled.shape, sharding, lambda index: filled[index])
