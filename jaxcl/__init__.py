"""Contrastive embedders in JAX: every negative counts, at any scale, exactly.

The library, for your own training loop:

    from jaxcl import assignment, grad_cache, losses, metrics, negatives, ops

A trained model:

    model = jaxcl.load("runs/code_search")
    model.encode(["parse an ISO 8601 date"])

The application:

    python -m jaxcl.train --config configs/code_search.py
    python -m jaxcl.search --workdir runs/code_search "parse an ISO 8601 date"

`python -m jaxcl` lists all commands.
"""

from typing import TYPE_CHECKING, Any

from jaxcl.host.command_names import refuse_other_modules
from jaxcl.host.extras import missing_message

refuse_other_modules()

# Imported after the check, so that the check does not wait for JAX.
from jaxcl import assignment, grad_cache, losses, metrics, negatives, ops  # noqa: E402

if TYPE_CHECKING:
    from jaxcl.run.load_model import load

__all__ = ["assignment", "grad_cache", "load", "losses", "metrics", "negatives", "ops"]


def __getattr__(name: str) -> Any:
    # `load` needs the packages of the extra `train`, which take seconds to import.
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if (missing := missing_message()) is not None:
        raise ImportError(f"jaxcl.load {missing}")
    from jaxcl.run.load_model import load

    return load
