"""Names the extra that is missing where a command is run without it."""

import importlib.util

__all__ = ["TRAIN", "missing_message"]

TRAIN: tuple[str, ...] = ("absl", "bm25s", "flax", "grain", "ml_collections", "optax", "orbax")
TRAIN += ("rich", "safetensors", "tensorboardX", "tensorflow_datasets", "tokenizers")
"""Packages of `jaxcl[train]`."""


def missing_message() -> str | None:
    """What to install, or `None` where nothing is missing."""
    missing = [name for name in TRAIN if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return f"needs {', '.join(missing)}: pip install 'jaxcl[train]'"
