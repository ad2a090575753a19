"""Starts the PyTorch twin in a separate process, sends it the model, and compares the results."""

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
"""`(command, count) -> answer` of the twin."""

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
    """Start the PyTorch process; yield a function that sends it commands, and its versions.

    Args:
      python: an interpreter with torch and NumPy.
      spec: the model, its optimizer and their variants, for `train_step_torch.py`.
      program: the training program, whose initial parameters the twin uses.
      batches: the batches that the twin trains on, in turn, as NumPy arrays.
      workdir: the folder for the files that the twin reads.
      huge_pages: whether to set the environment variable that `jaxcl.train` sets for itself
        (`jaxcl.host.huge_pages`). PyTorch programs usually run without it.
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
      program: a script that prints a line of JSON when it is ready, and one for each input line.
      spec_file: the argument of the script.
      huge_pages: as for `torch_twin`.
    """
    environment = {
        **os.environ,
        "OMP_WAIT_POLICY": "PASSIVE",
    }  # otherwise, its threads spin while others are timed
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
    """Compare jaxcl and the twin over a few updates; return relative differences.

    Args:
      settings: the settings of the run, without dropout.
      batches: the batches of the twin.
      ask: sends the twin a command.

    Raises:
      RuntimeError: if the first loss or gradient norm differs, so that the models differ.
    """
    answer = ask("losses", _CHECKED_STEPS)
    program = build_training(settings)
    state = program.init()
    figures: dict[str, list[float]] = {"losses": [], "gradient_norms": []}
    for step in range(_CHECKED_STEPS):
        batch = put_batch(batches[step % len(batches)], program.mesh)
        state, metrics = program.train_step(state, batch)
        figures["losses"].append(float(metrics.loss))
        figures["gradient_norms"].append(float(metrics.gradient_norm))
    difference = {
        name: [abs(a - b) / abs(b) for a, b in zip(figures[name], answer[name], strict=True)]
        for name in figures
    }
    if max(difference["losses"][0], difference["gradient_norms"][0]) > _LARGEST_DIFFERENCE:
        raise RuntimeError(f"jaxcl computes {figures} and PyTorch {answer}: the models differ")
    return {
        "relative difference of the first loss": difference["losses"][0],
        "relative difference of the first gradient norm": difference["gradient_norms"][0],
        f"relative difference of loss {_CHECKED_STEPS}": difference["losses"][-1],
    }


def _named(params: PyTree) -> dict[str, np.ndarray]:
    """The parameters by path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
