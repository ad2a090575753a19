"""What a run remembers of each training row: tables in the train state, sharded over the mesh."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jaxcl.mesh import batch_sharding, replicated_sharding
from jaxcl.typing import Array, Bool, Float, Int, PyTree

__all__ = ["init_table", "read_rows", "table_sharding", "write_rows"]

_MULTIPLE = 1_024


def init_table(num_rows: int, width: int, *, value: float) -> Float[Array, "n w"]:
    """A table with an entry for each row, all alike.

    It has a multiple of 1,024 entries, so that its shape, and with it a checkpoint, is the same on
    every mesh over whose devices that number divides.
    """
    padded = -(-num_rows // _MULTIPLE) * _MULTIPLE
    return jnp.full((padded, width), value, jnp.float32)


def table_sharding(mesh: Mesh) -> NamedSharding:
    """Entries over all axes of the mesh, or a copy on each device where 1,024 does not divide."""
    return replicated_sharding(mesh) if _MULTIPLE % mesh.size else batch_sharding(mesh)


def read_rows(tables: PyTree, rows: Int[Array, " b"]) -> PyTree:
    """The entries of some rows: each table's `[b, …]`."""
    return jax.tree.map(lambda table: table[rows], tables)


def write_rows(tables: PyTree, rows: Int[Array, " b"], entries: PyTree) -> PyTree:
    """The tables with new entries for some rows; of a row given twice the first entry stays.

    Otherwise the order of devices would decide.
    """
    first = _is_first(rows)

    def written(table: Array, values: Array) -> Array:
        places = jnp.where(first, rows, table.shape[0])
        return table.at[places].set(values.astype(table.dtype), mode="drop")

    return jax.tree.map(written, tables, entries)


def _is_first(rows: Int[Array, " b"]) -> Bool[Array, " b"]:
    order = jnp.argsort(rows, stable=True)
    ordered = rows[order]
    first = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    return jnp.zeros(rows.shape, bool).at[order].set(first)
