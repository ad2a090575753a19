"""How fast is the symmetric loss with its gradient, and how much memory does it need?

    python -m jaxcl.bench loss [--batch N] [--dim N] [--dtype TYPE] [--devices N] [--rounds N]
        [--torch-python PATH] [--json FILE]

jaxcl's implementations are compared with the pair of local losses of open_clip: both sides are
gathered, and each device computes the scores of its queries over all keys, and of its keys over all
queries. Given an interpreter with torch, PyTorch's cross entropy over the whole matrix is measured
too, eager and compiled. If both share a GPU, set XLA_PYTHON_CLIENT_PREALLOCATE=false.
"""

import functools
import json
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxcl.bench.benchmark_parser import benchmark_parser
from jaxcl.bench.timing import Compiled, compile_all, facts_of, largest_that_fits, milliseconds
from jaxcl.losses import infonce_loss
from jaxcl.ops.mesh import make_mesh
from jaxcl.typing import Array

__all__ = ["main", "measure"]

_AXIS = "data"
_TEMPERATURE = 0.05
_TORCH_PROGRAM = Path(__file__).with_name("loss_torch.py")
_PEAK_SIZE = {"cpu": 2_048}  # rows of a square matrix product; 16,384 on other backends


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Measure one shape."""
    parser = benchmark_parser("loss", __doc__)
    parser.add_argument(
        "--batch", type=int, default=8_192, dest="batch_size", help="pairs over all devices"
    )
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--devices", type=int, default=1, help="fake devices on a CPU")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--torch-python", help="an interpreter with torch; without it, jaxcl alone")
    arguments = parser.parse(argv)
    if arguments.devices > 1:
        jax.config.update("jax_num_cpu_devices", arguments.devices)
    return measure(**vars(arguments))


def measure(
    batch_size: int,
    dim: int,
    *,
    rounds: int,
    devices: int = 1,
    dtype: str = "float32",
    torch_python: str | None = None,
) -> dict[str, Any]:
    """Time all implementations in turn, round after round, then PyTorch.

    Args:
      batch_size: the pairs over all devices.
      dim: the width of the embeddings.
      rounds: the number of repetitions.
      devices: the number of devices that rows are sharded over.
      dtype: the type of the embeddings.
      torch_python: an interpreter with torch; `None` leaves PyTorch out.

    Returns:
      The record that `jaxcl.bench` prints, in milliseconds.

    Raises:
      RuntimeError: if an implementation differs from the reference in loss or gradients.
    """
    if batch_size < devices or batch_size % devices:
        raise ValueError(f"--batch={batch_size} does not divide over {devices} devices")
    functions = _ways(devices, dtype)
    sides = [_unit_rows(seed, batch_size, dim) for seed in (0, 1)]
    arguments = (*_placed(sides, devices, dtype), jnp.float32(_TEMPERATURE))
    compiled, too_large = _compiled_that_fit(functions, arguments)
    results = {name: program.call() for name, program in compiled.items()}
    _check_agreement(results, dtype)
    times = milliseconds({name: program.call for name, program in compiled.items()}, rounds=rounds)
    abstract = functools.partial(_abstract, dim=dim, devices=devices, dtype=dtype)
    gradient_functions = {
        name: way for name, way in functions.items() if not name.endswith("forward")
    }
    facts: dict[str, Any] = {
        **facts_of(compiled),
        **largest_that_fits(gradient_functions, abstract, start=1_024),
        **{f"does not fit, {name}": "" for name in too_large},
    }
    if torch_python is not None:
        torch_times, torch_facts = _torch(torch_python, batch_size, dim, dtype, rounds=rounds)
        times |= torch_times
        facts |= torch_facts
        if "PyTorch's loss" in facts:
            loss = jax.tree.leaves(results["tiled"])[0]
            facts["PyTorch's loss less jaxcl's"] = facts.pop("PyTorch's loss") - float(loss)
    facts["TFLOP/s, a large product"] = _peak(dtype, rounds=rounds)
    for name, figures in times.items():
        # Necessary products: one forward, two more backward, without recomputation.
        products = 1 if name.endswith("forward") else 3
        work = products * 2 * batch_size**2 * dim / devices
        facts[f"TFLOP/s a device, {name}"] = work / statistics.median(figures) / 1e9
    shapes = {"batch": batch_size, "dim": dim, "dtype": dtype, "devices": devices}
    return {"shapes": shapes, "unit": "ms", "rounds": times, "facts": facts}


def _ways(devices: int, dtype: str) -> Mapping[str, Callable]:
    """Functions for the loss and its gradients, and for the loss alone, by name."""
    ways: dict[str, dict[str, Any]] = {
        "tiled": {"implementation": "tiled"},
        "reference": {"implementation": "reference"},
    }
    if devices > 1:
        ways["tiled, ring"] = {"implementation": "tiled", "exchange": "ring"}
    kernels = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}.get(jax.default_backend())
    if kernels == "pallas_tpu" or (kernels == "pallas_gpu" and dtype == "bfloat16"):
        ways[kernels] = {"implementation": kernels}
    losses: dict[str, Callable] = {
        name: functools.partial(infonce_loss, **options) for name, options in ways.items()
    }
    losses["open_clip's pair"] = _local_pair
    return {
        **{name: _differentiated(loss, devices) for name, loss in losses.items()},
        **{f"{name}, forward": _forward(loss, devices) for name, loss in losses.items()},
    }


def _compiled_that_fit(
    functions: Mapping[str, Callable], arguments: tuple
) -> tuple[dict[str, Compiled], list[str]]:
    compiled: dict[str, Compiled] = {}
    too_large: list[str] = []
    for name, function in functions.items():
        try:
            compiled |= compile_all({name: function}, arguments)
            jax.block_until_ready(compiled[name].call())
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            compiled.pop(name, None)
            too_large.append(name)
    return compiled, too_large


def _peak(dtype: str, *, rounds: int) -> float:
    size = _PEAK_SIZE.get(jax.default_backend(), 16_384)
    square = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    times = milliseconds({"product": functools.partial(product, square, square)}, rounds=rounds)
    return 2 * size**3 / statistics.median(times["product"]) / 1e9


def _torch(
    python: str, batch_size: int, dim: int, dtype: str, *, rounds: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    spec = {"batch": batch_size, "dim": dim, "dtype": dtype, "rounds": rounds}
    spec |= {"temperature": _TEMPERATURE}
    command = [python, str(_TORCH_PROGRAM), json.dumps(spec)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"PyTorch failed: {finished.stderr.strip()[-400:]}")
    answer = json.loads(finished.stdout.splitlines()[-1])
    return answer["rounds"], answer["facts"]


def _differentiated(loss_fn: Callable, devices: int) -> Callable:
    return jax.value_and_grad(_forward(loss_fn, devices), (0, 1, 2))


def _forward(loss_fn: Callable, devices: int) -> Callable:
    mesh = make_mesh({_AXIS: devices}, devices=jax.devices()[:devices])
    rows, replicated = PartitionSpec(_AXIS), PartitionSpec()

    def local(queries: Array, keys: Array, temperature: Array) -> Array:
        return loss_fn(queries, keys, temperature=temperature, axis_name=_AXIS)

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, replicated), out_specs=rows)
    return lambda *inputs: sharded(*inputs).mean()


def _local_pair(queries: Array, keys: Array, *, temperature: Array, axis_name: str) -> Array:
    first = lax.axis_index(axis_name) * queries.shape[0]
    labels = first + jnp.arange(queries.shape[0])
    cross_entropies = (
        optax.softmax_cross_entropy_with_integer_labels(
            rows @ lax.all_gather(columns, axis_name, tiled=True).T / temperature, labels
        )
        for rows, columns in ((queries, keys), (keys, queries))
    )
    return sum(cross_entropies) / 2


def _check_agreement(results: Mapping[str, Any], dtype: str) -> None:
    if "reference" not in results:
        return
    largest = {"float32": 1e-3, "bfloat16": 2e-2}[dtype]
    expected = results["reference"]
    for name, result in results.items():
        # The loss comes first; a forward pass alone returns nothing else.
        for pair in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=False):
            leaf, reference = (value.astype(jnp.float32) for value in pair)
            difference = jnp.linalg.norm(leaf - reference) / jnp.linalg.norm(reference)
            if not difference < largest:
                raise RuntimeError(f"{name} differs from the reference by {difference:.1e}")


def _unit_rows(seed: int, batch_size: int, dim: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(batch_size, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _placed(sides: Sequence[np.ndarray], devices: int, dtype: str) -> list[Array]:
    mesh = make_mesh({_AXIS: devices}, devices=jax.devices()[:devices])
    sharding = NamedSharding(mesh, PartitionSpec(_AXIS))
    return [jax.device_put(jnp.asarray(side, dtype), sharding) for side in sides]


def _abstract(
    batch_size: int, *, dim: int, devices: int, dtype: str
) -> tuple[jax.ShapeDtypeStruct, ...]:
    mesh = make_mesh({_AXIS: devices}, devices=jax.devices()[:devices])
    sharding = NamedSharding(mesh, PartitionSpec(_AXIS))
    side = jax.ShapeDtypeStruct((batch_size, dim), dtype, sharding=sharding)
    return side, side, jax.ShapeDtypeStruct((), jnp.float32)
