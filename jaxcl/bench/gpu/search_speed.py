"""Part 5: seconds of searches and assignments, and the share of the gap that assignments close."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.assignment import PRESETS, assign, make_gap_measure, sample_batches
from jaxcl.bench.gpu.measure import PeakMemory, compile_program, time_calls, unit_rows
from jaxcl.bench.gpu.recorder import CheckFailed, Recorder
from jaxcl.bench.gpu.worker import Spec
from jaxcl.ops.mesh import make_mesh, put_rows
from jaxcl.ops.nearest import Nearest, nearest
from jaxcl.typing import Array, Float, Int

__all__ = ["NEEDS_DEVICE", "check_neighbours", "measure_all", "topic_pairs"]

NEEDS_DEVICE = True

_TEMPERATURE = 0.05
_TOLERANCE = 4e-3  # products of float32 keep 11 bits on NVIDIA's tensor cores by default
_CHECKED = 256  # queries
_GAP_ROWS = 16_384
_CPU_QUERIES = 1_024


def measure_all(recorder: Recorder, spec: Spec) -> None:
    """Alternate searches and assignments, small sizes first; a CPU gets one size of each."""
    searches, assignments = spec.sizes.search_rows, spec.sizes.assignments
    if spec.platform == "cpu":
        (rows, queries), assignments = searches[0], assignments[:1]
        searches = ((rows, min(queries, _CPU_QUERIES)),)
    for number in range(max(len(searches), len(assignments))):
        for rows, queries in searches[number : number + 1]:
            name = f"{spec.sizes.search_count} nearest of {rows:,} rows, {queries:,} queries"
            recorder.measure(name, functools.partial(_search, spec, rows, queries))
        for rows, preset in assignments[number : number + 1]:
            name = f"assignment of {rows:,} rows, {preset}"
            recorder.measure(name, functools.partial(_assign, recorder, spec, rows, preset))


def check_neighbours(
    result: Nearest, queries: Float[Array, "q d"], table: Float[Array, "n d"], *, tolerance: float
) -> dict[str, Any]:
    """Compare some queries' neighbours with a sort of all exact similarities.

    Raises:
      CheckFailed: if similarities differ by more than the tolerance, or a row is returned whose
        exact similarity is lower than the last neighbour's by more than the tolerance.
    """
    count = result.rows.shape[1]
    scores = jnp.matmul(queries[:_CHECKED], table.T, precision="highest")
    wanted, rows = jax.lax.top_k(scores, count)
    similarities = jnp.take_along_axis(scores, result.rows[:_CHECKED], axis=1)
    error = float(jnp.abs(result.similarities[:_CHECKED] - wanted).max())
    shortfall = float((wanted[:, -1:] - similarities).max())
    shared = (result.rows[:_CHECKED, :, None] == rows[:, None]).any(2)
    if not max(error, shortfall) <= tolerance:
        raise CheckFailed(
            f"similarities differ by {error:.1e}, and a neighbour is {shortfall:.1e} less similar "
            f"than the last one should be; at most {tolerance:.0e} is allowed"
        )
    return {"errors": {"similarity": error}, "facts": {"recall": float(shared.mean())}}


@functools.partial(jax.jit, static_argnums=(1, 2))
def topic_pairs(
    seed: int | Int[Array, ""], num_rows: int, dim: int
) -> tuple[Float[Array, "n d"], Float[Array, "n d"]]:
    """Noisy pairs around nested topics, whose similarities resemble a trained embedder's."""
    keys = iter(jax.random.split(jax.random.key(seed), 16))
    centre = jnp.zeros((num_rows, dim))
    for members in (2_048, 256, 32, 8):
        number = -(-num_rows // members)
        topics = jax.random.normal(next(keys), (number, dim))
        centre += topics[jax.random.randint(next(keys), (num_rows,), 0, number)]

    def side() -> Float[Array, "n d"]:
        rows = centre + 1.2 * jax.random.normal(next(keys), centre.shape)
        return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)

    return side(), side()


def _search(spec: Spec, num_rows: int, num_queries: int) -> dict[str, Any]:
    dim, count = spec.sizes.search_dim, spec.sizes.search_count
    memory = PeakMemory()
    table = unit_rows(spec.seed, num_rows, dim)
    inputs = [(unit_rows(spec.seed + 1 + number, num_queries, dim), table) for number in range(2)]
    program = compile_program(functools.partial(nearest, count=count), *inputs[0])
    result = jax.block_until_ready(program.call(*inputs[0]))
    facts = memory.facts()
    facts |= check_neighbours(result, *inputs[0], tolerance=_TOLERANCE)
    timed = time_calls(program.call, inputs, spec.sizes)
    flops = 2.0 * num_queries * num_rows * dim
    return {**program.facts, **facts, "flops": flops, "queries": num_queries, **timed}


def _assign(recorder: Recorder, spec: Spec, num_rows: int, preset: str) -> dict[str, Any]:
    """Seconds of a second call with another seed, or of the first if time is left for only one."""
    batch = spec.sizes.assigned_batch
    memory = PeakMemory()
    sides = [np.asarray(side) for side in topic_pairs(spec.seed, num_rows, spec.sizes.search_dim)]
    seconds: list[float] = []
    for call in range(2):
        if seconds and recorder.remaining() < 2 * seconds[0]:
            break
        start = time.perf_counter()
        order = assign(
            *sides,
            block_size=batch,
            temperature=_TEMPERATURE,
            seed=spec.seed + call,
            settings=PRESETS[preset],
        )
        seconds.append(time.perf_counter() - start)
    facts = memory.facts()
    if sorted(order.tolist()) != list(range(num_rows)):
        raise CheckFailed(f"the order of {num_rows:,} rows is no permutation of them")
    closed = _gap_closed(sides, order, batch)
    if not closed > 0.02:
        raise CheckFailed(f"the assignment closes {closed:.3f} of the gap; random ones close 0")
    compiled = {"compile_s": seconds[0] - seconds[1]} if len(seconds) == 2 else {}
    shown = {"gap closed": closed, "with compilation": len(seconds) == 1}
    return {"s": seconds[-1:], "facts": shown, "pairs": num_rows, **compiled, **facts}


def _gap_closed(sides: list[np.ndarray], order: Int[np.ndarray, " n"], batch: int) -> float:
    mesh = make_mesh({"data": 1}, devices=jax.devices()[:1])
    count = -(-min(_GAP_ROWS, len(order)) // batch)
    batches = sample_batches(order, batch_size=batch, count=count, seed=0)
    measure = make_gap_measure(mesh, num_rows=len(order), fields=("closed",))
    placed = [put_rows(side, mesh, num_rows=len(order)) for side in sides]
    return float(measure(*placed, jnp.asarray(batches), _TEMPERATURE, jax.random.key(0)).closed)
