"""Choose the rows of each batch of a run, and reassign them while it trains."""

import functools
import importlib.util
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxcl.assignment import (
    Assigned,
    AssignedRows,
    OnePerLabel,
    SourcedRows,
    make_gap_measure,
    make_order,
    uniform_rows,
    visited,
)
from jaxcl.assignment.gap import GapMeasure
from jaxcl.data.prepare import RunData
from jaxcl.data.table import label_column, query_numbers, row_lengths
from jaxcl.host.paths import AnyPath
from jaxcl.host.progress import progress_bar, say
from jaxcl.ops.mesh import fetch, put_rows
from jaxcl.ops.row_tables import padded_entries
from jaxcl.run.picture import similarity_picture
from jaxcl.run.text_widths import RowsOfStep, dealt_rows
from jaxcl.run.training import Training
from jaxcl.settings.derived import GcbsRule, gcbs_rule, sources_by
from jaxcl.settings.sections import Settings
from jaxcl.step.train_state import TrainState
from jaxcl.typing import SIDES, Array, Float, Int

__all__ = ["RunBatches"]

_MEASURED_ROWS = 256  # measuring a row costs six products with all rows
_MEASURED_BATCHES = 16  # batches with the measured rows; fewer if these hold more rows than:
_FETCHED_ROWS = 16_384
_BEFORE = ("train_loss", "gap", "closed")  # also measured for the batches before a refresh
_REASSIGNING = 2**31 + 1  # folded into the run's key; above any step, as in mined_refresh


class RunBatches:
    """The rows of a run's batches: `rows_of(state)(step)` and `refresh(state)`.

    The assignment is part of the state, so that a run can resume on any number of devices.

    Args:
      training: the functions of the run.
      data: the splits of the run.
      workdir: the folder of the run, for pictures of the assignment.

    Raises:
      ValueError: if the settings of the assignment do not fit the data or the number of steps.
    """

    def __init__(self, training: Training, data: RunData, workdir: AnyPath):
        settings = training.settings
        self._settings, self._training, self._workdir = settings, training, workdir
        self._table = data.tables["train"]
        self._num_rows = self._table.num_rows
        self._rule = gcbs_rule(settings)
        sourced = settings.assignment.name == "sourced"
        self._sourced = _sourced_rows(settings, data) if sourced else None
        own = settings.parts.assignment
        self._own: RowsOfStep | None = own and own(
            num_rows=self._num_rows, batch_size=settings.global_batch_size, seed=settings.seed
        )
        if settings.assignment.name == "one_per_query":
            self._own = OnePerLabel(
                query_numbers(self._table),
                batch_size=settings.global_batch_size,
                seed=settings.seed,
            )
        if self._rule is not None:
            self._check_ever_due(self._rule)
            self._order = make_order(
                training.mesh,
                num_rows=self._num_rows,
                block_size=self._rule.block_size,
                batch_size=settings.global_batch_size,
                settings=self._rule.settings,
            )
            self._num_measured = _num_measured(self._num_rows, settings.global_batch_size)
            make_measure = functools.partial(
                make_gap_measure,
                training.mesh,
                num_rows=self._num_rows,
                rows_per_batch=_MEASURED_ROWS // self._num_measured,
            )
            self._measure_chosen = make_measure()
            self._measure_before = make_measure(fields=_BEFORE)
            self._draws = self._rule.picture and _can_draw()
            if self._rule.picture and not self._draws:
                changes = ""
                if settings.data.name == "code_pairs":
                    changes = "; this adds its code to the rows of code_pairs"
                say(f"pictures of the batches need pip install 'jaxcl[pictures]'{changes}")

    def rows_of(self, state: TrainState) -> RowsOfStep:
        """Return a function from a step, at least the state's, to the rows of its global batch."""
        rows_fn = self._rows_of(state)
        if not self._training.buckets:
            return rows_fn
        return dealt_rows(rows_fn, self._table, num_devices=self._training.mesh.size)

    def _rows_of(self, state: TrainState) -> RowsOfStep:
        """The same function, with the rows of a batch in any order."""
        if self._rule is not None:
            assigned = self._assigned(state)
            return self._uniform if assigned is None else self._in_blocks(assigned, self._rule)
        if self._own is not None:
            return self._own
        return self._uniform if self._sourced is None else self._sourced

    def due(self, step: int) -> bool:
        """Whether the batches are reassigned after this number of steps."""
        if self._rule is None or not 0 < step < self._settings.steps:
            return False
        if self._rule.refresh_epochs is None:
            return step % self._rule.refresh_every == 0
        # A refresh follows the step that completes another `refresh_epochs` epochs.
        interval = self._rows_between(self._rule.refresh_epochs)
        num_seen = step * self._settings.global_batch_size
        return num_seen // interval > (num_seen - self._settings.global_batch_size) // interval

    def refresh(self, state: TrainState) -> tuple[TrainState, Mapping[str, float]]:
        """Reassign the batches from the state's step on.

        Returns:
          The state with the new assignment, and metrics: the gap of the loss with the new and with
          the previous batches, and the time and memory of the refresh.
        """
        assert self._rule is not None
        start, step = time.perf_counter(), int(state.step)
        key = jax.random.fold_in(jax.random.fold_in(state.key, _REASSIGNING), step)
        order_key, measure_key = jax.random.split(key)
        temperature = jnp.exp(state.params["log_temperature"])
        queries, keys = (self._embeddings(state, side) for side in SIDES)
        encode_end = time.perf_counter()
        labels = self._labels(self._rule)
        report = say if jax.process_index() == 0 else lambda line: None
        ordered = self._order(queries, keys, temperature, order_key, labels, report=report)
        order_end = time.perf_counter()

        rows_before = self._rows_of(state)
        earlier = self._assigned(state)
        seen = visited(
            rows_before,
            before_step=0 if earlier is None else earlier.step,
            step=step,
            num_rows=self._num_rows,
            batch_size=self._settings.global_batch_size,
            seen=None if earlier is None else earlier.seen,
        )
        state = self._with(state, Assigned(ordered.rows, seen, step))

        # Rows that are kept apart are not negatives of each other, so they do not add to the gap.
        different = tuple(
            put_rows(label, self._training.mesh, num_rows=len(queries)) for label in labels
        )
        measured = functools.partial(
            self._report, queries, keys, different, temperature, measure_key, step
        )
        after = measured(self._measure_chosen, self._rows_of(state))
        before = measured(self._measure_before, rows_before)
        if self._draws:
            self._draw(queries, keys, ordered.rows, self._rule.block_size, step)
        metrics = {
            **{f"assignment/{name}": value for name, value in after.items()},
            **{f"assignment/{name}_before": before[name] for name in _BEFORE if name in before},
            "time/assignment_encode_seconds": encode_end - start,
            "time/assignment_order_seconds": order_end - encode_end,
            "time/assignment_seconds": time.perf_counter() - start,
        }
        if ordered.device_bytes:
            metrics["machine/assignment_mebibytes"] = ordered.device_bytes / 2**20
        if jax.process_index() == 0:
            say(_refresh_line(step, metrics))
        return state, metrics

    def _rows_between(self, epochs: float) -> int:
        return max(round(epochs * self._num_rows), 1)

    def _check_ever_due(self, rule: GcbsRule) -> None:
        if rule.refresh_epochs is None:
            return
        num_seen = (self._settings.steps - 1) * self._settings.global_batch_size
        if self._rows_between(rule.refresh_epochs) > num_seen:
            raise ValueError(
                f"assignment.gcbs.refresh_epochs={rule.refresh_epochs} is never reached: the "
                f"{self._settings.steps} steps, without the last, are "
                f"{num_seen / self._num_rows:.1f} epochs of {self._num_rows:,} rows; set fewer"
            )

    def _uniform(self, step: int) -> Int[np.ndarray, " b"]:
        return uniform_rows(
            step,
            num_rows=self._num_rows,
            batch_size=self._settings.global_batch_size,
            seed=self._settings.seed,
        )

    def _in_blocks(self, assigned: Assigned, rule: GcbsRule) -> AssignedRows:
        return AssignedRows(
            assigned,
            batch_size=self._settings.global_batch_size,
            block_size=rule.block_size,
            seed=self._settings.seed,
            random_fraction=rule.random_fraction,
            keep_apart=self._labels(rule),
        )

    def _labels(self, rule: GcbsRule) -> tuple[Int[np.ndarray, " n"], ...]:
        return tuple(label_column(self._table, name) for name in rule.keep_apart)

    def _assigned(self, state: TrainState) -> Assigned | None:
        """The assignment of the last refresh; `None` before the first one."""
        saved = state.memory["assignment"]
        if int(saved["step"]) < 0:
            return None
        order, seen = (fetch(saved[name])[: self._num_rows] for name in ("order", "seen"))
        return Assigned(order, seen, int(saved["step"]))

    def _with(self, state: TrainState, assigned: Assigned) -> TrainState:
        """The state with another assignment, in the sharding of the previous one."""
        previous = state.memory["assignment"]
        missing = padded_entries(self._num_rows) - self._num_rows
        values: dict[str, np.ndarray] = {
            "order": np.pad(assigned.order, (0, missing), constant_values=-1),
            "seen": np.pad(assigned.seen, (0, missing)),
            "step": np.array(assigned.step, np.int32),
        }
        placed = {
            name: jax.make_array_from_callback(
                previous[name].shape,
                previous[name].sharding,
                functools.partial(np.ndarray.__getitem__, value),
            )
            for name, value in values.items()
        }
        return state._replace(memory=state.memory | {"assignment": placed})

    def _embeddings(self, state: TrainState, side: str) -> Array:
        assert self._rule is not None
        if self._rule.from_bank:
            return put_rows(
                state.memory["bank"][side].vectors, self._training.mesh, num_rows=self._num_rows
            )
        sides = {"query": "queries", "key": "keys"}[side]
        with progress_bar(f"encoding {sides} to assign batches", self._num_rows) as advance:
            vectors: Float[np.ndarray, "n d"] = self._training.embed(
                state.params["towers"],
                side,
                functools.partial(self._table.side, side),
                self._num_rows,
                lengths=row_lengths(self._table, side, np.arange(self._num_rows)),
                advance=advance,
            )
        return put_rows(vectors, self._training.mesh, num_rows=self._num_rows)

    def _report(
        self,
        queries: Array,
        keys: Array,
        different: tuple[Array, ...],
        temperature: Array,
        key: Array,
        step: int,
        measure: GapMeasure,
        rows: RowsOfStep,
    ) -> dict[str, float]:
        """Measure the gap of batches from the next whole epoch."""
        batches = _batches_of_next_epoch(
            rows,
            step,
            num_rows=self._num_rows,
            batch_size=self._settings.global_batch_size,
            most=self._num_measured,
        )
        if len(np.unique(batches)) < batches.size:  # a batch is larger than an epoch
            return {}
        report = measure(queries, keys, jnp.asarray(batches), temperature, key, different)
        return {name: float(value) for name, value in report._asdict().items()}

    def _draw(
        self,
        queries: Array,
        keys: Array,
        order: Int[np.ndarray, " n"],
        block_size: int,
        step: int,
    ) -> None:
        directory = self._workdir / "assignment"
        directory.mkdir(exist_ok=True)
        similarity_picture(
            queries,
            keys,
            np.arange(self._num_rows, dtype=np.int32),
            order,
            batch_size=block_size,
            path=directory / f"step-{step:06d}.png",
        )


def _sourced_rows(settings: Settings, data: RunData) -> SourcedRows:
    options, by = settings.assignment.sourced, sources_by(settings)
    weights: dict[Any, float] = dict(options.weights)
    if len(weights) < len(options.weights):
        raise ValueError(f"assignment.sourced.weights={options.weights} has a source twice")
    names = data.data_sets if by == "data_set" else ()
    if names and weights and set(weights) != set(names):
        raise ValueError(
            f"assignment.sourced.weights has {', '.join(map(str, weights))}, but the data sets are "
            f"{', '.join(names)}; give each a weight, or 0 to leave its rows out"
        )
    if not names and not all(isinstance(source, int) for source in weights):
        raise ValueError(
            f"assignment.sourced.weights={options.weights}: with assignment.sourced.by={by!r}, "
            "sources are numbers; only data sets have names (by='data_set')"
        )
    if names:
        weights = {names.index(name): share for name, share in weights.items()}
    return SourcedRows(
        data.source_of_row(by),
        batch_size=settings.global_batch_size,
        seed=settings.seed,
        mix=options.mix,
        weights=weights or None,
        temperature=options.temperature,
    )


def _refresh_line(step: int, metrics: Mapping[str, float]) -> str:
    """Describe a refresh in one line."""
    seconds = metrics["time/assignment_seconds"]
    line = f"reassigned the batches after step {step:,} in {seconds:.1f} s"
    if "assignment/closed" not in metrics:
        return line
    closed = round(100 * metrics["assignment/closed"])
    line += f": they close {closed}% of the gap to the loss over all rows"
    if "assignment/closed_before" in metrics:
        line += f" (before: {round(100 * metrics['assignment/closed_before'])}%)"
    if {"assignment/train_loss", "assignment/train_loss_before"} <= metrics.keys():
        increase = metrics["assignment/train_loss"] - metrics["assignment/train_loss_before"]
        line += f"; their loss is {abs(increase):.2f} {'higher' if increase >= 0 else 'lower'}"
    return line


def _num_measured(num_rows: int, batch_size: int) -> int:
    """The number of batches from which rows are measured."""
    return max(min(_MEASURED_BATCHES, _FETCHED_ROWS // batch_size, num_rows // batch_size), 1)


def _batches_of_next_epoch(
    rows: RowsOfStep, step: int, *, num_rows: int, batch_size: int, most: int
) -> Int[np.ndarray, "batches b"]:
    """Select batches that are spread evenly over the next epoch.

    The rows of each batch are shuffled, so that its first rows are a random sample.
    """
    begin = (step * batch_size // num_rows + 1) * num_rows
    epoch_steps = range(-(-begin // batch_size), (begin + num_rows) // batch_size)
    count = max(min(len(epoch_steps), most), 1)
    steps = epoch_steps[:: max(1, len(epoch_steps) // count)][:count]
    batches = np.stack([rows(selected) for selected in steps or [step]])
    return np.random.default_rng(step).permuted(batches, axis=1)


def _can_draw() -> bool:
    """Whether process 0, which writes the pictures, has matplotlib."""
    installed = importlib.util.find_spec("matplotlib") is not None
    if jax.process_count() == 1:
        return installed
    return bool(multihost_utils.broadcast_one_to_all(np.array(installed)))
