"""Evaluation of embedding models."""
