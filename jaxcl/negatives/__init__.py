"""Which keys stand against a query."""

from jaxcl.negatives.masks import batch_labels, similarity_ceilings

__all__ = ["batch_labels", "similarity_ceilings"]
