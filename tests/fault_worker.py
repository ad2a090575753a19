"""`jaxcl.train`, which also logs the rows of each step and digests of its states.

Lines of LOG are JSON: `{"rows": […], "step": N}` when rows of a batch are requested,
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
    """Run the trainer in this process, which was forked for it, and log its rows and states.

    Args:
      arguments: the arguments of the trainer.
      environment: environment variables to set.
      log: the file to append log lines to.
      output: the file for standard output and standard error.
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
    """The digest of all bits of a state, whatever its sharding."""
    sha256 = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        is_key = jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        sha256.update(bits(fetch(jax.random.key_data(leaf) if is_key else leaf)))
    return sha256.hexdigest()
