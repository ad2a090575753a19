"""The batches of a run as device arrays, from any step, on any number of hosts."""

from collections.abc import Callable, Iterator

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from jaxcl.data.row_guides import RowGuides
from jaxcl.data.row_negatives import RowNegatives
from jaxcl.data.row_scores import RowScores
from jaxcl.data.table import Table, table_batch
from jaxcl.data.text_negatives import TextNegatives
from jaxcl.ops.mesh import put_batch
from jaxcl.typing import Batch, Int

__all__ = ["training_batches"]

_PREFETCHED_BATCHES = 4


def training_batches(
    table: Table,
    rows_fn: Callable[[int], Int[np.ndarray, " b"]],
    mesh: Mesh,
    *,
    first_step: int,
    last_step: int,
    negatives: RowNegatives | TextNegatives | None = None,
    guides: RowGuides | None = None,
    scores: RowScores | None = None,
) -> Iterator[Batch]:
    """The global batches of steps `first_step` to `last_step - 1`.

    The step alone determines the rows of a batch. They depend neither on the step at which the run
    was resumed nor on the number of hosts: each host reads its own part of the same rows.

    Args:
      table: the table of the training rows.
      rows_fn: step -> the rows of its global batch, the same on every host.
      mesh: the devices; the rows of a batch are sharded over all of its axes.
      first_step: the step of the first batch.
      last_step: one more than the step of the last batch.
      negatives: the explicit negatives of each row, which are added to its batch.
      guides: a guide model's embeddings of each row, which are added to its batch.
      scores: the score of each row, which is added to its batch.

    Yields:
      Batches on the devices.
    """
    batches = grain.MapDataset.source(
        _LocalBatches(table, rows_fn, last_step, negatives, guides, scores)
    ).to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCHED_BATCHES))
    iterator = iter(batches)
    iterator.set_state({"next_index": first_step})
    for batch in iterator:
        yield put_batch(batch, mesh)


class _LocalBatches:
    """A grain source whose entry for a step is this process's part of the batch."""

    def __init__(
        self,
        table: Table,
        rows_fn: Callable[[int], Int[np.ndarray, " b"]],
        num_steps: int,
        negatives: RowNegatives | TextNegatives | None = None,
        guides: RowGuides | None = None,
        scores: RowScores | None = None,
    ):
        self.table, self.rows_fn, self.num_steps = table, rows_fn, num_steps
        self.negatives, self.guides, self.scores = negatives, guides, scores

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> Batch:
        rows = np.split(np.asarray(self.rows_fn(step)), jax.process_count())[jax.process_index()]
        batch = table_batch(self.table, rows)
        if self.negatives is not None:
            batch |= self.negatives.columns(self.table, rows)
        if self.scores is not None:
            batch |= self.scores.columns(rows)
        if self.guides is not None:
            batch["guides"] = self.guides.columns(rows)
            if self.negatives is not None:
                negative_rows = batch["negatives"]["row"]
                guides = self.guides.columns(negative_rows.ravel())["key"]
                batch["negatives"]["guides"] = guides.reshape(*negative_rows.shape, -1)
        return batch
