"""Contrastive embedders in JAX: every negative counts, at any scale, exactly.

The library, for whoever has a training loop:

    from jaxcl import assignment, grad_cache, losses, metrics, negatives, ops

The application, for whoever has none:

    python -m jaxcl.train --config configs/code_search.py
    python -m jaxcl.search --workdir runs/code_search "parse an ISO 8601 date"
"""

from jaxcl import assignment, grad_cache, losses, metrics, negatives, ops

__all__ = ["assignment", "grad_cache", "losses", "metrics", "negatives", "ops"]
