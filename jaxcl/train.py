"""Trains an embedder.

    python -m jaxcl.train --config configs/code_search.py [--workdir DIR] [--config.steps=500 …]

The same command goes on where it was stopped. A run starts in one of three ways: from nothing;
from the newest checkpoint of its workdir; or, where that one is damaged, from the one before.
"""

import contextlib
import functools
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from jaxcl.data.loader import training_batches
from jaxcl.data.prepare import RunData, prepare_data
from jaxcl.data.row_negatives import RowNegatives
from jaxcl.evaluation.held_out import evaluate_run, quick_metrics
from jaxcl.host.huge_pages import start_with_huge_pages
from jaxcl.host.processes import (
    first_then_others,
    leave,
    leave_for,
    start_processes,
    stop_requests,
)
from jaxcl.host.progress import progress_bar, say
from jaxcl.ops.mesh import fetch
from jaxcl.run.batches import RunBatches
from jaxcl.run.checkpoint import CheckpointError, Checkpoints
from jaxcl.run.metric_writer import MetricWriter
from jaxcl.run.reports import DivergenceError, Reports
from jaxcl.run.watch import Watch, keep_compiled
from jaxcl.run.workdir import claim_workdir, lock_workdir
from jaxcl.settings.build import Program, build_program
from jaxcl.settings.build_assignment import unused_settings
from jaxcl.settings.build_loss import batch_needs
from jaxcl.settings.build_negatives import check_bank_divides, tiers_left_empty
from jaxcl.step.train_state import TrainState
from jaxcl.typing import Batch

__all__ = ["Stopped", "parse_flags", "train"]

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of configs/, such as configs/code_search.py or …py:smoke."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run keeps all it writes; runs/NAME-OF-THE-CONFIG by default."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of the first of several processes."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes the run has.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.")
_DISTRIBUTED = flags.DEFINE_boolean(
    "distributed", False, "Several processes, which JAX finds out about, as on a pod of TPU hosts."
)
_PROFILE = flags.DEFINE_string(
    "profile", None, "START:STOP, the steps of which a trace goes to WORKDIR/profile."
)
flags.mark_flag_as_required("config")


class Stopped(Exception):
    """A signal asked the run to stop, and its state is saved."""

    def __init__(self, signal_number: int, step: int):
        super().__init__(f"stopped at step {step}; the same command goes on from there")
        self.exit_code = 128 + signal_number


def main(argv: list[str]) -> None:
    """Runs `train` for a person: an error that is theirs comes as one line."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)  # libraries say much that helps nobody
    try:
        start_processes(
            coordinator=_COORDINATOR.value,
            num_processes=_NUM_PROCESSES.value,
            process_id=_PROCESS_ID.value,
            asked=_DISTRIBUTED.value,
        )
        workdir = _workdir()
        given = config_flags.get_override_values(flags.FLAGS["config"])
        for setting in unused_settings(_CONFIG.value, given):
            say(f"warning: {setting} has no effect; assignment.name is another")
        keep_compiled(workdir.parent / ".compiled")
        train(_CONFIG.value, workdir, profile=_profiled(_PROFILE.value))
    except Stopped as stopped:
        say(str(stopped))
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt:
        say("interrupted a second time; the same command goes on from the last whole checkpoint")
        leave(128 + signal.SIGINT)
    except (ValueError, OSError, CheckpointError, DivergenceError) as error:
        logging.vlog(1, "the error in full", exc_info=True)
        say(f"error: {error}")
        leave(1)
    except Exception as error:  # whatever it is, the others must not wait for this process
        logging.vlog(1, "the error in full", exc_info=True)
        leave_for(error)


def train(
    config: ConfigDict, workdir: Path, *, profile: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Trains to the last step, evaluates, and returns what `results.json` then holds.

    Args:
      config: the run's, as the files of `configs/` return it.
      workdir: where it keeps all it writes.
      profile: the first step of a trace, and the first behind it.

    Raises:
      ValueError: for a config that cannot run here, or a workdir of another config or run.
      CheckpointError: if checkpoints cannot be read or written.
      DivergenceError: if the loss is not finite.
      Stopped: after SIGTERM or SIGINT, with everything saved.
    """
    program = build_program(config)
    check_bank_divides(config, program.mesh)
    with lock_workdir(workdir):
        first_then_others(functools.partial(claim_workdir, workdir, config))
        data_dir = Path(config.run.data_dir).expanduser()
        scored = "teacher_scores" in batch_needs(config)
        data = first_then_others(
            functools.partial(
                prepare_data, config.data, data_dir=data_dir, workdir=workdir, scored=scored
            )
        )
        _check_enough_rows(config, data)
        with Checkpoints(workdir / "checkpoints", keep=config.run.keep_checkpoints) as checkpoints:
            rows = data.tables["train"].num_rows, data.tables["train"].group
            restored = checkpoints.restore_latest(program.abstract_state(*rows))
            state = program.init(*rows) if restored is None else restored.state
            if jax.process_index() == 0:
                for tier in tiers_left_empty(config, rows[0]):
                    say(f"warning: negatives.tiers.uniform draws all of the bank, none for {tier}")
                say(_opening(config, program, data, workdir, first_step=int(state.step)))
            with contextlib.closing(MetricWriter(workdir, step=int(state.step))) as writer:
                batches = RunBatches(config, program, data, workdir)
                with Watch(workdir / "profile", profile) as watch:
                    state = _run_steps(
                        config, program, data, batches, state, checkpoints, writer, watch
                    )
        return evaluate_run(config, program, data, state.params["towers"], workdir)


def _run_steps(
    config: ConfigDict,
    program: Program,
    data: RunData,
    run_batches: RunBatches,
    state: TrainState,
    checkpoints: Checkpoints,
    writer: MetricWriter,
    watch: Watch,
) -> TrainState:
    step = int(state.step)
    batches = _batches(config, program, data, run_batches, state)
    with stop_requests() as asked_to_stop, progress_bar("training", config.steps) as advance:
        advance(step)
        reports = Reports(config, program, writer, advance)
        while step < config.steps:
            begun = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - begun
            step += 1
            at_end = step == config.steps
            evaluating = at_end or step % config.run.evaluate_every == 0
            measured: dict[str, float] = {}
            if evaluating:
                with reports.paused():
                    measured = _floats(program.measure(state, batch))
            watch.before(step)
            state, metrics = program.train_step(state, batch)
            watch.dispatched(step)
            reports.add(step, metrics, input_seconds=waited)
            watch.after(step)
            stopping = asked_to_stop(step)
            if evaluating:
                with reports.paused():
                    found = quick_metrics(program, data, state.params["towers"])
                writer.write(step, found | measured)
            if not at_end and (refreshes := _refreshes(config, program, run_batches, step)):
                with reports.paused():
                    for refresh in refreshes:
                        state, made = refresh(state)
                        writer.write(step, _floats(made))
                    batches = _batches(config, program, data, run_batches, state)
            if at_end or stopping or step % config.run.checkpoint_every == 0:
                reports.flush()
                reports.check(step, state)  # nothing but a good state is ever saved
                checkpoints.save(step, state)
            if stopping and not at_end:
                checkpoints.wait()
                raise Stopped(stopping, step)
    return state


def _refreshes(
    config: ConfigDict, program: Program, run_batches: RunBatches, step: int
) -> list[Callable[[TrainState], tuple[TrainState, Mapping[str, Any]]]]:
    """What is made anew after a step, in this order."""
    refreshes: list[Callable] = []
    if program.mine and step % config.negatives.mined.refresh_every == 0:
        refreshes.append(program.mine)
    if run_batches.due(step):
        refreshes.append(run_batches.refresh)
    return refreshes


def _batches(
    config: ConfigDict,
    program: Program,
    data: RunData,
    run_batches: RunBatches,
    state: TrainState,
) -> Iterator[Batch]:
    """The batches to come, a function of the state alone."""
    negatives = _mined_negatives(state, data) if program.mine else data.negatives
    return training_batches(
        data.tables["train"],
        run_batches.rows_of(state),
        program.mesh,
        first_step=int(state.step),
        last_step=config.steps,
        negatives=negatives,
        guides=data.guides,
    )


def _mined_negatives(state: TrainState, data: RunData) -> RowNegatives:
    rows = fetch(state.memory["mined"])[: data.tables["train"].num_rows]
    return RowNegatives(rows, teacher_scores=None, fingerprint="")


def _floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def _profiled(given: str | None) -> tuple[int, int] | None:
    """The steps of `--profile`."""
    if given is None:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", given)
    if not found or not 0 < int(found[1]) < int(found[2]):
        raise ValueError(f"--profile={given}; give the first step and the one behind the last")
    return int(found[1]), int(found[2])


def _check_enough_rows(config: ConfigDict, data: RunData) -> None:
    num_rows = data.tables["train"].num_rows
    if num_rows < config.global_batch_size:
        raise ValueError(
            f"the training split has {num_rows} rows, fewer than one batch of "
            f"{config.global_batch_size}; set global_batch_size to at most {num_rows}"
        )


def _opening(
    config: ConfigDict, program: Program, data: RunData, workdir: Path, *, first_step: int
) -> str:
    rows = {role: table.num_rows for role, table in data.tables.items()}
    table = data.tables["train"]
    abstract_params = jax.tree.leaves(program.abstract_state(table.num_rows, table.group).params)
    parameters = sum(leaf.size for leaf in abstract_params)
    begins = f"goes on from step {first_step}" if first_step else "begins"
    if first_step >= config.steps:
        begins = f"has made its {first_step} steps, and is evaluated"
    return (
        f"{workdir}: {begins}. {config.model.name}, {parameters:,} parameters, "
        f"{program.mesh.size} × {jax.devices()[0].device_kind} as "
        f"{dict(program.mesh.shape)}; pairs: "
        + ", ".join(f"{count:,} {role}" for role, count in rows.items())
    )


def _workdir() -> Path:
    if _WORKDIR.value:
        return Path(_WORKDIR.value)
    file, _, variant = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    return Path("runs") / "-".join(filter(None, (Path(file).stem, variant)))


def parse_flags(argv: list[str]) -> list[str]:
    """Absl's parser, but a config or override that is wrong comes as one line."""
    for argument, value in zip(argv, [*argv[1:], ""], strict=True):
        named = value if argument == "--config" else argument.removeprefix("--config=")
        file = Path(named.partition(":")[0])
        if named != argument and not file.exists():
            say(f"error: --config={named}: there is no such file as {file.absolute()}")
            sys.exit(1)
    try:
        return flags.FLAGS(argv)
    except Exception as error:  # a config is a program: it may raise whatever there is
        unknown_field = isinstance(error, (AttributeError, KeyError))
        reason = f"no such field: {error}" if unknown_field else str(error)
        if "Traceback" in reason:
            reason = reason.strip().splitlines()[-1]
        # The libraries quote a message within a message.
        readable = " ".join(re.sub(r"[\\'\"]", "", reason.replace("\\n", " ")).split())
        readable = readable.replace(" Did you mean", ". Did you mean")
        overrides = [argument for argument in argv if argument.startswith("--config.")]
        given = f" (given: {' '.join(overrides)})" if overrides else ""
        say(f"error: the config cannot be used: {readable}{given}")
        sys.exit(1)


if __name__ == "__main__":
    start_with_huge_pages()
    app.run(main, flags_parser=parse_flags)
