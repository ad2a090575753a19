"""Pretrained text encoders: their folders, families and weights."""
