"""Plans a run's train step before anything is rented: memory, arithmetic, traffic, price.

    python -m jaxcl.plan --config configs/code_search.py --topology v5e:16x16 --rows 10000000 \\
        --price 1.2 --sweep global_batch_size=8192,32768

The real step is compiled ahead of time for a slice of TPUs that is not there (which needs
jaxcl[tpu]), or, with `--devices 8`, for that number of devices of the present kind. Memory is what
the compiler plans; times are estimates from the chip maker's peak rates.
"""

import ast
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
from jaxcl.settings.changed import changed_config
from jaxcl.settings.command_line import add_config_flags, config_of
from jaxcl.settings.derived import with_encoder_options
from jaxcl.settings.read import read_settings
from jaxcl.settings.sections import GradCacheSettings, Settings
from jaxcl.step.train_state import TrainState
from jaxcl.typing import SIDES, Batch, Embeddings, PyTree, RowKeys

__all__ = ["NoRoomError", "Plan", "make_plan"]

_GIB = 2**30
_TPUS = [name for name in CHIPS if name.startswith("v")]
_OF_ACTIVATIONS = "grad_cache.chunk_size or model.options.remat, or more devices"
_OF_LOSS = "loss.exchange=ring, loss.implementation=tiled, or smaller tiers of negatives"


class NoRoomError(ValueError):
    """The compiler finds no way to fit a step into the memory of a device."""


class Plan(NamedTuple):
    """Of one device, and of one step.

    Attributes:
      devices: how many there are.
      parameters: bytes of the model's.
      optimizer: bytes of its state.
      memory: bytes of banks, row tables, orders, and a momentum encoder.
      batch: bytes of its rows.
      loss: bytes that the loss and its gradient take beside the embeddings: gathered keys, tiles.
      activations: bytes of all else that a step needs at its most: activations, gradients.
      flops: products and sums in the matrix products of a step.
      accessed: bytes that a step reads and writes in the device's memory.
      moved: bytes that come in from other devices.
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
        """Bytes that are free again after a step."""
        return self.loss + self.activations

    @property
    def total(self) -> int:
        """All bytes of a device."""
        return self.parameters + self.optimizer + self.memory + self.batch + self.temporary

    def seconds(self, chip: Chip) -> dict[str, float]:
        """A step's time if nothing but one thing took any; the longest bounds it."""
        return {
            "compute": self.flops / chip.flops,
            "memory": self.accessed / chip.memory_rate,
            "interconnect": self.moved / chip.link_rate,
        }


def make_plan(settings: Settings, devices: Sequence[jax.Device], *, num_rows: int) -> Plan:
    """Compiles a run's step for devices, which need not be there, and reads what it takes.

    Args:
      settings: the run's. Negatives that the rows bring are planned for only if
        `data.negatives_per_row` is set.
      devices: all of them are used, as `settings.run.mesh` arranges them.
      num_rows: of the training split, for what has an entry for each row.

    Raises:
      ValueError: for a run that cannot run there, or whose batches hold what only its data know.
      NoRoomError: where the devices' compiler itself knows that the step does not fit.
    """
    _check_known(settings, num_rows)
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
    traced = program.train_step.trace(state, batch)  # type: ignore[attr-defined] # a jitted one's
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
    """Raise a `ValueError` for a run whose batches cannot be known without its data."""
    if settings.data.negatives is not None or settings.data.guides is not None:
        raise ValueError("data.negatives and data.guides have shapes that only their files know")
    scored = "teacher_scores" in batch_needs(settings)
    if scored and not settings.data.negatives_per_row:
        raise ValueError(
            f"the loss {settings.loss.name!r} compares a row's negatives; set "
            "data.negatives_per_row to the number of them"
        )
    if num_rows < settings.global_batch_size:
        raise ValueError(
            f"--rows={num_rows} are fewer than one batch of {settings.global_batch_size}"
        )


def _loss_bytes(
    settings: Settings, mesh: jax.sharding.Mesh, state: TrainState, batch: Batch
) -> int:
    """What the loss needs for itself: that of embeddings that are given, and their gradient."""

    def given(params: PyTree, side: str, inputs: PyTree, rngs: RowKeys | None = None) -> Embeddings:
        return inputs

    whole = settings._replace(grad_cache=GradCacheSettings())
    loss = build_loss(whole, Towers(lambda key: {}, lambda source: {}, given), mesh)

    def embedded(inputs: PyTree, num_axes: int) -> jax.ShapeDtypeStruct:
        one: Any = jax.tree.leaves(inputs)[0]
        shape = (*one.shape[:num_axes], settings.model.dim)
        return jax.ShapeDtypeStruct(shape, np.float32, sharding=one.sharding)

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
    """What would help most, where it does not fit."""
    kept = plan.parameters + plan.optimizer
    if plan.memory >= max(kept, plan.temporary):
        return "negatives.bank.dtype=bfloat16, or a smaller bank or momentum encoder"
    if kept >= plan.temporary:
        return "run.mesh.fsdp, which shards parameters and optimiser"
    return _OF_LOSS if plan.loss > plan.activations else _OF_ACTIVATIONS


def _table(
    plans: dict[str, Plan], chip: Chip | None, batch_sizes: list[int], price: float
) -> Table:
    table = Table("of a device", *plans)

    def row(name: str, cells: list[str]) -> None:
        table.add_row(name, *cells)

    parts = ("parameters", "optimizer", "memory", "batch", "loss", "activations", "total")
    for name in parts:
        title = "banks and tables" if name == "memory" else name
        row(f"{title}, MiB", [f"{getattr(plan, name) / 2**20:,.1f}" for plan in plans.values()])
    row("matrix products, GFLOP", [f"{plan.flops / 1e9:,.1f}" for plan in plans.values()])
    row("read and written, MiB", [f"{plan.accessed / 2**20:,.0f}" for plan in plans.values()])
    row("from others, MiB", [f"{plan.moved / 2**20:,.2f}" for plan in plans.values()])
    if chip is None:
        return table
    fits = [plan.total <= chip.memory for plan in plans.values()]
    row(f"fits {chip.memory / _GIB:.0f} GiB", ["yes" if fit else "no" for fit in fits])
    times = [plan.seconds(chip) for plan in plans.values()]
    longest = [max(seconds.values()) for seconds in times]
    row("time, ms", [f"{1e3 * seconds:,.2f}" for seconds in longest])
    row("bound by", [max(seconds, key=seconds.__getitem__) for seconds in times])
    rates = [size / seconds for size, seconds in zip(batch_sizes, longest, strict=True)]
    row("pairs/s", [f"{rate:,.0f}" for rate in rates])
    if price:
        hours = [1e6 / rate / 3_600 for rate in rates]
        costs = [
            hour * price * plan.devices for hour, plan in zip(hours, plans.values(), strict=True)
        ]
        row("a million pairs cost", [f"{cost:,.4f}" for cost in costs])
    if not all(fits):
        row(
            "what would help",
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
            raise ValueError(f"--devices={count}, but here are {len(devices)}")
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
    except Exception as error:  # of whatever class the compiler raises
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"--topology={topology} is none: {reason}") from error


def _settings(config: ConfigDict, sweep: str | None) -> dict[str, Settings]:
    """Columns of the table: the config, or one for each value of a field."""
    if sweep is None:
        return {"": read_settings(config)}
    field, separator, values = sweep.partition("=")
    if not separator:
        raise ValueError(f"--sweep={sweep}; give a field and its values, as global_batch_size=1,2")
    return {
        f"{field}={value}": read_settings(changed_config(config, {field: _literal(value)}))
        for value in values.split(",")
    }


def _literal(value: str) -> Any:
    """A number, a truth value or None where the text is one."""
    try:
        return ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return value


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = CommandParser("jaxcl.plan", __doc__)
    add_config_flags(parser)
    parser.add_argument("--topology", help="a slice of TPUs, such as v5e:16x16")
    parser.add_argument(
        "--devices", type=int, help="a number of devices of the present kind instead"
    )
    parser.add_argument(
        "--rows", type=int, default=1_000_000, help="rows of the training split (default: 1000000)"
    )
    parser.add_argument(
        "--price", type=float, default=0.0, help="of a chip and hour; the table is in its currency"
    )
    parser.add_argument("--sweep", metavar="FIELD=VALUE,…", help="a column for each value")
    run_command(parser, _run, argv)


def _run(arguments: Namespace) -> None:
    logging.set_verbosity(logging.ERROR)
    topology, count = arguments.topology, arguments.devices
    if count is not None and count < 1:
        raise ValueError(f"--devices={count}; give at least 1")
    if arguments.price and topology is None:
        raise ValueError("--price is of a chip's hour; say of which with --topology")
    configs = _settings(config_of(arguments), arguments.sweep)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU is used
    # A program from the cache may report other memory than one that is compiled.
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
        raise UserError("nothing fits")
    chip = CHIPS.get(topology.partition(":")[0]) if topology else None
    sizes = [configs[name].global_batch_size for name in plans]
    columns = {name or "step": plan for name, plan in plans.items()}
    Console().print(_table(columns, chip, sizes, arguments.price))
    check_output()


if __name__ == "__main__":
    main()
