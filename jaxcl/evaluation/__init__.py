"""How good an embedder is."""
