"""The PyTorch twin's other end: starts its process, gives it the model, checks that both agree."""

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcl.ops.mesh import put_batch
from jaxcl.run.training import Training, build_training
from jaxcl.settings.sections import Settings
from jaxcl.typing import SIDES, Batch, PyTree

__all__ = ["Ask", "agreement", "torch_process", "torch_twin"]

Ask = Callable[[str, int], dict[str, Any]]
"""Sends the twin a command and a count, and returns its answer."""

_CHECKED_STEPS = 3
_LARGEST_DIFFERENCE = 1e-4
_PROGRAM = Path(__file__).with_name("train_step_torch.py")


@contextlib.contextmanager
def torch_twin(
    python: str,
    spec: Mapping[str, Any],
    program: Training,
    batches: Sequence[Batch],
    workdir: Path,
    *,
    huge_pages: bool = False,
) -> Iterator[tuple[Ask, dict[str, Any]]]:
    """The PyTorch process: a function that sends it a command, and what it says of itself.

    Args:
      python: an interpreter with torch and NumPy.
      spec: the model, its optimiser and how both are written; `train_step_torch.py` reads it.
      program: whose initial parameters the twin takes over.
      batches: what it trains on, in turn; NumPy arrays.
      workdir: where its input is written.
      huge_pages: with the environment that `jaxcl.train` gives itself (`jaxcl.host.huge_pages`). No
        PyTorch program does so by itself.
    """
    arrays, spec_file = workdir / "arrays.npz", workdir / "spec.json"
    named: dict[str, Any] = _named(program.init().params)
    for side in SIDES:
        named[f"batches/{side}"] = np.stack([batch[side]["tokens"] for batch in batches])
    np.savez(arrays, **named)
    spec_file.write_text(json.dumps({**spec, "arrays": str(arrays)}))
    with torch_process(python, _PROGRAM, spec_file, huge_pages=huge_pages) as (ask, facts):
        yield ask, facts


@contextlib.contextmanager
def torch_process(
    python: str, program: Path, spec_file: Path, *, huge_pages: bool = False
) -> Iterator[tuple[Ask, dict[str, Any]]]:
    """Start a process that answers commands; yield a function to send one, and the first answer.

    Args:
      python: an interpreter with torch.
      program: a script that prints a line of JSON when it is ready, and one per line of input.
      spec_file: the argument of the script.
      huge_pages: as `torch_twin`.
    """
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # or it spins in others' time
    if not huge_pages:
        environment.pop("GLIBC_TUNABLES", None)
    with subprocess.Popen(
        [python, str(program), str(spec_file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        commands, answers = process.stdin, process.stdout
        assert commands is not None
        assert answers is not None

        def answer() -> dict[str, Any]:
            line = answers.readline()
            if not line:
                raise RuntimeError(
                    f"the PyTorch process of {python} ended with {process.wait()}; "
                    "--torch-python needs an interpreter with the packages that "
                    f"{program.name} imports"
                )
            return json.loads(line)

        def ask(command: str, count: int) -> dict[str, Any]:
            commands.write(f"{command} {count}\n")
            commands.flush()
            return answer()

        try:
            yield ask, answer()
        finally:
            commands.close()


def agreement(settings: Settings, batches: Sequence[Batch], ask: Ask) -> dict[str, float]:
    """Relative differences between both over a few updates.

    Args:
      settings: the run's, without dropout.
      batches: the twin's.
      ask: the twin.

    Raises:
      RuntimeError: if the first loss or gradient norm is not the same: another model, no twin.
    """
    theirs = ask("losses", _CHECKED_STEPS)
    program = build_training(settings)
    state = program.init()
    ours: dict[str, list[float]] = {"losses": [], "gradient_norms": []}
    for step in range(_CHECKED_STEPS):
        batch = put_batch(batches[step % len(batches)], program.mesh)
        state, metrics = program.train_step(state, batch)
        ours["losses"].append(float(metrics.loss))
        ours["gradient_norms"].append(float(metrics.gradient_norm))
    difference = {
        name: [abs(a - b) / abs(b) for a, b in zip(ours[name], theirs[name], strict=True)]
        for name in ours
    }
    if max(difference["losses"][0], difference["gradient_norms"][0]) > _LARGEST_DIFFERENCE:
        raise RuntimeError(f"jaxcl computes {ours} and PyTorch {theirs}: not the same model")
    return {
        "relative difference of the first loss": difference["losses"][0],
        "relative difference of the first gradient norm": difference["gradient_norms"][0],
        f"relative difference of loss {_CHECKED_STEPS}": difference["losses"][-1],
    }


def _named(params: PyTree) -> dict[str, np.ndarray]:
    """Parameters by their path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
