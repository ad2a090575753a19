"""Tables with one entry per training row, replicated or sharded by row."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.ops.collectives import rotate
from jaxcl.ops.varying import as_varying, full_like_varying
from jaxcl.typing import Array, AxisName, Bool, Float, Int, PyTree

__all__ = [
    "ENTRIES_MULTIPLE",
    "as_bits",
    "fetch_rows",
    "first_places",
    "from_bits",
    "init_table",
    "padded_entries",
    "read_rows",
    "write_rows",
]

ENTRIES_MULTIPLE = 1_024
"""Tables are padded to a multiple of this number of entries, which divides over most meshes."""


def init_table(num_rows: int, width: int, *, value: float) -> Float[Array, "n w"]:
    """A table with one entry per row, all equal to `value`.

    It is padded to a multiple of 1,024 entries on every mesh, so that a checkpoint can move from
    one mesh to another.
    """
    return jnp.full((padded_entries(num_rows), width), value, jnp.float32)


def padded_entries(number: int) -> int:
    """The number rounded up to a multiple of `ENTRIES_MULTIPLE`."""
    return -(-number // ENTRIES_MULTIPLE) * ENTRIES_MULTIPLE


def read_rows(tables: PyTree, rows: Int[Array, " b"]) -> PyTree:
    """The entries of some rows, `[b, …]` from each table."""
    return jax.tree.map(lambda table: table[rows], tables)


def fetch_rows(
    tables: PyTree,
    rows: Int[Array, "*r"],
    *,
    axis_name: AxisName | None,
    constant: bool = False,
) -> PyTree:
    """Fetch the entries of rows that any device may hold, inside of `jax.shard_map`.

    Requests travel round the devices, and each device fills in the entries that it holds. No device
    holds more than one other device's result at a time. If each of `p` devices requests `r` rows,
    every device sends and receives `p · r` entries and row numbers.

    Args:
      tables: this device's share of each table, `[n / devices, …]`.
      rows: the requested rows, by their number in the whole table; negative ones give 0.
      axis_name: the mesh axes over which tables are sharded; `None` for replicated ones.
      constant: whether no gradient is needed. Two-byte floats then travel as bits; otherwise XLA on
        a CPU converts the whole table to float32.

    Returns:
      The entries, `[*rows.shape, …]`; differentiable with respect to the tables unless constant.
    """
    if constant:
        types = jax.tree.map(lambda table: table.dtype, tables)
        found = fetch_rows(jax.tree.map(as_bits, tables), rows, axis_name=axis_name)
        return jax.tree.map(from_bits, found, types)
    size = 1 if axis_name is None else lax.axis_size(axis_name)
    device = 0 if axis_name is None else lax.axis_index(axis_name)

    def filled(rows: Array, found: PyTree) -> PyTree:
        def fill(table: Array, answer: Array) -> Array:
            place = rows - device * table.shape[0]
            here = (rows >= 0) & (place >= 0) & (place < table.shape[0])
            # Rows of other devices read the first entry, which `where` masks, gradient included.
            values = table[jnp.where(here, place, 0)]
            return jnp.where(here.reshape(*here.shape, *[1] * (table.ndim - 1)), values, answer)

        return jax.tree.map(fill, tables, found)

    everywhere = (tables, rows)
    found = jax.tree.map(
        lambda table: full_like_varying(
            (*rows.shape, *table.shape[1:]), 0.0, table.dtype, everywhere
        ),
        tables,
    )
    rows = as_varying(rows, everywhere)
    if size == 1:
        return filled(rows, found)

    def visit(_: Array, carry: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
        # As many rotations as devices: requests end where they started, with all answers.
        rows, found = carry
        return rotate((rows, filled(rows, found)), axis_name)

    return lax.fori_loop(0, size, visit, (rows, found))[1]


def as_bits(array: Array) -> Array:
    """Two-byte floats as unsigned integers, all other arrays unchanged; both without gradient."""
    array = lax.stop_gradient(array)
    return lax.bitcast_convert_type(array, jnp.uint16) if _is_half(array.dtype) else array


def from_bits(array: Array, dtype: jnp.dtype) -> Array:
    """Invert `as_bits`."""
    return lax.bitcast_convert_type(array, dtype) if _is_half(dtype) else array


def _is_half(dtype: jnp.dtype) -> bool:
    return dtype.itemsize == 2 and bool(jnp.issubdtype(dtype, jnp.floating))


def write_rows(tables: PyTree, rows: Int[Array, " b"], entries: PyTree) -> PyTree:
    """Write new entries for some rows; for a row given twice, the first entry.

    Without this rule, the order in which devices write would decide. Negative rows, such as the −1
    of padding, are written nowhere.
    """
    first = first_places(rows)

    def written(table: Array, values: Array) -> Array:
        places = jnp.where(first, rows, table.shape[0])
        return table.at[places].set(values.astype(table.dtype), mode="drop")

    return jax.tree.map(written, tables, entries)


def first_places(
    rows: Int[Array, " b"], valid: Bool[Array, " b"] | None = None
) -> Bool[Array, " b"]:
    """Whether each place is valid and the first one with its row; negative rows are not valid."""
    valid = rows >= 0 if valid is None else valid & (rows >= 0)
    rows = jnp.where(valid, rows, -1)  # no valid place comes after an invalid one of its row
    # Stable, so that equal rows keep the order of their places.
    order = jnp.argsort(rows, stable=True)
    ordered = rows[order]
    first = jnp.concatenate([jnp.ones_like(ordered[:1], bool), ordered[1:] != ordered[:-1]])
    return jnp.zeros(rows.shape, bool).at[order].set(first) & valid
