"""Initialise the memory of a run: banks, running estimates, mined negatives and batch order."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcl.data.row_guides import guide_dim
from jaxcl.negatives.memory_bank import init_bank
from jaxcl.negatives.tiers import strata_of
from jaxcl.ops.row_tables import padded_entries
from jaxcl.run.build_loss import beyond_batch, run_loss
from jaxcl.settings.derived import gcbs_rule
from jaxcl.settings.sections import Settings
from jaxcl.typing import Integer, PyTree

__all__ = ["init_memory", "tiers_left_empty"]


def init_memory(
    settings: Settings,
    num_rows: int | None,
    groups: Integer[np.ndarray, " n"] | None = None,
) -> dict[str, PyTree]:
    """The memory of a run before its first batch, for `TrainState.memory`.

    Args:
      settings: the settings of the run.
      num_rows: number of training rows; `None` if no part of the memory has an entry per row.
      groups: the group of each row, for stratified draws.

    Raises:
      ValueError: if the number of rows or their groups are needed but missing.
    """
    memory = _negatives_memory(settings, num_rows, groups) | _assignment_memory(settings, num_rows)
    if settings.optimizer.average_decay is not None:
        memory["average"] = None  # becomes a copy of the towers
    init_rows = run_loss(settings).init_memory
    if init_rows is not None:
        if num_rows is None:
            raise ValueError("the loss has an estimate per row; give num_rows")
        initial = settings.loss.temperature.initial
        memory["rows"] = init_rows(num_rows, temperature=initial, **settings.loss.options)
    return memory


def tiers_left_empty(settings: Settings, num_rows: int) -> list[str]:
    """The tiers that stay empty because `uniform` already draws every slot of the bank."""
    budgets, bank = settings.negatives.tiers, settings.negatives.bank
    if bank.kind is None:
        return []
    slots = num_rows if bank.kind == "instance" else bank.slots
    others = ("stratified", "nearest") if budgets.uniform >= slots else ()
    return [name for name in others if getattr(budgets, name)]


def _negatives_memory(
    settings: Settings, num_rows: int | None, groups: Integer[np.ndarray, " n"] | None
) -> dict[str, PyTree]:
    memory: dict[str, PyTree] = {}
    negatives, beyond = settings.negatives, beyond_batch(settings)
    if negatives.bank.kind == "instance" and num_rows is None:
        raise ValueError("an instance bank has a slot per row; give num_rows")
    if beyond.update_banks:
        bank, guides = negatives.bank, settings.data.guides
        slots: Any = num_rows if bank.kind == "instance" else bank.slots
        width = None if guides is None else guide_dim(guides)
        memory["bank"] = {
            side: init_bank(slots, settings.model.dim, dtype=jnp.dtype(bank.dtype), guide_dim=width)
            for side in beyond.update_banks
        }
    if negatives.mined.refresh_every is not None and num_rows is not None:
        per_query = negatives.mined.per_query
        memory["mined"] = jnp.full((padded_entries(num_rows), per_query), -1, jnp.int32)
    if beyond.budgets.stratified:
        if groups is None:
            raise ValueError("stratified draws need the groups of the rows; give groups")
        by = negatives.proportions
        proportions: Any = dict(negatives.weights) if by == "weights" else by
        count = beyond.budgets.stratified
        memory["strata"] = strata_of(groups, count=count, proportions=proportions)
    if negatives.momentum_encoder.initial is not None:
        memory["momentum"] = {}  # becomes a copy of the towers
    return memory


def _assignment_memory(settings: Settings, num_rows: int | None) -> dict[str, PyTree]:
    """The assignment before the first refresh, without an order."""
    if gcbs_rule(settings) is None:
        return {}
    if num_rows is None:
        raise ValueError("the assignment has an order of all rows; give num_rows")
    entries = padded_entries(num_rows)
    assigned = {
        "order": jnp.full(entries, -1, jnp.int32),
        "seen": jnp.zeros(entries, bool),
        "step": jnp.int32(-1),
    }
    return {"assignment": assigned}
