"""Encoders: one side's tree of inputs in, `[b, d]` unit vectors out."""

from collections.abc import Mapping

from jaxcl.models.decoder import DecoderEncoder, DecoderOptions
from jaxcl.models.static import StaticEncoder, StaticOptions
from jaxcl.models.towers import Encode, EncoderPart, Towers, TowerSpec, make_towers
from jaxcl.models.transformer import TransformerEncoder, TransformerOptions

__all__ = [
    "DEFAULT_ENCODER",
    "ENCODERS",
    "DecoderEncoder",
    "Encode",
    "EncoderPart",
    "StaticEncoder",
    "TowerSpec",
    "Towers",
    "TransformerEncoder",
    "make_towers",
]

ENCODERS: Mapping[str, EncoderPart] = {
    "decoder": EncoderPart(DecoderEncoder, DecoderOptions, any_width=True),
    "static": EncoderPart(StaticEncoder, StaticOptions),
    "transformer": EncoderPart(TransformerEncoder, TransformerOptions, any_width=True),
}
"""Encoders by `config.model.name`."""

DEFAULT_ENCODER = "static"
"""The encoder of a config that names none."""
