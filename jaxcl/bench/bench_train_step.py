"""How fast is a training step compared with PyTorch, and how much of the loop is XLA's work?

    python -m jaxcl.bench train_step [--model static|transformer] [--rounds N]
        [--torch-python PATH] [--json FILE]

Three programs are timed in turn, each for some steps, while the others sleep:

- *step*: the jitted update on batches that are already on the device;
- *loop*: the training loop of a run: the order of rows, the loader, the update, reading metrics one
  step late, and writing records;
- *PyTorch*: the same model on the same batches, in a separate process. Before the timing, both
  programs make a few updates from the same parameters without dropout, and must agree on loss and
  gradient.

Each program makes one or two warm-up steps before its timing, and rounds alternate between this
order and its reverse. The share of the loop that is not XLA's work is `1 - loop / step`, computed
per round.
"""

import contextlib
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcl.assignment import uniform_rows
from jaxcl.bench.bench_embedding_bag import row_lengths, zipf_tokens
from jaxcl.bench.benchmark_parser import benchmark_parser
from jaxcl.bench.torch_twin import agreement, torch_twin
from jaxcl.data.loader import training_batches
from jaxcl.data.table import table_batch
from jaxcl.data.text_rule import TextRule
from jaxcl.data.token_table import TokenTable
from jaxcl.host.progress import progress_bar
from jaxcl.ops.mesh import put_batch
from jaxcl.run.metric_writer import MetricWriter
from jaxcl.run.reports import Reports
from jaxcl.run.training import Training, build_training
from jaxcl.settings.read import read_settings
from jaxcl.settings.sections import Settings
from jaxcl.typing import SIDES, Batch

__all__ = ["DEFAULT_SHAPES", "StepShape", "main", "measure"]

_RESIDENT_BATCHES = 4
_MANY_STEPS = 1_000_000  # more than any benchmark runs, so the learning rate hardly decays


class StepShape(NamedTuple):
    """The model to train, and the sizes of its batches.

    Attributes:
      model: a name in `jaxcl.models.ENCODERS`.
      options: the model's options.
      dropout: the rate of the augmentation `token_dropout`, or of the encoder's option `dropout`.
      dim: the width of the embeddings.
      batch_size: the pairs per batch.
      max_tokens: side -> the width of its batches.
      mean_tokens: side -> the approximate mean number of tokens without padding.
      steps: the steps per round.
      num_rows: the rows of the data set, which fits into memory.
      vocabulary_size: the size of the tokenizer's vocabulary.
    """

    model: str
    options: Mapping[str, Any]
    dropout: float
    dim: int
    batch_size: int
    max_tokens: Mapping[str, int]
    mean_tokens: Mapping[str, int]
    steps: int
    num_rows: int = 16_384
    vocabulary_size: int = 16_384


DEFAULT_SHAPES: Mapping[str, StepShape] = {
    "static": StepShape(
        model="static",
        options={"max_tokens": 128},
        dropout=0.5,
        dim=512,
        batch_size=1_024,
        max_tokens={"query": 32, "key": 128},
        mean_tokens={"query": 11, "key": 55},
        steps=20,
    ),
    "transformer": StepShape(
        model="transformer",
        options={
            "max_tokens": 64,
            "hidden_dim": 384,
            "num_layers": 6,
            "num_heads": 6,
            "mlp_dim": 1_536,
            "compute_dtype": "float32",
        },
        dropout=0.1,
        dim=384,
        batch_size=128,
        max_tokens={"query": 64, "key": 64},
        mean_tokens={"query": 48, "key": 48},
        steps=2,
    ),
}
"""Model -> its shape: the static encoder of `configs/code_search.py`, a transformer like MiniLM."""


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Measure one of the default shapes."""
    parser = benchmark_parser("train_step", __doc__)
    parser.add_argument("--model", choices=DEFAULT_SHAPES, default="static")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--torch-python", help="an interpreter with torch; without it, jaxcl alone")
    parser.add_argument(
        "--torch-variant",
        choices=("ragged", "padded", "einsum"),
        default="ragged",
        help="how the static encoder sums in PyTorch; ragged is its fastest",
    )
    parser.add_argument(
        "--torch-adam",
        choices=("fused", "foreach"),
        default="fused",
        help="the implementation of Adam in PyTorch; fused is its fastest",
    )
    parser.add_argument(
        "--torch-huge-pages",
        action="store_true",
        help="let PyTorch use huge pages, as jaxcl does",
    )
    arguments = vars(parser.parse(argv))
    return measure(DEFAULT_SHAPES[arguments.pop("model")], **arguments)


def measure(
    shape: StepShape,
    *,
    rounds: int,
    torch_python: str | None = None,
    torch_variant: str = "ragged",
    torch_adam: str = "fused",
    torch_huge_pages: bool = False,
) -> dict[str, Any]:
    """Time the step, the loop and PyTorch in turn, round after round.

    Args:
      shape: the model and its batches.
      rounds: the number of timings of each program.
      torch_python: an interpreter with torch; `None` leaves PyTorch out.
      torch_variant: how the static encoder sums in PyTorch.
      torch_adam: the implementation of Adam in PyTorch.
      torch_huge_pages: whether PyTorch uses huge pages, as jaxcl does.

    Returns:
      The record that `jaxcl.bench` prints, in pairs per second.

    Raises:
      RuntimeError: if PyTorch computes another loss or gradient, or does not run.
    """
    settings = _settings(shape)
    program = build_training(settings)
    table = _token_table(shape)
    host_batches = [
        table_batch(table, _rows(settings, table)(step)) for step in range(_RESIDENT_BATCHES)
    ]
    batches = [put_batch(batch, program.mesh) for batch in host_batches]
    facts: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        workdir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxcl-bench-")))
        step = _ResidentSteps(program, batches)
        facts["first step with compilation, s"] = step.run(1)
        loop = stack.enter_context(_loop(program, table, workdir))
        timed: dict[str, Callable[[int], float]] = {"jaxcl step": step.run, "jaxcl loop": loop}
        if torch_python is not None:
            spec = _twin_spec(settings, shape, torch_variant, torch_adam)
            run_torch, torch_facts = stack.enter_context(
                torch_twin(
                    torch_python,
                    spec,
                    program,
                    host_batches,
                    workdir,
                    huge_pages=torch_huge_pages,
                )
            )
            still = _settings(shape, drops=False)
            facts.update(torch_facts, **agreement(still, host_batches, run_torch))
            timed["PyTorch step"] = lambda count: run_torch("run", count)["seconds"]
        rates = _rates(timed, shape, rounds)
    facts.update(_comparisons(rates))
    return {
        "shapes": shape._asdict(),
        "unit": "pairs/s",
        "rounds": rates,
        "facts": facts,
    }


def _rates(
    timed: Mapping[str, Callable[[int], float]], shape: StepShape, rounds: int
) -> dict[str, list[float]]:
    """Pairs per second of each program, measured in turn after warm-up steps."""
    rates: dict[str, list[float]] = {name: [] for name in timed}
    for index in range(rounds):
        names = list(timed) if index % 2 == 0 else list(timed)[::-1]
        for name in names:
            timed[name](math.ceil(shape.steps / 10))
            rates[name].append(shape.steps * shape.batch_size / timed[name](shape.steps))
    return rates


def _comparisons(rates: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Medians of ratios within rounds, which do not depend on how a machine's speed drifts."""

    def ratio(name: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(rates[name], rates[other], strict=True))

    compared = {"share of the loop not XLA's": 1 - ratio("jaxcl loop", "jaxcl step")}
    if "PyTorch step" in rates:
        compared["jaxcl step / PyTorch step"] = ratio("jaxcl step", "PyTorch step")
        compared["jaxcl loop / PyTorch step"] = ratio("jaxcl loop", "PyTorch step")
    return compared


class _ResidentSteps:
    """Updates of one state on batches that are already on the device."""

    def __init__(self, program: Training, batches: Sequence[Batch]):
        self._program, self._batches = program, batches
        self._state, self._position = program.init(), 0
        jax.block_until_ready(self._state)

    def run(self, count: int) -> float:
        """Run `count` updates, and return the seconds."""
        unread: jax.Array | None = None
        start = time.perf_counter()
        for _ in range(count):
            batch = self._batches[self._position % len(self._batches)]
            self._state, metrics = self._program.train_step(self._state, batch)
            # One step late, as in the loop, so that the same number of updates is in flight.
            if unread is not None:
                unread.block_until_ready()
            unread = metrics.loss
            self._position += 1
        jax.block_until_ready(self._state)
        return time.perf_counter() - start


@contextlib.contextmanager
def _loop(program: Training, table: TokenTable, workdir: Path) -> Iterator[Callable[[int], float]]:
    """Yield a function that runs the loop of `jaxcl.train` for a number of steps.

    Each call continues with the next batches, which the loader has prefetched, as within a run.
    """
    settings = program.settings
    batches = enumerate(
        training_batches(
            table, _rows(settings, table), program.mesh, first_step=0, last_step=settings.steps
        ),
        start=1,
    )
    state = program.init()
    with (
        contextlib.closing(MetricWriter(workdir, step=0)) as writer,
        progress_bar("training", settings.steps) as advance,
    ):
        reports = Reports(program, writer, advance)

        def run(count: int) -> float:
            nonlocal state
            start = time.perf_counter()
            for _ in range(count):
                step, batch = next(batches)
                state, metrics = program.train_step(state, batch)
                reports.add(step, metrics)
            reports.flush()
            jax.block_until_ready(state)
            return time.perf_counter() - start

        yield run


def _settings(shape: StepShape, *, drops: bool = True) -> Settings:
    """The settings of a step of `configs/code_search.py`, without warmup."""
    rate = shape.dropout if drops else 0.0
    augments = shape.model == "static"
    dropout = {} if augments else {"dropout": rate}
    augmentation = {"name": "token_dropout", "options": {"rate": rate}} if augments else {}
    return read_settings(
        {
            "seed": 0,
            "steps": _MANY_STEPS,
            "global_batch_size": shape.batch_size,
            "data": {
                "vocabulary_size": shape.vocabulary_size,
                "max_tokens": dict(shape.max_tokens),
            },
            "model": {
                "name": shape.model,
                "shared": True,
                "dim": shape.dim,
                "options": {**shape.options, **dropout},
            },
            "augmentation": augmentation,
            "loss": {
                "name": "infonce",
                "options": {"directions": ("query_to_key", "key_to_query")},
                "masks": ("row",),
                "temperature": {"initial": 0.05, "minimum": 0.01, "maximum": 1.0},
            },
            "optimizer": {
                "name": "adam",
                "learning_rate": 1e-3,
                "warmup_steps": 0,
                "weight_decay": 0.0,
                "clip_norm": 1.0,
                "options": {},
            },
            "evaluation": {"batch_size": shape.batch_size},
            "run": {"mesh": {"data": -1}, "log_every": min(20, shape.steps)},
        }
    )


def _twin_spec(settings: Settings, shape: StepShape, variant: str, adam: str) -> dict[str, Any]:
    return {
        "model": shape.model,
        **shape.options,
        "dropout": shape.dropout,
        "variant": variant,
        "adam": adam,
        "learning_rate": settings.optimizer.learning_rate,
        "clip_norm": settings.optimizer.clip_norm,
        "temperature_bounds": list(settings.loss.temperature[1:]),
        "seed": settings.seed,
        "threads": os.cpu_count(),
    }


def _token_table(shape: StepShape) -> TokenTable:
    rng = np.random.default_rng(0)
    tokens, offsets = {}, {}
    for side in SIDES:
        lengths = row_lengths(
            rng, shape.num_rows, mean=shape.mean_tokens[side], width=shape.max_tokens[side]
        )
        offsets[side] = np.append(0, np.cumsum(lengths))
        tokens[side] = zipf_tokens(
            rng, int(offsets[side][-1]), vocabulary_size=shape.vocabulary_size
        )
    numbers = np.arange(shape.num_rows, dtype=np.int32)
    rules = {side: TextRule(shape.max_tokens[side]) for side in SIDES}
    return TokenTable(tokens, offsets, numbers, numbers, rules)


def _rows(settings: Settings, table: TokenTable) -> Callable[[int], np.ndarray]:
    return lambda step: uniform_rows(
        step, num_rows=table.num_rows, batch_size=settings.global_batch_size, seed=settings.seed
    )
