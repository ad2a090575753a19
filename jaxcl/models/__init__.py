"""Encoders: one side's tree of inputs in, `[b, d]` unit vectors out."""

from collections.abc import Mapping

from jaxcl.models.decoder import DecoderEncoder
from jaxcl.models.options import options_of
from jaxcl.models.static import StaticEncoder
from jaxcl.models.towers import Encode, EncoderPart, Towers, TowerSpec, make_towers
from jaxcl.models.transformer import TransformerEncoder
from jaxcl.models.vision.convnet import ConvNetEncoder
from jaxcl.models.vision.resnet import ResNetEncoder
from jaxcl.models.vision.vit import ViTEncoder

__all__ = [
    "DEFAULT_ENCODER",
    "ENCODERS",
    "ConvNetEncoder",
    "DecoderEncoder",
    "Encode",
    "EncoderPart",
    "ResNetEncoder",
    "StaticEncoder",
    "TowerSpec",
    "Towers",
    "TransformerEncoder",
    "ViTEncoder",
    "make_towers",
]

ENCODERS: Mapping[str, EncoderPart] = {
    "convnet": EncoderPart(ConvNetEncoder, options_of(ConvNetEncoder)),
    "decoder": EncoderPart(DecoderEncoder, options_of(DecoderEncoder), any_width=True),
    "resnet": EncoderPart(ResNetEncoder, options_of(ResNetEncoder)),
    "static": EncoderPart(StaticEncoder, options_of(StaticEncoder)),
    "transformer": EncoderPart(TransformerEncoder, options_of(TransformerEncoder), any_width=True),
    "vit": EncoderPart(ViTEncoder, options_of(ViTEncoder)),
}
"""Encoders by `config.model.name`."""

DEFAULT_ENCODER = "static"
"""The encoder of a config that names none."""
