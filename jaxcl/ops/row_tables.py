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
    """Create a table with one entry per row, all equal to `value`.

    The table is padded to a multiple of 1,024 entries on every mesh, so that a checkpoint can move
    between meshes.
    """
    return jnp.full((padded_entries(num_rows), width), value, jnp.float32)


def padded_entries(number: int) -> int:
    """Round a number up to a multiple of `ENTRIES_MULTIPLE`."""
    return -(-number // ENTRIES_MULTIPLE) * ENTRIES_MULTIPLE


def read_rows(tables: PyTree, rows: Int[Array, " b"]) -> PyTree:
    """Read the entries of the given rows, `[b, …]` from each table."""
    return jax.tree.map(lambda table: table[rows], tables)


def fetch_rows(
    tables: PyTree,
    rows: Int[Array, "*r"],
    *,
    axis_name: AxisName | None,
    constant: bool = False,
) -> PyTree:
    """Fetch entries of sharded tables from whichever device holds them, inside `jax.shard_map`.

    Requests travel around a ring, and each device fills in the entries that it holds. No device
    holds more than one other device's result at a time. If each of `p` devices requests `r` rows,
    every device sends and receives `p · r` entries and row numbers.

    Args:
      tables: this device's shard of each table, `[n / devices, …]`.
      rows: the requested row numbers in the whole table; negative numbers return 0.
      axis_name: the mesh axes over which tables are sharded; `None` for replicated tables.
      constant: whether no gradient is needed. Two-byte floats then travel as bits; otherwise XLA on
        a CPU converts the whole table to float32.

    Returns:
      The entries, `[*rows.shape, …]`; differentiable with respect to the tables unless constant.
    """
    if constant:
        types = jax.tree.map(lambda table: table.dtype, tables)
        bits = fetch_rows(jax.tree.map(as_bits, tables), rows, axis_name=axis_name)
        return jax.tree.map(from_bits, bits, types)
    size = 1 if axis_name is None else lax.axis_size(axis_name)
    device = 0 if axis_name is None else lax.axis_index(axis_name)

    def filled(rows: Array, entries: PyTree) -> PyTree:
        def fill(table: Array, answer: Array) -> Array:
            index = rows - device * table.shape[0]
            here = (rows >= 0) & (index >= 0) & (index < table.shape[0])
            # Rows of other devices read the first entry; `where` masks its value and gradient.
            values = table[jnp.where(here, index, 0)]
            return jnp.where(here.reshape(*here.shape, *[1] * (table.ndim - 1)), values, answer)

        return jax.tree.map(fill, tables, entries)

    everywhere = (tables, rows)
    entries = jax.tree.map(
        lambda table: full_like_varying(
            (*rows.shape, *table.shape[1:]), 0.0, table.dtype, everywhere
        ),
        tables,
    )
    rows = as_varying(rows, everywhere)
    if size == 1:
        return filled(rows, entries)

    def visit(_: Array, carry: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
        # As many rotations as devices: requests end where they started, with all answers.
        rows, entries = carry
        return rotate((rows, filled(rows, entries)), axis_name)

    return lax.fori_loop(0, size, visit, (rows, entries))[1]


def as_bits(array: Array) -> Array:
    """Reinterpret two-byte floats as uint16 and keep other arrays, both without gradient."""
    array = lax.stop_gradient(array)
    return lax.bitcast_convert_type(array, jnp.uint16) if _is_half(array.dtype) else array


def from_bits(array: Array, dtype: jnp.dtype) -> Array:
    """Invert `as_bits`."""
    return lax.bitcast_convert_type(array, dtype) if _is_half(dtype) else array


def _is_half(dtype: jnp.dtype) -> bool:
    return dtype.itemsize == 2 and bool(jnp.issubdtype(dtype, jnp.floating))


def write_rows(tables: PyTree, rows: Int[Array, " b"], entries: PyTree) -> PyTree:
    """Write new entries for the given rows; the first entry wins if a row occurs twice.

    Without this rule, the result would depend on the order of the devices' writes. Negative rows,
    such as −1 for padding, are not written.
    """
    first = first_places(rows)

    def written(table: Array, values: Array) -> Array:
        indices = jnp.where(first, rows, table.shape[0])
        return table.at[indices].set(values.astype(table.dtype), mode="drop")

    return jax.tree.map(written, tables, entries)


def first_places(
    rows: Int[Array, " b"], valid: Bool[Array, " b"] | None = None
) -> Bool[Array, " b"]:
    """Whether each position is valid and the first with its row; negative rows are not valid."""
    valid = rows >= 0 if valid is None else valid & (rows >= 0)
    rows = jnp.where(valid, rows, -1)  # an invalid position must not precede a valid one of its row
    # Stable, so that equal rows keep their order.
    order = jnp.argsort(rows, stable=True)
    ordered = rows[order]
    first = jnp.concatenate([jnp.ones_like(ordered[:1], bool), ordered[1:] != ordered[:-1]])
    return jnp.zeros(rows.shape, bool).at[order].set(first) & valid
