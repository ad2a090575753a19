"""The negatives of a query: masks, memory banks, draws from banks, synthetic and mined ones."""

from jaxcl.negatives.draws import draw_slots, priorities
from jaxcl.negatives.hard_negatives import HardNegatives, mine_hard_negatives
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
    "HardNegatives",
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
    "mine_hard_negatives",
    "mine_negatives",
    "priorities",
    "read_bank",
    "similarity_ceilings",
    "strata_of",
    "update_instances",
    "update_queue",
]
