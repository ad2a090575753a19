"""`jaxcl.train`, which also writes down each step's rows and a digest of each state it keeps.

Lines of LOG are JSON: `{"rows": […], "step": N}` when rows of a batch are asked for,
`{"saved": DIGEST, "step": N}` before a state is saved, `{"restored": DIGEST, "step": N}` when one
was read back.
"""

import hashlib
import json
import os
from pathlib import Path

import jax

from jaxcl import train as trainer
from jaxcl.ops.mesh import fetch
from jaxcl.run.checkpoint import Checkpoints
from tests.helpers import bits


def run(arguments: list[str], environment: dict[str, str], log: Path, output: Path) -> None:
    """Runs the trainer with its ears open, in a process that was forked for it.

    Args:
      arguments: of the trainer.
      environment: what is added to that of the process.
      log: what it did is appended there.
      output: what it says goes there.
    """
    os.environ.update(environment)
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    restore, save, batches = Checkpoints.restore_latest, Checkpoints.save, trainer.training_batches

    def note(**what) -> None:
        if jax.process_index() == 0:
            with log.open("a") as file:
                file.write(json.dumps(what) + "\n")

    def noted_restore(self, abstract_state, **options):
        restored = restore(self, abstract_state, **options)
        if restored is not None:
            note(step=restored.step, restored=digest(restored.state))
        return restored

    def noted_save(self, step, state, record):
        note(step=step, saved=digest(state))
        save(self, step, state, record)

    def noted_batches(table, rows_of, mesh, **given):
        def noted_rows(step):
            rows = rows_of(step)
            note(step=int(step) + 1, rows=[int(row) for row in rows])
            return rows

        return batches(table, noted_rows, mesh, **given)

    Checkpoints.restore_latest, Checkpoints.save = noted_restore, noted_save
    trainer.training_batches = noted_batches
    trainer.main(arguments)


def digest(state) -> str:
    """Of all bits of a state, wherever its parts are."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        is_key = jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        found.update(bits(fetch(jax.random.key_data(leaf) if is_key else leaf)))
    return found.hexdigest()
