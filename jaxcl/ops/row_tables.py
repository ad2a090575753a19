"""Tables with an entry for each training row."""

import jax
import jax.numpy as jnp

from jaxcl.typing import Array, Bool, Float, Int, PyTree

__all__ = [
    "ENTRIES_MULTIPLE",
    "first_places",
    "init_table",
    "padded_entries",
    "read_rows",
    "write_rows",
]

ENTRIES_MULTIPLE = 1_024
"""What the number of a table's entries is a multiple of, so that it divides over most meshes."""


def init_table(num_rows: int, width: int, *, value: float) -> Float[Array, "n w"]:
    """A table with an entry for each row, all alike.

    Entries are filled up to a multiple of 1,024 on every mesh, so that a checkpoint may move.
    """
    return jnp.full((padded_entries(num_rows), width), value, jnp.float32)


def padded_entries(number: int) -> int:
    """The least multiple of `ENTRIES_MULTIPLE` that is no less."""
    return -(-number // ENTRIES_MULTIPLE) * ENTRIES_MULTIPLE


def read_rows(tables: PyTree, rows: Int[Array, " b"]) -> PyTree:
    """The entries of some rows: each table's `[b, …]`."""
    return jax.tree.map(lambda table: table[rows], tables)


def write_rows(tables: PyTree, rows: Int[Array, " b"], entries: PyTree) -> PyTree:
    """The tables with new entries for some rows; of a row given twice the first entry stays.

    Otherwise the order of devices would decide.
    """
    first = first_places(rows)

    def written(table: Array, values: Array) -> Array:
        places = jnp.where(first, rows, table.shape[0])
        return table.at[places].set(values.astype(table.dtype), mode="drop")

    return jax.tree.map(written, tables, entries)


def first_places(
    rows: Int[Array, " b"], valid: Bool[Array, " b"] | None = None
) -> Bool[Array, " b"]:
    """Where a row stands for the first time, among the valid places."""
    if valid is not None:
        rows = jnp.where(valid, rows, -1)
    order = jnp.argsort(rows, stable=True)
    ordered = rows[order]
    first = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    first = jnp.zeros(rows.shape, bool).at[order].set(first)
    return first if valid is None else first & valid
