"""Sources of negatives: the settings that `jaxcl.compare` trains and compares.

    python -m jaxcl.compare --config configs/code_search.py \\
        --settings configs/sweep_negatives.py --workdir runs/negatives
"""

RANDOM = {"assignment.name": "uniform"}
NOT_SYNTHETIC = {
    f"negatives.tiers.{tier}": 0 for tier in ("mixed", "mixed_with_query", "perturbed")
}
INSTANCES = {"negatives.bank.kind": "instance"}
MINED = INSTANCES | {"negatives.mined.refresh_every": 50, "negatives.mined.per_query": 1}

TIERS = {
    "in-batch": NOT_SYNTHETIC,
    "+ queue": NOT_SYNTHETIC | {"negatives.bank.kind": "queue", "negatives.tiers.full_bank": True},
    "+ stratified": NOT_SYNTHETIC
    | INSTANCES
    | {"negatives.tiers.stratified": 4_096, "negatives.proportions": "equal"},
    "+ synthetic": {},
    "+ mined": NOT_SYNTHETIC | MINED,
    "+ all": MINED
    | {"negatives.tiers.uniform": 2_048, "negatives.tiers.stratified": 2_048}
    | {"negatives.tiers.nearest": 8, "negatives.tiers.hardest": 16}
    | {"negatives.tiers.of_batch": False, "negatives.tiers.mixed": 8}
    | {"negatives.tiers.mixed_with_query": 4, "negatives.tiers.perturbed": 4},
}


def get_settings(variant: str = "default") -> dict[str, dict]:
    """Each tier with random batches, without and with masks; the first setting is the baseline."""
    if variant != "default":
        raise ValueError(f"variant {variant!r} is unknown; this sweep has none")
    settings = {}
    for name, tiers in TIERS.items():
        settings[name] = RANDOM | tiers
        masks = {"loss.masks": ("text",), "loss.relative_margin": 0.05}
        if "negatives.mined.refresh_every" in tiers:
            masks |= {"negatives.mined.relative_margin": 0.05}
        settings[f"{name}, masked"] = settings[name] | masks
    return settings
