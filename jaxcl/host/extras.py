"""Names the extra to install if a command lacks packages."""

import importlib.util

__all__ = ["TRAIN", "missing_message"]

TRAIN: tuple[str, ...] = ("absl", "bm25s", "flax", "grain", "ml_collections", "optax", "orbax")
TRAIN += ("rich", "safetensors", "tensorboardX", "tensorflow_datasets", "tokenizers")
"""Packages of `jaxcl[train]`."""


def missing_message() -> str | None:
    """A message about missing packages, or `None` if all are installed."""
    missing = [name for name in TRAIN if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return f"needs {', '.join(missing)}: pip install 'jaxcl[train]'"
