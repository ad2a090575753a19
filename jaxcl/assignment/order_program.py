"""The compiled program that orders rows on the devices; one program serves many numbers of rows."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from jaxcl.assignment.bisection import bisect
from jaxcl.assignment.build_graph import graph_of
from jaxcl.assignment.cuthill_mckee import cuthill_mckee
from jaxcl.assignment.gcbs_settings import Gcbs
from jaxcl.assignment.place import Place
from jaxcl.assignment.sizes import Sizes
from jaxcl.typing import Array, Float, Int, Key, Scalar

__all__ = ["Report", "Search", "make_device_order", "make_search", "shared_search"]

Report = Callable[[str], object]
"""Called with a line of text at each stage of a long computation, such as `print`."""

Search = Callable[[tuple[Any, ...], Report], tuple[Any, int]]
"""`(arguments, report) -> (executable, memory per device in bytes)`."""


def make_search(mesh: Mesh, *, capacity: int, settings: Gcbs) -> Search:
    """Build a search of up to `capacity` rows, compiled once per shapes and dtypes of arguments."""
    program = make_device_order(mesh, capacity=capacity, settings=settings)
    executables: dict[Any, tuple[Any, int]] = {}

    def search(arguments: tuple[Any, ...], report: Report) -> tuple[Any, int]:
        leaves, structure = jax.tree.flatten(arguments)
        signature = structure, *((leaf.shape, leaf.dtype) for leaf in leaves)
        if signature not in executables:
            report(f"compiling the search for up to {capacity:,} rows")
            executable = program.lower(*arguments).compile()
            memory = executable.memory_analysis()
            executables[signature] = (
                executable,
                memory.argument_size_in_bytes
                + memory.temp_size_in_bytes
                + memory.output_size_in_bytes,
            )
        return executables[signature]

    return search


# Only for `assign`, whose arguments all come from the host. Arguments of `make_order` may be on any
# devices, and an executable rejects arguments on devices that it was not compiled for.
shared_search = functools.lru_cache(maxsize=8)(make_search)


def make_device_order(mesh: Mesh, *, capacity: int, settings: Gcbs) -> Any:
    """Jit the program of `make_order`, for rows that are on the mesh already.

    Returns:
      `(queries, keys, temperature, key, keep_apart, sizes) -> order`. Every device has the
      same number of rows, and `sizes`, from `sizes_of`, are for at most `capacity` rows. Rows
      after `sizes.num_rows` are padding, and come last.
    """
    rows: Any = PartitionSpec(mesh.axis_names)
    replicated: Any = PartitionSpec()

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(rows, rows, replicated, replicated, rows, replicated),
        out_specs=replicated,
    )
    def sharded(
        queries: Float[Array, "n d"],
        keys: Float[Array, "n d"],
        temperature: Scalar,
        key: Key[Array, ""],
        keep_apart: tuple[Int[Array, " n"], ...],
        sizes: Sizes,
    ) -> Int[Array, " _"]:
        place = Place(mesh.axis_names, queries.shape[0])
        graph_key, order_key = jax.random.split(key)
        graph, points = graph_of(
            queries,
            keys,
            keep_apart,
            sizes=sizes,
            capacity=capacity,
            temperature=temperature,
            settings=settings,
            key=graph_key,
            place=place,
        )
        if sizes.blocks is None:
            return cuthill_mckee(graph, num_rows=sizes.num_rows, axis_name=place.axis_name)
        return bisect(
            points,
            graph,
            starts=sizes.blocks,
            key=order_key,
            effort=settings.effort,
            axis_name=place.axis_name,
        )

    @jax.jit
    def order(
        queries: Array,
        keys: Array,
        temperature: Scalar,
        key: Key[Array, ""],
        keep_apart: tuple[Array, ...],
        sizes: Sizes,
    ) -> Array:
        # Products of integers are exact only if the device does not round the factors.
        with jax.default_matmul_precision("highest"):
            return sharded(queries, keys, temperature, key, keep_apart, sizes)

    return order
