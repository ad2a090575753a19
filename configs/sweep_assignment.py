"""Random and assigned batches: the settings that `jaxcl.compare` trains and compares.

    python -m jaxcl.compare --config configs/code_search.py \\
        --settings configs/sweep_assignment.py --workdir runs/assignment

`configs/sweep_assignment.py:small` has batches of 64, 1,000 steps and refreshes every 200 steps.
`configs/sweep_assignment.py:refreshes` varies only the steps between refreshes and the number of
starts; the default in code search was chosen from these settings.
"""

DENSE = {"evaluation.methods": ("dense",)}
RANDOM = DENSE | {"assignment.name": "uniform"}
LIGHT = DENSE | {"assignment.name": "gcbs"}
FULL = LIGHT | {"assignment.gcbs.preset": "full"}
BANK = {"assignment.gcbs.embeddings": "bank", "negatives.bank.kind": "instance"}
TWO_STARTS = {"assignment.gcbs.starts": 2, "assignment.gcbs.walks": 4}
MASKS = {"loss.masks": ("text",), "loss.relative_margin": 0.05}


def get_settings(variant: str = "default") -> dict[str, dict]:
    """Random and assigned batches; the first setting is the baseline."""
    if variant == "refreshes":
        return {
            "random": RANDOM,
            **_refreshes(50, 75, 100),
            **_refreshes(50, 75, starts=TWO_STARTS),
        }
    if variant not in ("default", "small"):
        raise ValueError(f"variant {variant!r} is unknown; use default, small or refreshes")
    small = variant == "small"
    refresh, steps = (200, 1_000) if small else (50, 300)
    size = {"global_batch_size": 64, "steps": steps} if small else {}
    every = {"assignment.gcbs.refresh_every": refresh}
    mined = {"negatives.mined.refresh_every": refresh, "negatives.bank.kind": "instance"}
    random, light, full = RANDOM | size, LIGHT | size | every, FULL | size | every
    settings = {
        "random": random,
        "paper": full | {"assignment.gcbs.method": "rcm"},
        "gcbs": full,
        "gcbs, bank": full | BANK,
        "random, mined": random | mined,
        "gcbs 32": full | {"assignment.gcbs.block_size": 32},
        "gcbs, hardening": full | {"assignment.gcbs.random_initial": 1.0},
        f"gcbs, every {2 * refresh}": full | {"assignment.gcbs.refresh_every": 2 * refresh},
        "light": light,
        "random, masked": random | MASKS,
        "gcbs, masked": full | MASKS,
    }
    if small:
        settings["gcbs 8"] = full | {"assignment.gcbs.block_size": 8}
        settings["random, 2,000 steps"] = random | {"steps": 2_000}
        return settings
    settings |= _refreshes(75, 100, 150) | _refreshes(50, 75, starts=TWO_STARTS)
    settings["light, bank"] = light | BANK
    settings["gcbs 128"] = full | {"assignment.gcbs.block_size": 128}
    settings["random, 450 steps"] = random | {"steps": 450}
    settings["random, synthetic of the bank"] = random | {
        "negatives.bank.kind": "instance",
        "negatives.tiers.of_batch": False,
    }
    return settings


def _refreshes(*all_steps: int, starts: dict[str, int] | None = None) -> dict[str, dict]:
    """The light preset with each of these numbers of steps between refreshes."""
    settings = {}
    for steps in all_steps:
        name = f"light, every {steps}" + (", two starts" if starts else "")
        settings[name] = LIGHT | {"assignment.gcbs.refresh_every": steps} | (starts or {})
    return settings
