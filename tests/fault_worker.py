"""`jaxcl.train`, which also writes down each step's rows and a digest of each state it keeps.

python -m tests.fault_worker LOG [arguments of jaxcl.train]

Lines of LOG are JSON: `{"rows": […], "step": N}` when rows of a batch are asked for,
`{"saved": DIGEST, "step": N}` before a state is saved, `{"restored": DIGEST, "step": N}` when one
was read back.
"""

import hashlib
import json
import sys

import jax
from absl import app

from jaxcl import train as trainer
from jaxcl.checkpoint import Checkpoints
from jaxcl.mesh import fetch
from tests.helpers import bits


def main() -> None:
    """Runs the trainer with its ears open."""
    log = sys.argv.pop(1)
    restore, save, batches = Checkpoints.restore_latest, Checkpoints.save, trainer.training_batches

    def note(**what) -> None:
        if jax.process_index() == 0:
            with open(log, "a") as file:
                file.write(json.dumps(what) + "\n")

    def noted_restore(self, abstract_state):
        restored = restore(self, abstract_state)
        if restored is not None:
            note(step=restored.step, restored=digest(restored.state))
        return restored

    def noted_save(self, step, state):
        note(step=step, saved=digest(state))
        save(self, step, state)

    def noted_batches(table, rows_of, mesh, **given):
        def noted_rows(step):
            rows = rows_of(step)
            note(step=int(step) + 1, rows=[int(row) for row in rows])
            return rows

        return batches(table, noted_rows, mesh, **given)

    Checkpoints.restore_latest, Checkpoints.save = noted_restore, noted_save
    trainer.training_batches = noted_batches
    app.run(trainer.main, flags_parser=trainer.parse_flags)


def digest(state) -> str:
    """Of all bits of a state, wherever its parts are."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        is_key = jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        found.update(bits(fetch(jax.random.key_data(leaf) if is_key else leaf)))
    return found.hexdigest()


if __name__ == "__main__":
    main()
