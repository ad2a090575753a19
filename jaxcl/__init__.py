"""Contrastive embedders in JAX: every negative counts, at any scale, exactly.

The library, for whoever has a training loop:

    from jaxcl import assignment, losses, metrics, negatives

The application, for whoever has none:

    python -m jaxcl.train --config configs/code_search.py
    python -m jaxcl.search --workdir runs/code_search "parse an ISO 8601 date"
"""

from jaxcl import assignment, losses, metrics, negatives

__all__ = ["assignment", "losses", "metrics", "negatives"]
