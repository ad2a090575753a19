"""Which keys stand against a query, and which of them count."""

from jaxcl.negatives.masks import different_label_mask

__all__ = ["different_label_mask"]
