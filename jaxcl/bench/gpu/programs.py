"""Part 6: the training program, its checkpoints, and the default config's metrics."""

import functools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jaxcl
from jaxcl.bench.gpu.recorder import CheckFailed, Recorder
from jaxcl.bench.gpu.worker import Spec

__all__ = ["NEEDS_DEVICE", "measure_all"]

NEEDS_DEVICE = False  # the programs started here need the device for themselves

_CONFIG = Path(jaxcl.__file__).parents[1] / "configs" / "code_search.py"


def measure_all(recorder: Recorder, spec: Spec) -> None:
    """Train the smoke config, restore it from its checkpoint, and train the default config."""
    with tempfile.TemporaryDirectory(prefix="jaxcl-gpu-") as directory:
        smoke = Path(directory) / "smoke"
        data = [f"--config.run.data_dir={directory}/data"]
        options = list(spec.sizes.smoke_options)
        if spec.pairs is not None:
            data.append(f"--config.data.name={spec.pairs}")
            # The prepared pairs are fixed, so a setting that selects pairs would be an error.
            options = [option for option in options if "data.code_pairs" not in option]
        train_smoke = functools.partial(
            _train,
            f"{_CONFIG}:smoke",
            smoke,
            *data,
            "--config.evaluation.methods=('dense',)",
            *options,
        )
        recorder.measure("smoke config: train and save", train_smoke)
        recorder.measure(
            "smoke config: restore and evaluate", functools.partial(_restore, train_smoke, smoke)
        )
        if spec.sizes.default_config:
            workdir = Path(directory) / "default"
            recorder.measure(
                "default config, end to end",
                functools.partial(_train, str(_CONFIG), workdir, *data),
            )
        else:
            recorder.write(
                event="skip", name="default config, end to end", why="too long for a rehearsal"
            )


def _train(config: str, workdir: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "jaxcl.train", f"--config={config}", f"--workdir={workdir}"]
    start = time.perf_counter()
    finished = subprocess.run(
        [*command, *options], capture_output=True, text=True, cwd=_CONFIG.parents[1], check=False
    )
    seconds = time.perf_counter() - start
    output = finished.stdout + finished.stderr
    if finished.returncode:
        raise RuntimeError(f"jaxcl.train ended with {finished.returncode}:\n{output}")
    results = json.loads((workdir / "results.json").read_text())
    return {"s": [seconds], "facts": _metrics(results), "results": results, "output": output}


def _restore(train: Any, workdir: Path) -> dict[str, Any]:
    """Run the same command again, which only restores and evaluates; compare the metrics."""
    if not (workdir / "results.json").exists():
        raise CheckFailed("there is no trained run to restore")
    before = _metrics(json.loads((workdir / "results.json").read_text()))
    record = train()
    if record["facts"] != before:
        raise CheckFailed(f"metrics were {before}, and are {record['facts']} when restored")
    if "has completed its" not in record["output"]:
        raise CheckFailed(f"the run began again instead of restoring:\n{record['output']}")
    return record


def _metrics(results: dict[str, Any]) -> dict[str, float]:
    """MRR@10 of each split and method, with names visible."""
    return {
        f"{split} {method}": figures["mrr@10"]["mean"]
        for split, variants in results["metrics"].items()
        for method, figures in variants["plain"].items()
        if " - " not in method  # a difference of two methods
    }
