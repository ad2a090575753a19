"""How fast is the symmetric loss with its gradient, and how much memory does it take?

    python -m jaxcl.bench loss [--batch N] [--dim N] [--devices N] [--rounds N] [--json FILE]

Beside jaxcl's own ways stands the pair of local losses of open_clip: both sides are gathered, and
each device computes its queries' scores over all keys, and its keys' over all queries.
"""

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxcl.bench.timing import compile_all, largest_that_fits, memory_bytes, milliseconds
from jaxcl.losses import infonce_loss
from jaxcl.mesh import make_mesh
from jaxcl.typing import Array

__all__ = ["main", "measure"]

_AXIS = "data"
_TEMPERATURE = 0.05


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Measures one shape."""
    parser = argparse.ArgumentParser(prog="python -m jaxcl.bench loss")
    parser.add_argument("--batch", type=int, default=8_192, help="pairs over all devices")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--devices", type=int, default=1, help="fake ones, on a CPU")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args(argv)
    if arguments.devices > 1:
        jax.config.update("jax_num_cpu_devices", arguments.devices)
    return measure(
        arguments.batch, arguments.dim, rounds=arguments.rounds, devices=arguments.devices
    )


def measure(batch_size: int, dim: int, *, rounds: int, devices: int = 1) -> dict[str, Any]:
    """Times all ways in turn, round after round.

    Args:
      batch_size: pairs over all devices.
      dim: width of the embeddings.
      rounds: how often.
      devices: over how many the rows are sharded.

    Returns:
      The record that `jaxcl.bench` prints, in milliseconds.

    Raises:
      RuntimeError: if two ways do not agree on loss and gradients.
    """
    if batch_size < devices or batch_size % devices:
        raise ValueError(f"--batch={batch_size} does not divide over {devices} devices")
    functions = _ways(devices)
    sides = [_unit_rows(seed, batch_size, dim) for seed in (0, 1)]
    arguments = (*_placed(sides, devices), jnp.float32(_TEMPERATURE))
    compiled = compile_all(functions, arguments)
    _check_agreement({name: program.call() for name, program in compiled.items()})
    facts: dict[str, Any] = {}
    for name, program in compiled.items():
        facts[f"compile s, {name}"] = program.seconds
        facts[f"temporary MiB a device, {name}"] = program.temporary_mebibytes
    budget = memory_bytes()
    for name, function in functions.items():
        facts[f"largest batch in {budget / 2**30:.1f} GiB, {name}"] = largest_that_fits(
            function,
            functools.partial(_abstract, dim=dim, devices=devices),
            start=1_024,
            budget=budget,
        )
    return {
        "shapes": {"batch": batch_size, "dim": dim, "devices": devices},
        "unit": "ms",
        "rounds": milliseconds(
            {name: program.call for name, program in compiled.items()}, rounds=rounds
        ),
        "facts": facts,
    }


def _ways(devices: int) -> Mapping[str, Callable]:
    """Loss and gradients of both sides and the temperature, by name."""
    ways: dict[str, dict[str, Any]] = {
        "reference": {"implementation": "reference"},
        "tiled": {"implementation": "tiled"},
    }
    if devices > 1:
        ways["tiled, ring"] = {"implementation": "tiled", "exchange": "ring"}
    losses: dict[str, Callable] = {
        name: functools.partial(infonce_loss, **options) for name, options in ways.items()
    }
    losses["open_clip's pair"] = _local_pair
    return {name: _differentiated(loss, devices) for name, loss in losses.items()}


def _differentiated(loss_fn: Callable, devices: int) -> Callable:
    mesh = make_mesh({_AXIS: devices}, devices=jax.devices()[:devices])
    rows, whole = PartitionSpec(_AXIS), PartitionSpec()

    def local(queries: Array, keys: Array, temperature: Array) -> Array:
        return loss_fn(queries, keys, temperature=temperature, axis_name=_AXIS)

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, whole), out_specs=rows)
    return jax.value_and_grad(lambda *inputs: sharded(*inputs).mean(), (0, 1, 2))


def _local_pair(queries: Array, keys: Array, *, temperature: Array, axis_name: str) -> Array:
    first = lax.axis_index(axis_name) * queries.shape[0]
    labels = first + jnp.arange(queries.shape[0])
    cross_entropies = (
        optax.softmax_cross_entropy_with_integer_labels(
            ours @ lax.all_gather(theirs, axis_name, tiled=True).T / temperature, labels
        )
        for ours, theirs in ((queries, keys), (keys, queries))
    )
    return sum(cross_entropies) / 2


def _check_agreement(results: Mapping[str, Any]) -> None:
    wanted = results["reference"]
    for name, found in results.items():
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            difference = jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs)
            if not difference < 1e-3:
                raise RuntimeError(f"{name} differs from the reference by {difference:.1e}")


def _unit_rows(seed: int, batch_size: int, dim: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(batch_size, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _placed(sides: Sequence[np.ndarray], devices: int) -> list[Array]:
    mesh = make_mesh({_AXIS: devices}, devices=jax.devices()[:devices])
    return [jax.device_put(side, NamedSharding(mesh, PartitionSpec(_AXIS))) for side in sides]


def _abstract(batch_size: int, *, dim: int, devices: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    mesh = make_mesh({_AXIS: devices}, devices=jax.devices()[:devices])
    sharding = NamedSharding(mesh, PartitionSpec(_AXIS))
    side = jax.ShapeDtypeStruct((batch_size, dim), jnp.float32, sharding=sharding)
    return side, side, jax.ShapeDtypeStruct((), jnp.float32)
