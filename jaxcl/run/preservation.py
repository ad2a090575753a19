"""The policy by which Orbax keeps or deletes the checkpoints of a run."""

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
    """Apply `kept_steps` as a policy of Orbax.

    Attributes:
      best_of: maps the step of a checkpoint to the best step up to it, from its record.
    """

    def __init__(self, newest: int):
        self._newest = newest
        self.best_of: dict[int, int | None] = {}

    def read(self, directory: AnyPath) -> None:
        """Read `best_of` from the checkpoints in a folder; all processes use process 0's."""
        pairs: list[int] = []
        for step in steps_in(directory):
            with contextlib.suppress(CheckpointError):
                if (best := best_step(saved_record(directory / str(step)))) is not None:
                    pairs += [step, best]
        pairs = first_of_all(pairs)
        self.best_of = dict(zip(pairs[::2], pairs[1::2], strict=True))

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Decide for each checkpoint whether to keep it; Orbax calls this after each save."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = kept_steps(steps, newest=self._newest, best_of=self.best_of)
        return [step in kept for step in steps]
