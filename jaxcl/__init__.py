"""jaxcl: contrastive embedders in JAX."""
