"""The gain of each feature on code search: the settings that `jaxcl.compare` trains and compares.

    python -m jaxcl.compare --config configs/code_search.py \\
        --settings configs/sweep_features.py --workdir runs/features --seeds 3

The baseline has random batches and in-batch negatives only. `configs/sweep_features.py:small` has
batches of 64, 1,000 steps and refreshes every 200 steps. `configs/sweep_features.py:defaults`
compares only the baseline and code search's own defaults.
"""

from jaxcl.configs.sweep_negatives import MINED, NOT_SYNTHETIC, RANDOM

DENSE = {"evaluation.methods": ("dense",)}
MASKS = {"loss.masks": ("text",), "loss.relative_margin": 0.05}
BASELINE = DENSE | RANDOM | NOT_SYNTHETIC
ASSIGNED = BASELINE | {"assignment.name": "gcbs"}

FEATURES = {
    "baseline": BASELINE,
    "batch assignment": ASSIGNED,
    "batch assignment, masked": ASSIGNED | MASKS,
    "synthetic negatives": DENSE | RANDOM,
    "mined negatives": BASELINE | MINED,
    "mined negatives, masked": BASELINE | MINED | MASKS | {"negatives.mined.relative_margin": 0.05},
    "false-negative masks": BASELINE | MASKS,
    "defaults": DENSE,
}
_SMALL = {"global_batch_size": 64, "steps": 1_000}
_REFRESH = {"assignment.gcbs.refresh_every": 200}


def get_settings(variant: str = "default") -> dict[str, dict]:
    """Each feature added to the baseline, and code search's own defaults."""
    if variant == "default":
        return FEATURES
    if variant == "defaults":
        return {name: FEATURES[name] for name in ("baseline", "defaults")}
    if variant != "small":
        raise ValueError(f"variant {variant!r} is unknown; use default, defaults or small")
    return {
        name: changes | _SMALL | (_REFRESH if _is_assigned(changes) else {})
        for name, changes in FEATURES.items()
        if "mined" not in name
    }


def _is_assigned(changes: dict) -> bool:
    """Whether batches are assigned, as they are by default."""
    return changes.get("assignment.name") != "uniform"
