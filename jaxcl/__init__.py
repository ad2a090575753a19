"""Contrastive embedders in JAX: every negative counts, at any scale, exactly.

The library, for your own training loop:

    from jaxcl import assignment, grad_cache, losses, metrics, negatives, ops

The application:

    python -m jaxcl.train --config configs/code_search.py
    python -m jaxcl.search --workdir runs/code_search "parse an ISO 8601 date"

`python -m jaxcl` lists all commands.
"""

from jaxcl.host.command_names import refuse_other_modules

refuse_other_modules()

# After the check, which then need not wait for JAX.
from jaxcl import assignment, grad_cache, losses, metrics, negatives, ops  # noqa: E402

__all__ = ["assignment", "grad_cache", "losses", "metrics", "negatives", "ops"]
