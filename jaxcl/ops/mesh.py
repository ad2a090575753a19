"""Create device meshes, and place arrays on them."""

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
    """Create a device mesh over whose axes the compiler shards arrays (`AxisType.Auto`).

    Args:
      axes: axis name to size, in order; one size may be -1, for all remaining devices.
        `{"data": -1}` puts all devices on one axis.
      devices: defaults to `jax.devices()`.

    Returns:
      The mesh. Batches are sharded over all of its axes.

    Raises:
      ValueError: if the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = list(axes.values())
    if not axes or sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(
            f"mesh={dict(axes)} is not a mesh; give axis sizes of at least 1 (one may be -1)"
        )
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh={dict(axes)} does not fit {len(devices)} devices; the product of its sizes must "
            f"be {len(devices)} (one may be -1 for all remaining devices)"
        )
    try:
        return jax.make_mesh(
            tuple(sizes),
            tuple(axes),
            # The default is Explicit, under which a product of two sharded sides is an error.
            axis_types=(AxisType.Auto,) * len(sizes),
            devices=np.asarray(devices).tolist(),
        )
    except NotImplementedError as error:  # for example, the links of a TPU slice form a grid
        raise ValueError(
            f"mesh={dict(zip(axes, sizes, strict=True))} cannot be laid out on these devices: "
            f"{' '.join(str(error).split())[:240]}"
        ) from error


@contextlib.contextmanager
def current_mesh(mesh: Mesh) -> Iterator[None]:
    """Let a `shard_map` over this mesh run inside the `jax.set_mesh` of another mesh."""
    outer = jax.sharding.get_abstract_mesh()
    if outer.empty or outer == mesh.abstract_mesh:
        yield
        return
    with jax.set_mesh(mesh):
        yield


def on_mesh(tree: PyTree, mesh: Mesh) -> PyTree:
    """Copy arrays on several devices, such as another program's mesh, to this mesh.

    Arrays on a single device are returned unchanged, since compiled programs accept them anywhere.
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

    Use it for programs in int32 and float32 that are correct only under the defaults, or whose
    masked intermediate values would trigger `jax_debug_nans`.
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
    """Shard rows over all axes of the mesh; array axes after the first are not sharded."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """Keep a full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def table_sharding(mesh: Mesh) -> NamedSharding:
    """Shard tables of `jaxcl.ops.row_tables` over all axes, if they divide evenly."""
    replicated = mesh.size == 1 or ENTRIES_MULTIPLE % mesh.size
    return replicated_sharding(mesh) if replicated else batch_sharding(mesh)


def fetch(array: jax.Array) -> np.ndarray:
    """Copy a whole array to every host, whichever devices hold it."""
    if jax.process_count() == 1:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def local_rows(rows: np.ndarray) -> np.ndarray:
    """Select this host's part of the rows of a global batch."""
    return np.split(rows, jax.process_count())[jax.process_index()]


def put_batch(local_batch: PyTree, mesh: Mesh) -> PyTree:
    """Put this host's part of a global batch on its devices.

    Args:
      local_batch: NumPy arrays; the first axis is this host's rows.
      mesh: the mesh to put them on, with rows sharded over all of its axes.

    Returns:
      The same tree, with global arrays of the whole batch.
    """
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(sharding, rows), local_batch
    )


def put_rows(rows: jax.Array | np.ndarray, mesh: Mesh, *, num_rows: int) -> jax.Array:
    """Shard an array with an entry per row of a data set, padded with zeros to divide evenly.

    Args:
      rows: a host array, equal on all hosts; or a device array, which keeps all of its entries.
      mesh: the mesh to put them on, sharded over all of its axes.
      num_rows: the number of entries to take from a host array.
    """
    sharding = batch_sharding(mesh)
    if isinstance(rows, jax.Array) and rows.shape[0] % mesh.size == 0:
        return jax.device_put(rows, sharding)
    host = native(np.asarray(rows)[:num_rows])
    missing = num_rows + -num_rows % mesh.size - len(host)
    padded = np.pad(host, [(0, missing), *[(0, 0)] * (host.ndim - 1)])
    return jax.make_array_from_callback(padded.shape, sharding, lambda index: padded[index])
