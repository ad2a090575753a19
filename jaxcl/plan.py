"""Estimates the memory, time and price of a run's train step before you rent the hardware.

    python -m jaxcl.plan --config configs/code_search.py --topology v5e:16x16 --rows 10000000 \\
        --price 1.2 --sweep global_batch_size=8192,32768

The command compiles the real step for a TPU slice, without the hardware (needs jaxcl[tpu]), or,
with `--devices 8`, for that number of devices of this machine's kind. Memory is the compiler's own
figure. Times are estimates from the chip maker's peak rates. All texts are padded to
`data.max_tokens`: the lengths of the data are unknown, so the plan ignores
`grad_cache.length_buckets`.
"""

import importlib.util
import math
import os
import re
from argparse import Namespace
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.experimental import topologies
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from jaxcl.cost.chips import CHIPS, Chip
from jaxcl.cost.program_cost import matrix_flops, traffic
from jaxcl.data.modalities import modality_of
from jaxcl.host.command import UserError, run_command
from jaxcl.host.command_flags import CommandParser
from jaxcl.host.output import check_output
from jaxcl.host.progress import say
from jaxcl.models.layers import default_compute_dtype
from jaxcl.models.towers import Towers
from jaxcl.ops.mesh import batch_sharding
from jaxcl.run.build_loss import batch_needs, build_loss
from jaxcl.run.training import build_training
from jaxcl.settings.command_line import add_config_flags, config_of, override
from jaxcl.settings.derived import with_encoder_options
from jaxcl.settings.read import read_settings, with_steps
from jaxcl.settings.sections import GradCacheSettings, Settings
from jaxcl.step.train_state import TrainState
from jaxcl.typing import SIDES, Batch, Embeddings, PyTree, RowKeys

__all__ = ["NoRoomError", "Plan", "make_plan"]

_GIB = 2**30
_TPUS = [name for name in CHIPS if name.startswith("v")]
_OF_ACTIVATIONS = "grad_cache.chunk_size or model.options.remat, or more devices"
_OF_LOSS = "loss.exchange=ring, loss.implementation=tiled, or smaller tiers of negatives"


class NoRoomError(ValueError):
    """The compiler cannot fit a step into the memory of a device."""


class Plan(NamedTuple):
    """The cost of one train step on each device.

    Attributes:
      devices: number of devices.
      parameters: bytes of the model's parameters.
      optimizer: bytes of the optimizer state.
      memory: bytes of banks, row tables, batch orders, the momentum encoder and averaged weights.
      batch: bytes of the device's rows of the batch.
      loss: bytes of the loss and its gradient without the embeddings: gathered keys, tiles.
      activations: bytes of everything else at the peak of a step: activations, gradients.
      flops: multiplications and additions in the matrix products and convolutions of a step.
      accessed: bytes that a step reads from and writes to the device's memory.
      moved: bytes that a step receives from other devices.
    """

    devices: int
    parameters: int
    optimizer: int
    memory: int
    batch: int
    loss: int
    activations: int
    flops: float
    accessed: float
    moved: float

    @property
    def temporary(self) -> int:
        """Bytes that a step frees when it ends."""
        return self.loss + self.activations

    @property
    def total(self) -> int:
        """Bytes in use at the peak of a step."""
        return self.parameters + self.optimizer + self.memory + self.batch + self.temporary

    def seconds(self, chip: Chip) -> dict[str, float]:
        """Seconds that each resource alone needs; with rings, a step takes at least the longest."""
        return {
            "compute": self.flops / chip.flops,
            "memory": self.accessed / chip.memory_rate,
            "interconnect": self.moved / chip.link_rate,
        }


def make_plan(settings: Settings, devices: Sequence[jax.Device], *, num_rows: int) -> Plan:
    """Compile a run's train step for devices, which need not be attached, and read its cost.

    Args:
      settings: the settings of the run. Explicit negatives are part of the plan only if
        `data.negatives_per_row` is set.
      devices: all of them are used, arranged as in `settings.run.mesh`.
      num_rows: number of training rows, which determines the size of banks and row tables.

    Raises:
      ValueError: if the run does not fit these devices, or its batches are unknown without data.
      NoRoomError: if the compiler reports that the step does not fit.
    """
    _check_known(settings, num_rows)
    settings = with_steps(settings, num_rows=num_rows)
    dtype = default_compute_dtype(devices[0].platform)
    settings = with_encoder_options(
        settings,
        lambda options, known: (
            {"compute_dtype": dtype, **options} if "compute_dtype" in known else dict(options)
        ),
    )
    program = build_training(settings, devices=devices)
    state = program.abstract_state(num_rows, np.zeros(num_rows, np.int32))
    batch = _abstract_batch(settings, program.mesh)
    traced = program.train_step.trace(state, batch)  # type: ignore[attr-defined] # it is jitted
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = " ".join(str(error).split()).partition("RESOURCE_EXHAUSTED: ")[2]
        raise NoRoomError(f"{reason[:200]}; try {_OF_ACTIVATIONS}; or {_OF_LOSS}") from error
    memory: Any = compiled.memory_analysis()
    moved = traffic(compiled.as_text())
    temporary = memory.temp_size_in_bytes + max(
        memory.output_size_in_bytes - memory.alias_size_in_bytes, 0
    )
    loss = min(_loss_bytes(settings, program.mesh, state, batch), temporary)
    return Plan(
        len(devices),
        parameters=_bytes_here(state.params),
        optimizer=_bytes_here(state.optimizer),
        memory=_bytes_here(state.memory),
        batch=_bytes_here(batch),
        loss=loss,
        activations=temporary - loss,
        flops=matrix_flops(traced.jaxpr) / len(devices),
        accessed=moved.memory,
        moved=moved.interconnect,
    )


def _check_known(settings: Settings, num_rows: int) -> None:
    """Raise a `ValueError` if the shapes of the batches are unknown without the data."""
    if settings.data.negatives is not None or settings.data.guides is not None:
        raise ValueError("the shapes of data.negatives and data.guides are known only from files")
    scored = "teacher_scores" in batch_needs(settings)
    if scored and not settings.data.negatives_per_row:
        raise ValueError(
            f"the loss {settings.loss.name!r} compares the negatives of a row; set "
            "data.negatives_per_row to their number"
        )
    if num_rows < settings.global_batch_size:
        raise ValueError(
            f"--rows={num_rows} is fewer than one batch of {settings.global_batch_size}"
        )


def _loss_bytes(
    settings: Settings, mesh: jax.sharding.Mesh, state: TrainState, batch: Batch
) -> int:
    """The temporary memory, in bytes, of the loss of given embeddings and of its gradient."""

    def given(params: PyTree, side: str, inputs: PyTree, rngs: RowKeys | None = None) -> Embeddings:
        return inputs

    settings = settings._replace(grad_cache=GradCacheSettings())
    loss = build_loss(settings, Towers(lambda key: {}, lambda source: {}, given), mesh)

    def embedded(inputs: PyTree, num_axes: int) -> jax.ShapeDtypeStruct:
        leaf: Any = jax.tree.leaves(inputs)[0]
        shape = (*leaf.shape[:num_axes], settings.model.dim)
        return jax.ShapeDtypeStruct(shape, np.float32, sharding=leaf.sharding)

    # Embeddings instead of inputs; the gradient is taken with respect to them.
    vectors = {side: embedded(batch[side], 1) for side in SIDES}
    rest = {name: column for name, column in batch.items() if name not in SIDES}
    if "negatives" in batch:
        vectors["inputs"] = embedded(batch["negatives"]["inputs"], 2)

    def of_vectors(vectors: PyTree, params: PyTree, memory: PyTree, rest: Batch) -> PyTree:
        full = rest | {side: vectors[side] for side in SIDES}
        if "inputs" in vectors:
            full |= {"negatives": rest["negatives"] | {"inputs": vectors["inputs"]}}
        return loss(params, memory, full, None)

    gradient = jax.jit(jax.value_and_grad(of_vectors, has_aux=True))
    compiled = gradient.lower(vectors, state.params, state.memory, rest).compile()
    memory: Any = compiled.memory_analysis()
    return int(memory.temp_size_in_bytes)


def _abstract_batch(settings: Settings, mesh: jax.sharding.Mesh) -> Batch:
    size = settings.global_batch_size
    sharding = batch_sharding(mesh)

    def column(*shape: int, kind: Any = np.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size, *shape), kind, sharding=sharding)

    def inputs(side: str, *shape: int) -> PyTree:
        spec = modality_of(settings.data, side).spec(settings.data, side)
        return jax.tree.map(lambda leaf: column(*shape, *leaf.shape, kind=leaf.dtype), spec)

    labels = ("row", "text", "group")
    batch: dict[str, Any] = {side: inputs(side) for side in SIDES}
    batch |= {name: column() for name in labels}
    if "score" in settings.parts.loss.columns.values():
        batch["score"] = column(kind=np.float32)
    mined, count = settings.negatives.mined, settings.data.negatives_per_row
    if mined.refresh_every is not None:
        count = mined.per_query
    if count:
        batch["negatives"] = {
            "inputs": inputs("key", count),
            "valid": column(count, kind=np.bool_),
            **{name: column(count) for name in labels},
        }
        if "teacher_scores" in batch_needs(settings):
            batch["teacher_scores"] = column(1 + count, kind=np.float32)
    return batch


def _bytes_here(tree: PyTree) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _advice(plan: Plan) -> str:
    """The settings to change if the step does not fit, by the largest part of its memory."""
    training_state = plan.parameters + plan.optimizer
    if plan.memory >= max(training_state, plan.temporary):
        return "negatives.bank.dtype=bfloat16, or a smaller bank or momentum encoder"
    if training_state >= plan.temporary:
        return "run.mesh.fsdp, which shards parameters and optimizer state"
    return _OF_LOSS if plan.loss > plan.activations else _OF_ACTIVATIONS


def _table(
    plans: dict[str, Plan], chip: Chip | None, batch_sizes: list[int], price: float
) -> Table:
    table = Table("per device", *plans)

    def row(name: str, cells: list[str]) -> None:
        table.add_row(name, *cells)

    parts = ("parameters", "optimizer", "memory", "batch", "loss", "activations", "total")
    titles = {"memory": "banks and tables", "activations": "activations, gradients"}
    for name in parts:
        title = titles.get(name, name)
        row(f"{title}, MiB", [f"{getattr(plan, name) / 2**20:,.1f}" for plan in plans.values()])
    row("matmuls, convolutions, GFLOP", [f"{plan.flops / 1e9:,.1f}" for plan in plans.values()])
    row("read and written, MiB", [f"{plan.accessed / 2**20:,.0f}" for plan in plans.values()])
    row("received from others, MiB", [f"{plan.moved / 2**20:,.2f}" for plan in plans.values()])
    if chip is None:
        return table
    fits = [plan.total <= chip.memory for plan in plans.values()]
    row(f"fits {chip.memory / _GIB:.0f} GiB", ["yes" if fit else "no" for fit in fits])
    times = [plan.seconds(chip) for plan in plans.values()]
    longest = [max(seconds.values()) for seconds in times]
    row("step time, ms", [f"{1e3 * seconds:,.2f}" for seconds in longest])
    row("bound by", [max(seconds, key=seconds.__getitem__) for seconds in times])
    rates = [size / seconds for size, seconds in zip(batch_sizes, longest, strict=True)]
    row("pairs/s", [f"{rate:,.0f}" for rate in rates])
    if price:
        hours = [1e6 / rate / 3_600 for rate in rates]
        costs = [
            hour * price * plan.devices for hour, plan in zip(hours, plans.values(), strict=True)
        ]
        row("price of a million pairs", [f"{cost:,.4f}" for cost in costs])
    if not all(fits):
        row(
            "to make it fit",
            [
                _advice(plan) if not fit else ""
                for plan, fit in zip(plans.values(), fits, strict=True)
            ],
        )
    return table


def _devices(topology: str | None, count: int | None) -> Sequence[jax.Device]:
    if topology is None:
        devices = jax.devices()
        if count is not None and not 0 < count <= len(devices):
            raise ValueError(f"--devices={count}, but this machine has {len(devices)}")
        return devices[:count]
    if not re.fullmatch(rf"({'|'.join(_TPUS)}):\d+(x\d+)*", topology):
        raise ValueError(
            f"--topology={topology!r} is unknown; give {', '.join(_TPUS[:-1])} or {_TPUS[-1]}, and "
            "the shape of the slice, such as v5e:16x16"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("the TPU compiler is not installed: pip install -e '.[tpu]'")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # the compiler may raise any class
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"--topology={topology} does not exist: {reason}") from error


def _settings(config: ConfigDict, sweep: str | None) -> dict[str, Settings]:
    """The settings of each column of the table: the config's, or one for each value of a field."""
    if sweep is None:
        return {"": read_settings(config)}
    field, separator, values = sweep.partition("=")
    if not separator:
        raise ValueError(f"--sweep={sweep}; give a field and its values, as global_batch_size=1,2")
    separate = re.split(r",(?![^(\[]*[)\]])", values)  # at commas outside of parentheses
    return {f"{field}={value}": _changed(config, field, value) for value in separate}


def _changed(config: ConfigDict, field: str, value: str) -> Settings:
    changed = config.copy_and_resolve_references()
    override(changed, field, value, flag="--sweep ")
    return read_settings(changed)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = CommandParser("jaxcl.plan", __doc__)
    add_config_flags(parser)
    parser.add_argument("--topology", help="the TPU slice, such as v5e:16x16; for time and price")
    parser.add_argument(
        "--devices", type=int, help="without --topology: number of devices of this machine's kind"
    )
    parser.add_argument(
        "--rows", type=int, default=1_000_000, help="number of training rows (default: 1000000)"
    )
    parser.add_argument(
        "--price", type=float, default=0.0, help="price of a chip per hour, in any currency"
    )
    parser.add_argument(
        "--sweep", metavar="FIELD=VALUE,…", help="values of a field, one column for each"
    )
    run_command(parser, _run, argv)


def _run(arguments: Namespace) -> None:
    logging.set_verbosity(logging.ERROR)
    topology, count = arguments.topology, arguments.devices
    if count is not None and count < 1:
        raise ValueError(f"--devices={count}; give at least 1")
    if count is not None and topology is not None:
        raise ValueError(
            f"--devices={count} and --topology={topology} are both given, and the topology has its "
            "own number of devices; leave one out"
        )
    if arguments.price and topology is None:
        raise ValueError("--price is the price of a chip per hour; give its kind with --topology")
    configs = _settings(config_of(arguments), arguments.sweep)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU is used
    # A cached program may report other figures for its memory than a newly compiled one.
    jax.config.update("jax_compilation_cache_dir", None)
    if topology is None and count is not None:
        jax.config.update("jax_num_cpu_devices", count)
    devices = _devices(topology, count)
    plans = {}
    for name, settings in configs.items():
        say(f"compiling {name or 'the step'} for {len(devices)} × {devices[0].device_kind}")
        try:
            plans[name] = make_plan(settings, devices, num_rows=arguments.rows)
        except NoRoomError as error:
            say(f"{name or 'the step'} does not fit: {error}")
    if not plans:
        raise UserError("no step fits")
    chip = CHIPS.get(topology.partition(":")[0]) if topology else None
    sizes = [configs[name].global_batch_size for name in plans]
    columns = {name or "step": plan for name, plan in plans.items()}
    Console().print(_table(columns, chip, sizes, arguments.price))
    if topology is None:
        say("for the time of a step and its price, name a TPU slice with --topology")
    check_output()


if __name__ == "__main__":
    main()
