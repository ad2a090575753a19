"""The gain of each feature on code search: the settings that `jaxcl.compare` trains and compares.

    python -m jaxcl.compare --config configs/code_search.py \\
        --settings configs/sweep_features.py --workdir runs/features --seeds 3

The baseline has random batches and in-batch negatives only. `configs/sweep_features.py:defaults`
compares only the baseline and code search's own defaults.
"""

from jaxcl.configs.sweep_negatives import MINED, NOT_SYNTHETIC, RANDOM

DENSE = {"evaluation.methods": ("dense",)}
MASKS = {"loss.masks": ("text",), "loss.relative_margin": 0.05}
BASELINE = DENSE | RANDOM | NOT_SYNTHETIC


def get_settings(variant: str = "default") -> dict[str, dict]:
    """Each feature added to the baseline, and code search's own defaults."""
    if variant == "defaults":
        return {"baseline": BASELINE, "defaults": DENSE}
    if variant != "default":
        raise ValueError(f"variant {variant!r} is unknown; use default or defaults")
    return {
        "baseline": BASELINE,
        "batch assignment": BASELINE | {"assignment.name": "gcbs"},
        "synthetic negatives": DENSE | RANDOM,
        "mined negatives": BASELINE | MINED,
        "mined negatives, masked": BASELINE
        | MINED
        | MASKS
        | {"negatives.mined.relative_margin": 0.05},
        "false-negative masks": BASELINE | MASKS,
        "defaults": DENSE,
    }
