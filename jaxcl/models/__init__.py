"""Encoders: one side's tree of inputs in, `[b, d]` unit vectors out."""

from jaxcl.models.decoder import DecoderEncoder
from jaxcl.models.static import StaticEncoder
from jaxcl.models.towers import Encode, Towers, make_towers
from jaxcl.models.transformer import TransformerEncoder

__all__ = [
    "DecoderEncoder",
    "Encode",
    "StaticEncoder",
    "Towers",
    "TransformerEncoder",
    "make_towers",
]
