"""The batches of a run: which rows they hold, and how that is chosen anew while it trains."""

import functools
import importlib.util
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxcl.assignment import (
    Assigned,
    AssignedRows,
    SourcedRows,
    make_gap_measure,
    make_order,
    uniform_rows,
    visited,
)
from jaxcl.assignment.gap import GapMeasure
from jaxcl.data.prepare import RunData
from jaxcl.data.table import label_column
from jaxcl.host.paths import AnyPath
from jaxcl.host.progress import progress_bar, say
from jaxcl.ops.mesh import fetch, put_rows
from jaxcl.ops.row_tables import padded_entries
from jaxcl.run.picture import similarity_picture
from jaxcl.run.training import Training
from jaxcl.settings.derived import GcbsRule, gcbs_rule, sources_by
from jaxcl.settings.sections import Settings
from jaxcl.step.train_state import TrainState
from jaxcl.typing import SIDES, Array, Float, Int

__all__ = ["RunBatches"]

RowsOfStep = Callable[[int], Int[np.ndarray, " b"]]

_MEASURED_ROWS = 256  # each costs six products with every row
_MEASURED_BATCHES = 16  # of which these are, or as many as have so many rows together:
_FETCHED_ROWS = 16_384
_BEFORE = ("train_loss", "gap", "closed")  # what is measured of the batches before a choice as well
_REASSIGNING = 2**31 + 1  # what the run's key is folded with: greater than any step, as in refresh


class RunBatches:
    """Which rows a run's batches hold: `rows_of(state)(step)`, and `refresh(state)`.

    What was chosen is in the state, so that a run goes on with it on any number of devices.

    Args:
      training: the run's functions.
      data: its splits.
      workdir: where pictures go.

    Raises:
      ValueError: for an assignment that cannot be.
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
                of_packages = settings.data.name == "code_pairs"
                other = ", and other rows: those of what is installed" if of_packages else ""
                say(f"pip install 'jaxcl[pictures]' for a picture of each choice of batches{other}")

    def rows_of(self, state: TrainState) -> RowsOfStep:
        """Step -> the rows of its global batch, from the state's step on."""
        if self._rule is not None:
            assigned = self._assigned(state)
            return self._uniform if assigned is None else self._in_blocks(assigned, self._rule)
        if self._own is not None:
            return self._own
        return self._uniform if self._sourced is None else self._sourced

    def due(self, step: int) -> bool:
        """Whether the batches are chosen anew after so many steps."""
        if self._rule is None or not 0 < step < self._settings.steps:
            return False
        if self._rule.refresh_epochs is None:
            return step % self._rule.refresh_every == 0
        # The first step that has seen so many epochs, or a multiple of them.
        apart = self._rows_between(self._rule.refresh_epochs)
        seen = step * self._settings.global_batch_size
        return seen // apart > (seen - self._settings.global_batch_size) // apart

    def refresh(self, state: TrainState) -> tuple[TrainState, Mapping[str, float]]:
        """Chooses the batches from the state's step on.

        Returns:
          The state with them, and metrics: what they leave of the loss's gap, what those before
          left, and what it took.
        """
        assert self._rule is not None
        start, step = time.perf_counter(), int(state.step)
        key = jax.random.fold_in(jax.random.fold_in(state.key, _REASSIGNING), step)
        order_key, measure_key = jax.random.split(key)
        temperature = jnp.exp(state.params["log_temperature"])
        queries, keys = (self._embeddings(state, side) for side in SIDES)
        encoded = time.perf_counter()
        labels = self._labels(self._rule)
        report = say if jax.process_index() == 0 else lambda line: None
        ordered = self._order(queries, keys, temperature, order_key, labels, report=report)
        chosen = time.perf_counter()

        rows_before = self.rows_of(state)
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

        # Rows that keep out of each other's batch are no negatives, so that they leave no gap.
        different = tuple(
            put_rows(label, self._training.mesh, num_rows=len(queries)) for label in labels
        )
        measured = functools.partial(
            self._report, queries, keys, different, temperature, measure_key, step
        )
        after = measured(self._measure_chosen, self.rows_of(state))
        before = measured(self._measure_before, rows_before)
        if self._draws:
            self._draw(queries, keys, ordered.rows, self._rule.block_size, step)
        metrics = {
            **{f"assignment/{name}": value for name, value in after.items()},
            **{f"assignment/{name}_before": before[name] for name in _BEFORE if name in before},
            "time/assignment_encode_seconds": encoded - start,
            "time/assignment_order_seconds": chosen - encoded,
            "time/assignment_seconds": time.perf_counter() - start,
        }
        if ordered.device_bytes:
            metrics["machine/assignment_mebibytes"] = ordered.device_bytes / 2**20
        if jax.process_index() == 0:
            say(_chosen(step, metrics))
        return state, metrics

    def _rows_between(self, epochs: float) -> int:
        return max(round(epochs * self._num_rows), 1)

    def _check_ever_due(self, rule: GcbsRule) -> None:
        if rule.refresh_epochs is None:
            return
        trained_on = (self._settings.steps - 1) * self._settings.global_batch_size
        if self._rows_between(rule.refresh_epochs) > trained_on:
            raise ValueError(
                f"assignment.gcbs.refresh_epochs={rule.refresh_epochs} never comes: "
                f"{self._settings.steps} steps are {trained_on / self._num_rows:.1f} epochs of "
                f"{self._num_rows:,} rows before the last; set less than those"
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
            apart=self._labels(rule),
        )

    def _labels(self, rule: GcbsRule) -> tuple[Int[np.ndarray, " n"], ...]:
        return tuple(label_column(self._table, name) for name in rule.apart)

    def _assigned(self, state: TrainState) -> Assigned | None:
        """What the last refresh chose; `None` before the first."""
        kept = state.memory["assignment"]
        if int(kept["step"]) < 0:
            return None
        order, seen = (fetch(kept[name])[: self._num_rows] for name in ("order", "seen"))
        return Assigned(order, seen, int(kept["step"]))

    def _with(self, state: TrainState, assigned: Assigned) -> TrainState:
        kept = state.memory["assignment"]
        missing = padded_entries(self._num_rows) - self._num_rows
        values: dict[str, np.ndarray] = {
            "order": np.pad(assigned.order, (0, missing), constant_values=-1),
            "seen": np.pad(assigned.seen, (0, missing)),
            "step": np.array(assigned.step, np.int32),
        }
        placed = {
            name: jax.make_array_from_callback(
                kept[name].shape,
                kept[name].sharding,
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
        with progress_bar(f"encoding each {side} to choose batches", self._num_rows) as advance:
            vectors: Float[np.ndarray, "n d"] = self._training.embed(
                state.params["towers"],
                side,
                functools.partial(self._table.side, side),
                self._num_rows,
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
        """What the batches of the next whole epoch leave of the gap."""
        batches = _batches_of_next_epoch(
            rows,
            step,
            num_rows=self._num_rows,
            batch_size=self._settings.global_batch_size,
            most=self._num_measured,
        )
        if len(np.unique(batches)) < batches.size:  # no batch lies within an epoch
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
        raise ValueError(f"assignment.sourced.weights={options.weights} name a source twice")
    names = data.data_sets if by == "data_set" else ()
    if names and weights and set(weights) != set(names):
        raise ValueError(
            f"assignment.sourced.weights name {', '.join(map(str, weights))}; the data sets are "
            f"{', '.join(names)}: give each a weight, 0 to leave its rows out"
        )
    if not names and not all(isinstance(source, int) for source in weights):
        raise ValueError(
            f"assignment.sourced.weights={options.weights}: by {by}, sources have numbers; names "
            "go with assignment.sourced.by='data_set'"
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


def _chosen(step: int, metrics: Mapping[str, float]) -> str:
    """A refresh in a line."""
    seconds = metrics["time/assignment_seconds"]
    line = f"batches chosen anew after step {step:,} in {seconds:.1f} s"
    if "assignment/closed" not in metrics:
        return line
    closed = round(100 * metrics["assignment/closed"])
    line += f": {closed}% of the gap to the loss of all rows is closed"
    if "assignment/closed_before" in metrics:
        line += f", before {round(100 * metrics['assignment/closed_before'])}%"
    if {"assignment/train_loss", "assignment/train_loss_before"} <= metrics.keys():
        harder = metrics["assignment/train_loss"] - metrics["assignment/train_loss_before"]
        line += f"; their loss is {abs(harder):.2f} {'higher' if harder >= 0 else 'lower'}"
    return line


def _num_measured(num_rows: int, batch_size: int) -> int:
    """Of how many batches some rows are measured."""
    return max(min(_MEASURED_BATCHES, _FETCHED_ROWS // batch_size, num_rows // batch_size), 1)


def _batches_of_next_epoch(
    rows: RowsOfStep, step: int, *, num_rows: int, batch_size: int, most: int
) -> Int[np.ndarray, "batches b"]:
    """Batches all over the next epoch, the rows of each shuffled: the first are any of them."""
    begin = (step * batch_size // num_rows + 1) * num_rows
    whole = range(-(-begin // batch_size), (begin + num_rows) // batch_size)
    count = max(min(len(whole), most), 1)
    steps = whole[:: max(1, len(whole) // count)][:count]
    batches = np.stack([rows(one) for one in steps or [step]])
    return np.random.default_rng(step).permuted(batches, axis=1)


def _can_draw() -> bool:
    """Whether the first process can, which writes what all compute."""
    found = importlib.util.find_spec("matplotlib") is not None
    if jax.process_count() == 1:
        return found
    return bool(multihost_utils.broadcast_one_to_all(np.array(found)))
