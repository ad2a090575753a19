"""How fast is exact nearest-neighbour search, compared with the flat index of faiss?

    python -m jaxcl.bench nearest [--rows N] [--dim N] [--count N] [--tile N …] [--rounds N]
        [--json FILE]

The queries are the rows of the table. faiss is included if it is installed (`faiss-cpu`).
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.bench.benchmark_parser import benchmark_parser
from jaxcl.bench.timing import compile_all, facts_of, milliseconds
from jaxcl.ops.nearest import TILE, nearest

__all__ = ["main", "measure"]


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Measure one shape."""
    parser = benchmark_parser("nearest", __doc__)
    parser.add_argument("--rows", type=int, default=100_000, dest="num_rows")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--tile", type=int, nargs="+", default=[TILE], dest="tiles")
    parser.add_argument("--rounds", type=int, default=3)
    return measure(**vars(parser.parse(argv)))


def measure(
    num_rows: int, dim: int, *, count: int, tiles: Sequence[int], rounds: int
) -> dict[str, Any]:
    """Time all tile sizes and faiss in turn, round after round.

    Args:
      num_rows: the number of rows, which are also the queries.
      dim: the width of the rows.
      count: the number of neighbours of each query.
      tiles: sizes of a tile, in rows and queries.
      rounds: the number of repetitions.

    Returns:
      The record that `jaxcl.bench` prints, in milliseconds.

    Raises:
      RuntimeError: if faiss finds other similarities.
    """
    rng = np.random.default_rng(0)
    table = rng.normal(size=(num_rows, dim)).astype(np.float32)
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    rows = jnp.asarray(table)
    functions = {
        f"tiles of {tile:,}": functools.partial(nearest, count=count, tile=tile) for tile in tiles
    }
    compiled = compile_all(functions, (rows, rows))
    calls: dict[str, Callable[[], Any]] = {name: one.call for name, one in compiled.items()}
    facts: dict[str, Any] = dict(facts_of(compiled))
    if importlib.util.find_spec("faiss") is not None:
        import faiss

        index = faiss.IndexFlatIP(dim)
        index.add(table)
        calls["faiss, flat"] = lambda: index.search(table, count)
        result = jax.device_get(next(iter(compiled.values())).call())
        similarities, neighbours = calls["faiss, flat"]()
        shared = [len(set(a) & set(b)) for a, b in zip(result.rows, neighbours, strict=True)]
        facts["share of rows that faiss finds too"] = float(np.mean(shared)) / count
        facts["largest difference of a similarity"] = float(
            np.abs(result.similarities - similarities).max()
        )
        facts["faiss"] = faiss.__version__
        if facts["largest difference of a similarity"] > 1e-4:
            raise RuntimeError(f"faiss finds other similarities: {facts}")
    return {
        "shapes": {"rows": num_rows, "dim": dim, "count": count},
        "unit": "ms",
        "rounds": milliseconds(calls, rounds=rounds),
        "facts": facts,
    }
