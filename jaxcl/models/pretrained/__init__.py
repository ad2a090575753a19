"""Pretrained text encoders: their folders, their families, and their weights."""
