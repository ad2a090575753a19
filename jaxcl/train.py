"""Trains or fine-tunes an embedding model.

    python -m jaxcl.train --config configs/code_search.py --config.steps=500

If a run was stopped, the same command resumes it from the newest checkpoint in its workdir. If that
checkpoint is damaged, it resumes from the previous one.

In a program or a notebook, call `train`:

    train(load_config("code_search:smoke"), Path("runs/smoke"))
    train(load_config("pairs"), Path("runs/pairs"), rows=[{"query": …, "key": …}, …])
"""

import contextlib
import functools
import time
from argparse import Namespace
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxcl.data.loader import training_batches
from jaxcl.data.prepare import RunData, prepare_data, remembered_from
from jaxcl.data.row_negatives import RowNegatives
from jaxcl.data.saved_rows import save_rows
from jaxcl.data.table import label_column
from jaxcl.evaluation.check_held_out import check_evaluation
from jaxcl.evaluation.held_out import evaluate_run, quick_metrics, quick_positives
from jaxcl.evaluation.in_training import TrainingSets, check_best_metric, open_sets, sets_table
from jaxcl.evaluation.known_positives import KnownPositives
from jaxcl.evaluation.sheets import Sheets
from jaxcl.host.agreement import check_processes_agree
from jaxcl.host.command import join_processes, run_command
from jaxcl.host.command_flags import CommandParser, add_process_flags, user_path
from jaxcl.host.paths import AnyPath, as_path
from jaxcl.host.processes import (
    Stopped,
    first_of_all,
    first_then_others,
    stop_requests,
    together,
)
from jaxcl.host.progress import progress_bar, say, show
from jaxcl.host.remote import local_folder
from jaxcl.host.user_folders import shared_folder
from jaxcl.ops.mesh import current_mesh, fetch
from jaxcl.run.batches import RunBatches
from jaxcl.run.best import Best, selection_of
from jaxcl.run.build_loss import batch_needs, check_teacher_dim
from jaxcl.run.checkpoint import Checkpoints
from jaxcl.run.checkpoint_record import newest_record
from jaxcl.run.epochs import with_epochs
from jaxcl.run.explicit_negatives import check_explicit_negatives
from jaxcl.run.identity import process_report, run_record
from jaxcl.run.initial import copy_prepared_files, keep_pretrained_files, with_initial_towers
from jaxcl.run.metric_writer import MetricWriter
from jaxcl.run.opening import closing, opening, run_warnings
from jaxcl.run.reports import Reports
from jaxcl.run.training import Training, build_training, with_text_widths
from jaxcl.run.watch import Watch, keep_compiled, profiled_steps
from jaxcl.run.workdir import (
    CHECKPOINTS,
    check_saved_settings,
    claim_workdir,
    emptied_unless_begun,
    lock_workdir,
    workdir_id,
)
from jaxcl.settings.command_line import add_config_flags, changed_fields, config_of
from jaxcl.settings.read import read_settings
from jaxcl.settings.sections import Settings
from jaxcl.step.train_state import TrainState
from jaxcl.typing import Batch, Int

__all__ = ["Rows", "Stopped", "main", "train"]

Rows: TypeAlias = Iterable[Mapping[str, Any]]
"""Rows with the fields of a file of pairs."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = CommandParser("jaxcl.train", __doc__)
    add_config_flags(parser)
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        type=user_path,
        help="the folder of the run (default: runs/NAME-OF-THE-CONFIG)",
    )
    profile_help = "steps to trace into WORKDIR/profile; STOP is excluded"
    parser.add_argument("--profile", metavar="START:STOP", help=profile_help)
    add_process_flags(parser)
    interrupted = "interrupted; the same command resumes from the last checkpoint"
    run_command(parser, _run, argv, interrupted=interrupted, trains=True)


def _run(arguments: Namespace) -> None:
    config = config_of(arguments)
    profile = profiled_steps(arguments.profile)
    workdir = arguments.workdir or _default_workdir(arguments.config)
    join_processes(arguments, workdir)
    keep_compiled()
    train(config, workdir, changed=changed_fields(arguments), profile=profile)


def train(
    config: ConfigDict,
    workdir: AnyPath,
    *,
    rows: Rows | Mapping[str, Rows] | None = None,
    changed: Collection[str] = (),
    profile: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Train a model to the last step or resume its training, evaluate it, and return the results.

    Args:
      config: the config of the run, as returned by the files in `configs/`.
      workdir: folder for everything that the run writes.
      rows: the pairs, instead of `data.name`, as dicts with the fields of a file of pairs. They are
        written to a file in the folder that runs share. `data.splits` selects the held-out rows; or
        give the rows of each role, such as `{"train": …, "validation": …}`.
      changed: dotted names of the fields that the user changed; one without effect is an error.
      profile: first step to trace, and first step after the trace.

    Raises:
      ValueError: for a config that cannot run here, or a workdir of another config or run.
      CheckpointError: if checkpoints cannot be read or written.
      DivergenceError: if the loss is not finite.
      Stopped: after SIGTERM, SIGINT or SIGHUP, when the state has been saved.
    """
    workdir = as_path(workdir)
    if rows is not None:
        config = _with_rows(config, rows)
    begun = newest_record(workdir / CHECKPOINTS) is not None
    settings = read_settings(config, changed=changed, workdir=workdir if begun else None)
    check_processes_agree(process_report(settings))
    check_teacher_dim(settings)
    sets = open_sets(settings)
    training = build_training(settings)
    with lock_workdir(workdir), emptied_unless_begun(workdir), current_mesh(training.mesh):
        saved = first_then_others(functools.partial(claim_workdir, workdir, settings))
        data = first_then_others(functools.partial(_prepare, settings, workdir, saved))
        sets = sets.with_rows(settings, data.sources)
        training = with_epochs(training, workdir, data.tables["train"])
        settings = training.settings
        shared = {"the id of the workdir": together(functools.partial(workdir_id, workdir))}
        shared |= {f"the evaluation set {name}": one for name, one in sets.fingerprints.items()}
        check_processes_agree(shared | data.remembered.fingerprints)
        training = with_text_widths(training, data.tables["train"])
        check_explicit_negatives(settings, data.negatives)
        check_evaluation(settings, data)
        check_best_metric(settings, sets, data)
        sets.check_unchanged(saved or {})
        with Checkpoints(workdir / CHECKPOINTS, keep=settings.run.keep_checkpoints) as checkpoints:
            row_facts = _training_rows(data)
            restored = checkpoints.restore_latest(
                training.abstract_state(*row_facts),
                check=functools.partial(check_saved_settings, workdir, settings),
            )
            state = restored.state if restored else training.init(*row_facts)
            if restored is None:
                state = with_initial_towers(settings, state, frozen=training.frozen)
            record = restored.record if restored else {}
            present = first_of_all(checkpoints.steps)
            progress = _Progress(state, selection_of(settings).resumed(record, present=present))
            if jax.process_index() == 0:
                for warning in run_warnings(settings, data, record, progress.best):
                    say(f"warning: {warning}")
                say(opening(training, data, workdir, state, progress.best))
                for description in sets.descriptions:
                    say(f"evaluation set {description}")
            with contextlib.closing(MetricWriter(workdir, step=int(state.step))) as writer:
                batches = RunBatches(training, data, workdir)
                sheets = Sheets(settings, data, workdir)
                sheets.views(training, state)
                positives = functools.cache(functools.partial(quick_positives, settings, data))
                run = _Run(training, data, sets, positives, batches, sheets, checkpoints, writer)
                if record.get("finished") and not run.ends(progress):
                    # A run skips the refreshes after its last step, but now more steps follow.
                    progress = progress._replace(state=run.refreshed(state))
                with Watch(local_folder(workdir) / "profile", profile) as watch:
                    progress = _run_steps(run, progress, watch)
        return _evaluate(run, progress, workdir)


def _with_rows(config: ConfigDict, rows: Rows | Mapping[str, Rows]) -> ConfigDict:
    """Write the rows to files, and return the config with these files as its data."""
    if config.data.name is not None:
        raise ValueError(f"data.name={config.data.name!r} and rows are both given; leave one out")
    roles: Mapping[str, Rows] = rows if isinstance(rows, Mapping) else {"train": rows}
    if "train" not in roles:
        raise ValueError(f"rows has the roles {list(roles)}; add 'train'")
    folder = shared_folder(config.run.data_dir) / "rows"
    paths = first_then_others(lambda: {role: str(save_rows(roles[role], folder)) for role in roles})
    config = config.copy_and_resolve_references()
    config.data.name = paths["train"]
    if isinstance(rows, Mapping):
        config.data.splits = ConfigDict(paths | {"train": "train"})
    return config


def _prepare(settings: Settings, workdir: AnyPath, saved: Mapping[str, Any] | None) -> RunData:
    """Prepare the data of a run, as recorded in its newest checkpoint if there is one."""
    copy_prepared_files(settings, workdir)
    keep_pretrained_files(settings, workdir)
    return prepare_data(
        settings.data,
        data_dir=shared_folder(settings.run.data_dir),
        workdir=workdir,
        batch_size=settings.global_batch_size,
        scored="teacher_scores" in batch_needs(settings),
        open_source=settings.parts.source,
        saved=None if saved is None else remembered_from(workdir / CHECKPOINTS, saved.get("data")),
    )


class _Progress(NamedTuple):
    """The progress of a run: its state, and its best evaluation if the run selects one."""

    state: TrainState
    best: Best | None

    @property
    def step(self) -> int:
        """The number of completed steps."""
        return int(self.state.step)


class _Run(NamedTuple):
    """The parts of a run that its training steps read and write."""

    training: Training
    data: RunData
    sets: TrainingSets
    positives: Callable[[], KnownPositives]
    batches: RunBatches
    sheets: Sheets
    checkpoints: Checkpoints
    writer: MetricWriter

    def refreshed(self, state: TrainState) -> TrainState:
        """The state after the refreshes that are due at its step."""
        for refresh in _refreshes(self.training, self.batches, int(state.step)):
            state, metrics = refresh(state)
            self.writer.write(int(state.step), _floats(metrics))
        return state

    def ends(self, progress: _Progress) -> bool:
        """Whether the run is at its end, after its last step or by early stopping."""
        settings = self.training.settings
        return progress.step >= settings.steps or selection_of(settings).stops(progress.best)

    def scores(self, step: int, state: TrainState) -> dict[str, float]:
        """The metrics of the validation split and of the evaluation sets."""
        encoder, settings = self.training.encoder(state, self.data.readers), self.training.settings
        quick = quick_metrics(
            settings,
            encoder,
            self.data,
            positives=self.positives,
            look=functools.partial(self.sheets.evaluated, step),
        )
        return quick | self.sets.scores(step, encoder)

    def save(self, step: int, state: TrainState, best: Best | None, *, finished: bool) -> None:
        """Save the state, with a record of the run."""
        record = run_record(self.training.settings, self.data.remembered)
        record |= {"sets": self.sets.fingerprints, "finished": finished}
        if best is not None:
            record["best"] = best._asdict()
        self.writer.upload()
        self.checkpoints.save(step, state, record)


def _run_steps(run: _Run, progress: _Progress, watch: Watch) -> _Progress:
    training = run.training
    (state, best), step, settings = progress, progress.step, training.settings
    selection = selection_of(settings)
    batches = _batches(run, state)
    with stop_requests() as asked_to_stop, progress_bar("training", settings.steps) as advance:
        advance(step)
        reports = Reports(training, run.writer, watch.ending_first(advance))
        while step < settings.steps and not selection.stops(best):
            begun = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - begun
            step += 1
            at_end = step == settings.steps
            evaluating = at_end or step % settings.run.evaluate_every == 0
            measured: dict[str, float] = {}
            if evaluating:
                with reports.paused():
                    measured = _floats(training.measure(state, batch))
                    reports.check_negatives(step, measured)
            watch.before(step)
            state, metrics = training.train_step(state, batch)
            watch.dispatched(step)
            reports.add(step, metrics, input_seconds=waited)
            watch.after(step)
            stopping = asked_to_stop(step)
            if evaluating:
                with reports.paused():
                    scores = run.scores(step, state)
                run.writer.write(step, scores | measured)
                best = selection.after(best, step, scores)
                at_end = at_end or selection.stops(best)
            if not at_end and _refreshes(training, run.batches, step):
                with reports.paused():
                    state = run.refreshed(state)
                    batches = _batches(run, state)
            is_best = best is not None and best.step == step
            if at_end or stopping or is_best or step % settings.run.checkpoint_every == 0:
                reports.flush()
                reports.check(step, state)  # so that only a finite state is saved
                run.save(step, state, best, finished=at_end)
            if stopping and not at_end:
                run.checkpoints.wait()
                raise Stopped(stopping, step)
    return _Progress(state, best)


def _evaluate(run: _Run, progress: _Progress, workdir: AnyPath) -> dict[str, Any]:
    """Evaluate the final state of a run, and report its best step and why it ended."""
    settings, best, step = run.training.settings, progress.best, progress.step
    encoder = run.training.encoder(progress.state, run.data.readers)
    described: dict[str, Any] = {"steps": step}
    if best is not None:
        described["best"] = {"metric": best.metric, "step": best.step, "value": best.value}
        if step < settings.steps:
            described["stopped_early"] = {"step": step, "evaluations": best.waited}
    if sets := run.sets.summary(step, encoder):
        described["sets"] = sets
    results = evaluate_run(settings, encoder, run.data, workdir, described=described)
    if jax.process_index() == 0:
        if sets:
            show(sets_table(sets))
        for line in closing(settings, workdir, step, best):
            say(line)
    return results


def _refreshes(
    training: Training, run_batches: RunBatches, step: int
) -> list[Callable[[TrainState], tuple[TrainState, Mapping[str, Any]]]]:
    """The refreshes that are due after a step, in order."""
    refreshes: list[Callable] = []
    every = training.settings.negatives.mined.refresh_every
    if training.mine is not None and every is not None and step % every == 0:
        refreshes.append(training.mine)
    if run_batches.due(step):
        refreshes.append(run_batches.refresh)
    return refreshes


def _batches(run: _Run, state: TrainState) -> Iterator[Batch]:
    """The remaining batches, which depend only on the state."""
    training, data = run.training, run.data
    negatives = _mined_negatives(state, data) if training.mine else data.negatives
    return training_batches(
        data.tables["train"],
        run.batches.rows_of(state),
        training.mesh,
        first_step=int(state.step),
        last_step=training.settings.steps,
        negatives=negatives,
        guides=data.guides,
        scores=data.scores,
    )


def _mined_negatives(state: TrainState, data: RunData) -> RowNegatives:
    rows = fetch(state.memory["mined"])[: data.tables["train"].num_rows]
    return RowNegatives(rows, teacher_scores=None, fingerprint="")


def _training_rows(data: RunData) -> tuple[int, Int[np.ndarray, " n"]]:
    """The number of training rows, and the group of each row."""
    table = data.tables["train"]
    return table.num_rows, label_column(table, "group")


def _floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def _default_workdir(config: str) -> AnyPath:
    file, _, variant = config.partition(":")
    return Path("runs") / "-".join(filter(None, (Path(file).stem, variant)))


if __name__ == "__main__":
    main()
