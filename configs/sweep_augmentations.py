"""The gain of each augmentation: SimCLR with one of its operations left out at a time.

    python -m jaxcl.compare --config configs/simclr.py:views --config.data.name=FOLDER \\
        --settings configs/sweep_augmentations.py --workdir runs/augmentations

`configs/sweep_augmentations.py:glyphs` compares the operations that keep a character readable, for
the default of `configs/simclr.py`.
"""

OPTIONS = "augmentation.options"
WHOLE = {f"{OPTIONS}.crop_scale": (1.0, 1.0)}


def get_settings(variant: str = "default") -> dict[str, dict]:
    """The baseline with all operations, one setting without each of them, and no augmentation."""
    if variant not in ("default", "glyphs"):
        raise ValueError(f"variant {variant!r} is unknown; use default or glyphs")
    every = {} if variant == "default" else {f"{OPTIONS}.jitter_rate": 0.8}
    if variant == "glyphs":
        every |= {f"{OPTIONS}.blur_rate": 0.5, f"{OPTIONS}.jitter_strength": 0.5}
    settings = {"all steps": every, "no crop": every | WHOLE}
    steps = {"colours": "jitter", "blur": "blur"}
    if variant == "default":
        steps = {"flip": "flip", "grey": "grayscale"} | steps
    for name, step in steps.items():
        settings[f"no {name}"] = every | {f"{OPTIONS}.{step}_rate": 0.0}
    return settings | {"nothing": {"augmentation.name": None}}
