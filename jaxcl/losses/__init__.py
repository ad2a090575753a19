"""Contrastive losses: embeddings in, one value per query out, in nats."""

from jaxcl.losses.softmax import infonce_loss

__all__ = ["infonce_loss"]
