"""Which checkpoints of a run Orbax leaves on the disk."""

import contextlib
from collections.abc import Sequence
from typing import Any

from orbax.checkpoint import v1 as ocp

from jaxcl.host.paths import AnyPath
from jaxcl.host.processes import first_of_all
from jaxcl.run.best import best_step, kept_steps
from jaxcl.run.checkpoint_record import CheckpointError, saved_record, steps_in

__all__ = ["Preservation"]


class Preservation(ocp.training.preservation_policies.PreservationPolicy):
    """`kept_steps` as a policy of Orbax.

    Attributes:
      best_of: step of a checkpoint -> the best step up to it, by its record.
    """

    def __init__(self, newest: int):
        self._newest = newest
        self.best_of: dict[int, int | None] = {}

    def read(self, directory: AnyPath) -> None:
        """Read `best_of` from the checkpoints in a folder; all processes have that of process 0."""
        named: list[int] = []
        for step in steps_in(directory):
            with contextlib.suppress(CheckpointError):
                if (best := best_step(saved_record(directory / str(step)))) is not None:
                    named += [step, best]
        named = first_of_all(named)
        self.best_of = dict(zip(named[::2], named[1::2], strict=True))

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Whether each checkpoint stays, as Orbax asks after each save."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = kept_steps(steps, newest=self._newest, best_of=self.best_of)
        return [step in kept for step in steps]
