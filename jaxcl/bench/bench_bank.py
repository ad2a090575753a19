"""What does a memory bank add to the time and memory of a training step?

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m jaxcl.bench bank
        [--slots N] [--uniform N] [--dim N] [--batch N] [--tokens QUERY KEY] [--dtype bfloat16]
        [--rounds N] [--json FILE]

The step is that of `configs/code_search_transformer.py`, with the sizes in the flags. The draw
costs the same for any batch size, so its share of the step is largest for a small batch.
"""

import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxcl.bench.benchmark_parser import benchmark_parser
from jaxcl.bench.timing import milliseconds
from jaxcl.ops.mesh import put_batch
from jaxcl.run.training import build_training
from jaxcl.settings.read import read_settings
from jaxcl.settings.sections import Settings
from jaxcl.step.train_state import TrainState
from jaxcl.typing import SIDES, Batch

__all__ = ["main", "measure"]


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Measure one shape."""
    parser = benchmark_parser("bank", __doc__)
    parser.add_argument("--slots", type=int, default=2**20)
    parser.add_argument("--uniform", type=int, default=2_048)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--tokens", type=int, nargs=2, default=[64, 256])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse(argv)
    return measure(**vars(arguments))


def measure(
    *,
    slots: int,
    uniform: int,
    dim: int,
    batch: int,
    tokens: Sequence[int],
    dtype: str,
    rounds: int,
) -> dict[str, Any]:
    """Time steps with and without a full bank, in turn.

    Args:
      slots: the slots of the queue.
      uniform: the number of slots that are drawn as negatives of every query.
      dim: the width of the embeddings.
      batch: the pairs of a global batch.
      tokens: the tokens of a query and of a key.
      dtype: the type of the bank's vectors.
      rounds: the number of repetitions.

    Returns:
      The record that `jaxcl.bench` prints, in milliseconds.
    """
    from jaxcl.configs.code_search_transformer import get_config

    config = get_config()
    config.global_batch_size = batch
    config.model.dim = dim
    config.data.max_tokens = ConfigDict(dict(zip(SIDES, tokens, strict=True)))
    config.negatives.bank.update({"slots": slots, "dtype": dtype})
    config.negatives.tiers.update({"full_bank": False, "uniform": uniform})
    facts: dict[str, Any] = {}
    steps = {}
    for name, kind in (("without a bank", None), ("with a bank", "queue")):
        config.negatives.bank.kind = kind
        config.negatives.tiers.uniform = uniform if kind else 0
        steps[name], memory = _resident(read_settings(config))
        facts |= {f"{what}, {name}": figure for what, figure in memory.items()}
    size = np.dtype(jax.numpy.dtype(dtype)).itemsize
    facts["MiB of a device's share of the bank"] = (
        slots * (dim * size + 12) / jax.device_count() / 2**20
    )
    facts["MiB of the draw"] = uniform * dim * size / 2**20
    times = milliseconds(steps, rounds=rounds)
    without, with_bank = (times[name] for name in steps)
    shares = sorted(b / a - 1 for a, b in zip(without, with_bank, strict=True))
    facts["added to a step, median"] = shares[len(shares) // 2]
    facts["added to a step, least and most"] = f"{shares[0]:.3f} {shares[-1]:.3f}"
    return {
        "shapes": {"slots": slots, "uniform": uniform, "dim": dim, "batch": batch}
        | {"tokens": "+".join(map(str, tokens)), "dtype": dtype},
        "unit": "ms",
        "rounds": times,
        "facts": facts,
    }


def _resident(settings: Settings) -> tuple[Any, dict[str, float]]:
    """A function that repeats updates of one state, and its program's compile time and memory."""
    program = build_training(settings)
    state, batch = _filled(program.init()), put_batch(_batch(settings), program.mesh)
    start = time.perf_counter()
    compiled = program.train_step.lower(state, batch).compile()  # type: ignore[attr-defined] # jitted
    memory = compiled.memory_analysis()
    facts = {
        "compile s": time.perf_counter() - start,
        "MiB of state and batch a device": memory.argument_size_in_bytes / 2**20,
        "temporary MiB a device": memory.temp_size_in_bytes / 2**20,
    }

    def step() -> Any:
        nonlocal state
        state, metrics = compiled(state, batch)
        return metrics.loss

    return step, facts


def _filled(state: TrainState) -> TrainState:
    """The state with every slot of its bank written."""
    banks = {
        side: bank._replace(
            vectors=bank.vectors + 1 / bank.vectors.shape[1] ** 0.5,
            written=bank.written + 1,
        )
        for side, bank in state.memory.get("bank", {}).items()
    }
    return state._replace(memory=state.memory | ({"bank": banks} if banks else {}))


def _batch(settings: Settings) -> Batch:
    rng = np.random.default_rng(0)
    rows = np.arange(settings.global_batch_size, dtype=np.int32)
    sides = {
        side: {
            "tokens": rng.integers(1, settings.data.vocabulary_size, (len(rows), width)).astype(
                np.int32
            )
        }
        for side, width in settings.data.max_tokens._asdict().items()
    }
    return {**sides, "row": rows, "text": rows, "group": rows}
