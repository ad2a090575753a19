"""The number of steps of a run whose config gives epochs."""

import functools
import math
from collections.abc import Iterator

import jax
import numpy as np

from jaxcl.data.table import Table, query_numbers
from jaxcl.host.paths import AnyPath
from jaxcl.host.printable import counted
from jaxcl.host.processes import first_then_others
from jaxcl.host.progress import say
from jaxcl.run.training import Training, build_training
from jaxcl.run.workdir import claim_workdir
from jaxcl.settings.read import with_steps
from jaxcl.settings.sections import Settings

__all__ = ["epoch_summary", "with_epochs"]


def with_epochs(training: Training, workdir: AnyPath, table: Table) -> Training:
    """The functions of a run, rebuilt for the number of steps of its epochs.

    Args:
      training: the functions of the run; without `epochs` in the settings, they are returned as is.
      workdir: the folder of the run, which is claimed again for these steps.
      table: the training rows.

    Raises:
      ValueError: for settings that do not fit the number of steps, or if a run with another number
        of steps has saved a checkpoint in the folder.
    """
    epochs = training.settings.epochs
    if epochs is None:
        return training
    num_rows = table.num_rows
    if training.settings.assignment.name == "one_per_query":
        num_rows = len(np.unique(query_numbers(table)))
    settings = with_steps(training.settings, num_rows=num_rows)
    if jax.process_index() == 0:
        for line in epoch_summary(settings, epochs=epochs, num_rows=num_rows):
            say(line)
    first_then_others(functools.partial(claim_workdir, workdir, settings))
    return build_training(settings)


def epoch_summary(settings: Settings, *, epochs: float, num_rows: int) -> Iterator[str]:
    """Yield the number of steps of the epochs, and a warning if they are less than one batch.

    Args:
      settings: the settings with the number of steps.
      epochs: the epochs that the config gives.
      num_rows: the number of training rows.

    Example:
      >>> settings = Settings(steps=3, global_batch_size=8)
      >>> list(epoch_summary(settings, epochs=1.0, num_rows=20))
      ['1 epoch of 20 rows is 3 steps']
    """
    steps, size = settings.steps, settings.global_batch_size
    every = settings.optimizer.accumulate_steps
    plural, are = ("", "is") if epochs == 1 else ("s", "are")
    summary = f"{epochs:g} epoch{plural} of {num_rows:,} rows {are} "
    batches = math.ceil(epochs * num_rows / size)
    if batches == steps:
        yield summary + counted(steps, "step")
    else:
        yield (
            f"{summary}{counted(batches, 'batch', 'batches')}, rounded up to "
            f"{counted(steps, 'step')}, which are {steps * size / num_rows:.3g} epochs: the last "
            f"update also averages optimizer.accumulate_steps={every} batches"
        )
    if epochs * num_rows < size:
        yield (
            f"warning: epochs={epochs:g} of {num_rows:,} rows is less than one batch of {size:,} "
            f"rows; the run trains {counted(steps, 'step')}"
        )
