"""Part 3: how fast is the symmetric loss, and how much memory does it take?"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.bench.gpu.exact import exact_infonce
from jaxcl.bench.gpu.measure import PeakMemory, checked, compile_program, time_calls, unit_rows
from jaxcl.bench.gpu.recorder import NotHere, Recorder
from jaxcl.bench.gpu.worker import Spec
from jaxcl.losses import Masks, infonce_loss
from jaxcl.ops.pairs import pallas_gpu, tiled
from jaxcl.typing import Array

__all__ = [
    "GRADIENTS",
    "LOSS_TOLERANCE",
    "NEEDS_DEVICE",
    "TEMPERATURE",
    "TOLERANCE",
    "loss_of",
    "measure_all",
    "require_kernels",
]

NEEDS_DEVICE = True
TEMPERATURE = 0.05
GRADIENTS = ("queries", "keys", "temperature")
LOSS_TOLERANCE = 1e-3
TOLERANCE = 2e-2  # of gradients, whose weights and results keep the 8 bits of bfloat16

_NUM_INPUTS = 3


class Measurement(NamedTuple):
    """One program to time.

    Attributes:
      way: an implementation of `jaxcl.ops.pairs`.
      tile: rows and columns of a tile; `None` for the implementation's default.
      batch: pairs.
      dim: width of the embeddings.
      gradients: whether the gradients of both sides and the temperature are computed as well.
    """

    way: str
    tile: int | None
    batch: int
    dim: int
    gradients: bool

    @property
    def name(self) -> str:
        tile = f", tile {self.tile:,}" if self.tile else ""
        passes = "forward + backward" if self.gradients else "forward"
        return f"B = {self.batch:,}, d = {self.dim}: {self.way}{tile}, {passes}"


def measure_all(recorder: Recorder, spec: Spec) -> None:
    """Time gradients first, then forward passes, then the remaining tiles."""
    exact = functools.cache(functools.partial(_exact, spec.seed))
    for one in measurements(spec):
        recorder.measure(one.name, functools.partial(_measure, one, spec, exact))


def measurements(spec: Spec) -> list[Measurement]:
    """All programs, the most valuable first."""
    sizes = spec.sizes
    first: list[tuple[str, int | None]] = [
        ("tiled", sizes.tiles[0]),
        ("pallas_gpu", None),
        *(("tiled", tile) for tile in sizes.tiles[1:2]),
        ("reference", None),
    ]
    later: list[tuple[str, int | None]] = [("tiled", tile) for tile in sizes.tiles[2:]]
    shapes = [(batch, dim) for dim in sizes.loss_dims for batch in sizes.loss_batches]
    return [
        Measurement(way, tile, batch, dim, gradients)
        for ways, gradients in itertools.product((first, later), (True, False))
        for batch, dim in shapes
        for way, tile in ways
        if tile is None or tile <= batch
    ]


def loss_of(way: str) -> Callable[..., Array]:
    """The mean symmetric loss: `(queries, keys, temperature, ids=None) -> nats`."""

    def loss(queries: Array, keys: Array, temperature: Array, ids: Array | None = None) -> Array:
        masks = Masks(ids=ids)
        rows = infonce_loss(queries, keys, temperature=temperature, masks=masks, implementation=way)
        return rows.mean()

    return loss


def require_kernels() -> None:
    """Raise `NotHere` if `pallas_gpu` cannot run."""
    if jax.default_backend() != "gpu" and pallas_gpu.INTERPRET is None:
        raise NotHere("pallas_gpu needs an NVIDIA GPU")


@contextlib.contextmanager
def default_tile(size: int | None) -> Iterator[None]:
    """Make a tile size the default of `tiled` for programs traced within the block."""
    before = tiled.TILE
    tiled.TILE = size or before
    try:
        yield
    finally:
        tiled.TILE = before


def _measure(one: Measurement, spec: Spec, exact: Callable[..., dict]) -> dict[str, Any]:
    _check_possible(one)
    memory = PeakMemory()
    inputs = _inputs(spec.seed, one.batch, one.dim)
    loss = loss_of(one.way)
    with default_tile(one.tile):
        function = jax.value_and_grad(loss, (0, 1, 2)) if one.gradients else loss
        program = compile_program(function, *inputs[0])
    results = jax.device_get(program.call(*inputs[0]))
    facts = memory.facts()  # before the reference, which needs more memory
    errors = _checked(one, results, exact(one.batch, one.dim))
    timed = time_calls(program.call, inputs, spec.sizes)
    products = 3 if one.gradients else 1  # backward adds two; recomputation is not counted
    flops = products * 2.0 * one.batch**2 * one.dim
    return {**program.facts, **facts, **errors, "flops": flops, "pairs": one.batch, **timed}


def _checked(one: Measurement, results: Any, wanted: dict[str, np.ndarray]) -> dict[str, Any]:
    value, slopes = results if one.gradients else (results, ())
    errors = checked({"loss": value}, {"loss": wanted["loss"]}, tolerance=LOSS_TOLERANCE)
    named_slopes = dict(zip(GRADIENTS, slopes, strict=False))
    if named_slopes:
        more = checked(
            named_slopes, {name: wanted[name] for name in named_slopes}, tolerance=TOLERANCE
        )
        errors["errors"] |= more["errors"]
    return errors


def _check_possible(one: Measurement) -> None:
    if one.way == "pallas_gpu":
        require_kernels()
    stats: dict[str, Any] = jax.devices()[0].memory_stats() or {}
    needed, limit = 3 * 4 * one.batch**2, stats.get("bytes_limit")
    if one.way == "reference" and limit and needed > limit:
        raise NotHere(
            f"three float32 matrices of {one.batch:,} × {one.batch:,} take "
            f"{needed / 2**30:.0f} GiB of {limit / 2**30:.0f}"
        )


def _inputs(seed: int, batch: int, dim: int) -> list[tuple[Array, ...]]:
    temperature = jnp.float32(TEMPERATURE)
    return [(*_sides(seed + 2 * number, batch, dim), temperature) for number in range(_NUM_INPUTS)]


def _sides(seed: int, batch: int, dim: int) -> tuple[Array, Array]:
    first, second = (unit_rows(seed + side, batch, dim, dtype="bfloat16") for side in (0, 1))
    return first, second


def _exact(seed: int, batch: int, dim: int) -> dict[str, np.ndarray]:
    return exact_infonce(*_sides(seed, batch, dim), TEMPERATURE, dtype="float32")
