"""Tables with an entry for each training row."""

import jax
import jax.numpy as jnp

from jaxcl.typing import Array, Bool, Float, Int, PyTree

__all__ = ["ENTRIES_MULTIPLE", "init_table", "read_rows", "write_rows"]

ENTRIES_MULTIPLE = 1_024
"""What the number of a table's entries is a multiple of, so that it divides over most meshes."""


def init_table(num_rows: int, width: int, *, value: float) -> Float[Array, "n w"]:
    """A table with an entry for each row, all alike.

    Entries are filled up to a multiple of 1,024 on every mesh, so that a checkpoint may move.
    """
    padded = -(-num_rows // ENTRIES_MULTIPLE) * ENTRIES_MULTIPLE
    return jnp.full((padded, width), value, jnp.float32)


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
