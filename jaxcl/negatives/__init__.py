"""Which keys stand against a query: masks, memory banks, draws from them, made and mined ones."""

from jaxcl.negatives.draws import draw_slots, priorities
from jaxcl.negatives.masks import batch_labels, similarity_ceilings
from jaxcl.negatives.memory_bank import (
    MemoryBank,
    init_bank,
    read_bank,
    update_instances,
    update_queue,
)
from jaxcl.negatives.mining import Mined, MiningRule, mine_negatives
from jaxcl.negatives.sets import (
    ExplicitNegatives,
    Negatives,
    OwnNegatives,
    SharedNegatives,
)
from jaxcl.negatives.tiers import DrawSource, TierBudgets, draw_tiers, strata_of

__all__ = [
    "DrawSource",
    "ExplicitNegatives",
    "MemoryBank",
    "Mined",
    "MiningRule",
    "Negatives",
    "OwnNegatives",
    "SharedNegatives",
    "TierBudgets",
    "batch_labels",
    "draw_slots",
    "draw_tiers",
    "init_bank",
    "mine_negatives",
    "priorities",
    "read_bank",
    "similarity_ceilings",
    "strata_of",
    "update_instances",
    "update_queue",
]
