"""Mines the negatives of all training rows again during a run, from the memory banks."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxcl.negatives.memory_bank import MemoryBank, pad_slots
from jaxcl.negatives.mining import Mined, MiningRule, mine_negatives
from jaxcl.ops.pairs import PairLabels
from jaxcl.step.train_state import TrainState
from jaxcl.typing import RowKeys, Scalar

__all__ = ["Refresh", "make_mined_refresh"]

Refresh = Callable[[TrainState], tuple[TrainState, Mapping[str, Scalar]]]
"""`state -> (state, metrics)`; the state is donated."""

_BLOCK_ROWS = 4_096  # queries at a time, over all devices
_MINING = 2**31  # folded into the run's key, as steps are; greater than any step


def make_mined_refresh(rule: MiningRule, mesh: Mesh, *, by_group: bool) -> Refresh:
    """Compile the mining of all training rows from the instance banks, with no pass over the data.

    Args:
      rule: the rule that selects negatives.
      mesh: the devices that the banks are sharded over.
      by_group: whether rows of one group are excluded from each other's negatives.

    Returns:
      `state -> (state, metrics)`, with new negatives in `memory["mined"]`. A row that has not been
      trained on yet has no negatives, and is not a negative of others. The metrics are the number
      of negatives per row, their mean similarity and their mean rank.
    """
    rule.check()
    axes = mesh.axis_names
    rows: Any = PartitionSpec(axes)
    replicated: Any = PartitionSpec()
    slots = MemoryBank(rows, rows, rows, rows, replicated, replicated, rows)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(slots, slots, rows), out_specs=rows)
    def mined(queries: MemoryBank, keys: MemoryBank, row_keys: RowKeys) -> Mined:
        labels = [
            PairLabels(
                different=(bank.ids, bank.groups) if by_group else (bank.ids,),
                valid=bank.written >= 0,
            )
            for bank in (queries, keys)
        ]
        vectors, positives = (bank.vectors.astype(jnp.float32) for bank in (queries, keys))

        def of_block(block: tuple) -> Mined:
            vectors, own, query_labels, row_keys = block
            return mine_negatives(
                vectors,
                own,
                positives,
                rule=rule,
                row_keys=row_keys,
                query_labels=query_labels,
                table_labels=labels[1],
                axis_name=axes,
            )

        # Block by block, so that no device holds the queries of all devices at once.
        num_blocks = _blocks(vectors.shape[0], most=max(_BLOCK_ROWS // mesh.size, 1))
        blocks = jax.tree.map(
            lambda leaf: leaf.reshape(num_blocks, -1, *leaf.shape[1:]),
            (vectors, positives, labels[0], row_keys),
        )
        results = jax.lax.map(of_block, blocks)
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), results)

    @functools.partial(jax.jit, donate_argnums=0)
    def refresh(state: TrainState) -> tuple[TrainState, Mapping[str, Scalar]]:
        entries = state.memory["mined"].shape[0]
        banks = {
            side: pad_slots(bank, multiple=mesh.size) for side, bank in state.memory["bank"].items()
        }
        key = jax.random.fold_in(jax.random.fold_in(state.key, _MINING), state.step)
        row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(banks["query"].ids)))
        negatives = mined(banks["query"], banks["key"], row_keys)
        present = negatives.rows >= 0
        count = jnp.maximum(present.sum(), 1)
        trained = (banks["query"].written >= 0).sum()
        metrics = {
            "mined/per_row": present.sum() / jnp.maximum(trained, 1),
            "mined/similarity": jnp.where(present, negatives.similarities, 0).sum() / count,
            "mined/rank": jnp.where(present, negatives.ranks, 0).sum() / count,
        }
        memory = state.memory | {"mined": negatives.rows[:entries]}
        return state._replace(memory=memory), metrics

    return refresh


def _blocks(rows: int, *, most: int) -> int:
    """The smallest number of equal blocks with at most `most` rows each."""
    return next(count for count in range(-(-rows // most), rows + 1) if rows % count == 0)
