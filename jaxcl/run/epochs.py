"""The number of steps of a run whose config gives epochs."""

import functools

import jax

from jaxcl.host.paths import AnyPath
from jaxcl.host.processes import first_then_others
from jaxcl.host.progress import say
from jaxcl.run.training import Training, build_training
from jaxcl.run.workdir import claim_workdir
from jaxcl.settings.read import with_steps

__all__ = ["with_epochs"]


def with_epochs(training: Training, workdir: AnyPath, *, num_rows: int) -> Training:
    """The functions of a run, rebuilt for the number of steps of its epochs.

    Args:
      training: the functions of the run; without `epochs` in its settings, they are returned.
      workdir: the folder of the run, which is claimed again for these steps.
      num_rows: the number of training rows.

    Raises:
      ValueError: for settings that do not go together with the number of steps, or if a run of
        another number of steps has saved a checkpoint in the folder.
    """
    epochs = training.settings.epochs
    if epochs is None:
        return training
    settings = with_steps(training.settings, num_rows=num_rows)
    if jax.process_index() == 0:
        say(f"{epochs:g} epochs of {num_rows:,} rows are {settings.steps:,} steps")
    first_then_others(functools.partial(claim_workdir, workdir, settings))
    return build_training(settings)
