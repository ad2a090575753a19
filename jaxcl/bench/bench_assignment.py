"""How much of the gap does each assignment method close, and how much time and memory does it take?

    python -m jaxcl.bench assignment [--workdir RUN | --embeddings FILE] [--rows N] [--dim N]
        [--batch N …] [--methods NAME …] [--rounds N] [--measured N] [--recall] [--json FILE]

The embeddings come from the training rows of a trained run, from the arrays `query` and `key` of an
.npz file, or are drawn at random with nested topics. `--rows` samples that many rows at random.
Methods run one after the other, each in a separate process, which measures its peak memory; a
second run in that process, with another seed, is timed without compilation. The gap is measured on
the same embeddings. METIS is included if it is installed (`pymetis`); its time includes its graph.
"""

import argparse
import functools
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.assignment import PRESETS, Gcbs, assign, make_gap_measure, sample_batches
from jaxcl.assignment.bisection import Effort
from jaxcl.assignment.build_graph import graph_of
from jaxcl.assignment.graph import PairGraph
from jaxcl.assignment.place import Place
from jaxcl.assignment.sizes import sizes_of
from jaxcl.bench.benchmark_parser import benchmark_parser
from jaxcl.host.command_flags import user_path
from jaxcl.host.progress import say
from jaxcl.ops.mesh import make_mesh, put_rows
from jaxcl.typing import Float, Int

__all__ = ["METHODS", "drawn", "main"]

TEMPERATURE = 0.05


class Sides(NamedTuple):
    """Embeddings of pairs."""

    queries: Float[np.ndarray, "n d"]
    keys: Float[np.ndarray, "n d"]


Method = Callable[[Sides, int, int], Int[np.ndarray, " n"]]
"""`(sides, batch size, seed) -> order`."""


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Measure every method at every batch size."""
    parser = benchmark_parser("assignment", __doc__)
    parser.add_argument(
        "--workdir", type=user_path, help="a trained run, to embed its training rows"
    )
    parser.add_argument(
        "--embeddings", type=user_path, help="an .npz file of arrays `query` and `key`"
    )
    parser.add_argument(
        "--rows", type=int, default=10_000, help="the maximum number of pairs (default: 10000)"
    )
    parser.add_argument(
        "--dim", type=int, default=256, help="features of random embeddings (default: 256)"
    )
    parser.add_argument(
        "--batch",
        type=int,
        nargs="+",
        default=[64, 1_024],
        help="rows of a batch (default: 64 1024)",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="NAME",
        help="some of " + ", ".join(map(repr, METHODS)) + " (default: all)",
    )
    parser.add_argument(
        "--rounds", type=int, default=1, help="repetitions, each with another seed (default: 1)"
    )
    parser.add_argument(
        "--measured",
        type=int,
        default=16_384,
        help="rows to measure the gap on, 0 for none (default: 16384)",
    )
    parser.add_argument(
        "--recall", action="store_true", help="also measure the recall of the clustered graphs"
    )
    arguments = parser.parse(argv)
    sides = _sides(arguments)
    if not 1 <= min(arguments.batch) <= max(arguments.batch) <= len(sides.queries):
        parser.error(f"--batch {arguments.batch}: there are {len(sides.queries)} rows")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "embeddings.npz"
        np.savez(path, query=sides.queries, key=sides.keys)
        record = measure(
            sides,
            path,
            arguments.batch,
            methods=arguments.methods,
            rounds=arguments.rounds,
            measured_rows=arguments.measured,
        )
    if arguments.recall:
        record["facts"] |= _recalls(sides)
    return record


def measure(
    sides: Sides,
    path: Path,
    batch_sizes: Sequence[int],
    *,
    methods: Sequence[str],
    rounds: int,
    measured_rows: int,
) -> dict[str, Any]:
    """Run each method in a separate process, in turn, round after round.

    Args:
      sides: the embeddings.
      path: the file that holds the same embeddings.
      batch_sizes: the batch sizes; a batch is one block.
      methods: names of `METHODS`; METIS is left out if it is not installed.
      rounds: the number of repetitions, each with another seed.
      measured_rows: the number of rows whose gap is measured, in whole batches; 0 for none.

    Returns:
      The record that `jaxcl.bench` prints: seconds without compilation.
    """
    if importlib.util.find_spec("pymetis") is None:
        methods = [method for method in methods if not method.startswith("METIS")]
    seconds: dict[str, list[float]] = {}
    facts: dict[str, Any] = {}
    for batch_size in batch_sizes:
        count = -(-min(measured_rows, len(sides.queries)) // batch_size)
        gap_measure = _gap_measure(len(sides.queries))
        closed = functools.partial(_closed, sides, batch_size, count, gap_measure)
        for number in range(rounds):
            for method in methods:
                name = f"{method}, batch {batch_size:,}"
                result = path.with_name("order.npz")
                command = [sys.executable, "-m", "jaxcl.bench.bench_assignment", method]
                command += [str(batch_size), str(number), str(path), str(result)]
                subprocess.run(command, check=True)
                with np.load(result) as measured:
                    seconds.setdefault(name, []).append(float(measured["seconds"]))
                    line = f"round {number + 1} of {rounds}: {name}, {measured['seconds']:.2f} s"
                    if count:
                        share = closed(measured["order"])
                        facts.setdefault(f"gap closed, {name}", []).append(share)
                        line += f", {share:.4f} of the gap"
                    say(line)  # now, so that an interrupted benchmark has results
                    facts[f"s with compilation, {name}"] = float(measured["first_seconds"])
                    facts[f"peak MiB beyond the embeddings, {name}"] = float(measured["mebibytes"])
    means = {name: np.mean(value).item() for name, value in facts.items()}
    spread = {
        f"{name}, by round": " ".join(f"{one:.4f}" for one in value)
        for name, value in facts.items()
        if isinstance(value, list) and len(value) > 1
    }
    shape = {"rows": len(sides.queries), "dim": sides.queries.shape[1]}
    shape["batch"] = ", ".join(map(str, batch_sizes))
    return {"shapes": shape, "unit": "s", "rounds": seconds, "facts": means | spread}


def _random(sides: Sides, batch_size: int, seed: int) -> Int[np.ndarray, " n"]:
    return np.random.default_rng(seed).permutation(len(sides.queries)).astype(np.int32)


def _gcbs(sides: Sides, batch_size: int, seed: int, *, settings: Gcbs) -> Int[np.ndarray, " n"]:
    return assign(
        *sides, block_size=batch_size, temperature=TEMPERATURE, seed=seed, settings=settings
    )


def _balanced_k_means(sides: Sides, batch_size: int, seed: int) -> Int[np.ndarray, " n"]:
    """Lloyd's clusters, each filled with its nearest rows until it is a full batch."""
    rng = np.random.default_rng(seed)
    points = sides.queries + sides.keys
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    num_rows = len(points)
    number = -(-num_rows // batch_size)
    centres = points[rng.choice(num_rows, number, replace=False)]
    likeness = jax.jit(lambda points, centres: jax.lax.top_k(points @ centres.T, min(32, number)))
    for _ in range(10):
        nearest = np.asarray(likeness(points, centres)[1][:, 0])
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, points)
        centres = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    values, choices = map(np.asarray, likeness(points, centres))
    room = np.full(number, batch_size)
    room[-1] = num_rows - (number - 1) * batch_size
    cluster = np.full(num_rows, -1)
    # Rows that would lose most by their second choice come first.
    for row in np.argsort(values[:, -1] - values[:, 0]):
        free = choices[row][room[choices[row]] > 0]
        if len(free):
            cluster[row] = free[0]
            room[free[0]] -= 1
    cluster[cluster < 0] = np.repeat(np.arange(number), room)
    return np.argsort(cluster, kind="stable").astype(np.int32)


def _metis(
    sides: Sides, batch_size: int, seed: int, *, weighted: bool, graph_kind: str = "exact"
) -> Int[np.ndarray, " n"]:
    """METIS's parts of the graph; surplus rows of large parts fill small parts."""
    import pymetis
    import scipy.sparse

    num_rows = len(sides.queries)
    graph = _graph(sides, batch_size, seed, settings=Gcbs(graph=graph_kind))
    weights = np.ones(graph.rows.shape)
    if weighted:
        weights = np.asarray(graph.masses, np.float64)
        weights /= (graph.own + weights.sum(1))[:, None]
    is_edge = graph.rows >= 0
    ends = np.nonzero(is_edge)[0], graph.rows[is_edge]
    matrix = scipy.sparse.csr_matrix((weights[is_edge], ends), (num_rows,) * 2)
    matrix = (matrix + matrix.T).tocsr()
    number = -(-num_rows // batch_size)
    _, parts = pymetis.part_graph(
        number,
        pymetis.CSRAdjacency(matrix.indptr, matrix.indices),
        eweights=np.maximum(1, np.round(1_000 * matrix.data)).astype(int),
        options=pymetis.Options(seed=seed),
    )
    return _in_batches(np.asarray(parts), number, batch_size)


def _graph(sides: Sides, batch_size: int, seed: int, *, settings: Gcbs) -> PairGraph:
    num_rows = len(sides.queries)
    graph_of_sides = functools.partial(
        graph_of,
        keep_apart=(),
        sizes=sizes_of(num_rows, block_size=batch_size, batch_size=batch_size, settings=settings),
        capacity=num_rows,
        settings=settings,
        place=Place(None, num_rows),
    )
    with jax.default_matmul_precision("highest"):
        graph, _ = jax.jit(graph_of_sides)(
            *sides, temperature=jnp.float32(TEMPERATURE), key=jax.random.key(seed)
        )
    return jax.device_get(graph)


def _recalls(sides: Sides) -> dict[str, float]:
    """The share of each row's ten nearest neighbours among the 32 or 16 of a clustered graph."""
    graph = functools.partial(_graph, sides, 64, 0)  # neighbours do not depend on the batch size
    nearest = graph(settings=Gcbs(graph="exact", neighbours=10)).rows
    return {
        f"recall of the ten nearest, {name}": np.mean(
            (nearest[:, :, None] == graph(settings=settings).rows[:, None]).any(2)[nearest >= 0]
        ).item()
        for name, settings in {
            "clustered": Gcbs(graph="clustered"),
            "light": PRESETS["light"]._replace(graph="clustered"),
        }.items()
    }


def _in_batches(parts: np.ndarray, number: int, batch_size: int) -> Int[np.ndarray, " n"]:
    """Turn parts about as large as a batch into full batches; the last has the remaining rows."""
    order = np.argsort(parts, kind="stable")
    sizes = np.bincount(parts, minlength=number)
    rank = np.arange(len(parts)) - (np.cumsum(sizes) - sizes)[parts[order]]
    smallest = int(sizes.argmin())  # its rows fill the others, too
    over = (rank >= batch_size) & (parts[order] != smallest)
    surplus = np.concatenate([order[over], order[parts[order] == smallest]])
    missing = batch_size - np.minimum(sizes, batch_size)
    missing[smallest] = 0
    filled = parts.copy()
    filled[surplus] = number  # the last batch
    free = np.repeat(np.arange(number), missing)
    filled[surplus[: len(free)]] = free
    return np.argsort(filled, kind="stable").astype(np.int32)


_LONGER = Effort(swaps=16, refinements=64)
_NO_GRAPH = Effort(starts=1, directions=12, walks=0, swaps=0, refinements=0)

METHODS: dict[str, Method] = {
    "random": _random,
    "paper": functools.partial(_gcbs, settings=Gcbs(method="rcm")),
    "rcm_device": functools.partial(_gcbs, settings=Gcbs(method="rcm_device", graph="exact")),
    "balanced k-means": _balanced_k_means,
    "directions": functools.partial(
        _gcbs, settings=Gcbs(graph="exact", neighbours=1, effort=_NO_GRAPH)
    ),
    "bisection, exact": functools.partial(_gcbs, settings=Gcbs(graph="exact")),
    "bisection, clustered": functools.partial(_gcbs, settings=Gcbs(graph="clustered")),
    "bisection, light": functools.partial(_gcbs, settings=PRESETS["light"]),
    "bisection, exact, longer": functools.partial(
        _gcbs, settings=Gcbs(graph="exact", effort=_LONGER)
    ),
    "bisection, clustered, longer": functools.partial(
        _gcbs, settings=Gcbs(graph="clustered", effort=_LONGER)
    ),
    "METIS": functools.partial(_metis, weighted=False),
    "METIS, weighted": functools.partial(_metis, weighted=True),
    "METIS, weighted, clustered": functools.partial(_metis, weighted=True, graph_kind="clustered"),
}
"""Methods by name."""


def _gap_measure(num_rows: int) -> Callable[..., Any]:
    mesh = make_mesh({"data": -1})
    return make_gap_measure(mesh, num_rows=num_rows, fields=("closed",))


def _closed(
    sides: Sides,
    batch_size: int,
    count: int,
    gap_measure: Callable[..., Any],
    order: Int[np.ndarray, " n"],
) -> float:
    mesh = make_mesh({"data": -1})
    batches = sample_batches(order, batch_size=batch_size, count=count, seed=0)
    placed = [put_rows(side, mesh, num_rows=len(order)) for side in sides]
    report = gap_measure(*placed, jnp.asarray(batches), TEMPERATURE, jax.random.key(0))
    return float(report.closed)


def _sides(arguments: argparse.Namespace) -> Sides:
    if arguments.workdir:
        sides = _of_run(arguments.workdir)
    elif arguments.embeddings:
        with np.load(arguments.embeddings) as arrays:
            sides = Sides(arrays["query"], arrays["key"])
    else:
        return drawn(arguments.rows, arguments.dim)
    rows = np.random.default_rng(0).permutation(len(sides.queries))[: arguments.rows]
    return Sides(*(side[np.sort(rows)] for side in sides))


def _of_run(workdir: Path) -> Sides:
    from jaxcl.run.opened import open_run

    run = open_run(workdir)
    embeddings = run.embeddings("train", run.sources()["train"])
    return Sides(embeddings["query"], embeddings["key"])


def drawn(num_rows: int, dim: int) -> Sides:
    """Draw noisy pairs from nested topics, about as similar as a trained model's embeddings."""
    rng = np.random.default_rng(0)
    centre = np.zeros((num_rows, dim), np.float32)
    for depth, members in enumerate((2_048, 256, 32, 8)):
        number = -(-num_rows // members)
        centre += rng.normal(size=(number, dim)).astype(np.float32)[
            rng.integers(0, number, num_rows) if not depth else rng.permutation(num_rows) % number
        ]
    sides = [centre + 1.2 * rng.normal(size=centre.shape).astype(np.float32) for _ in range(2)]
    return Sides(*(side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides))


def _one(method: str, batch_size: str, seed: str, path: str, result: str) -> None:
    """Run one method in this process, and write its order, times and memory."""
    with np.load(path) as arrays:
        sides = Sides(arrays["query"], arrays["key"])
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _peak_mebibytes()
    run = functools.partial(METHODS[method], sides, int(batch_size))
    times = [time.perf_counter()]
    for draw in (1_000 + int(seed), int(seed)):
        order = run(draw)
        times.append(time.perf_counter())
    first, second = np.diff(times)
    np.savez(
        result,
        order=order,
        first_seconds=first,
        seconds=second,
        mebibytes=_peak_mebibytes() - before,
    )


def _peak_mebibytes() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**10


if __name__ == "__main__":
    _one(*sys.argv[1:])
