"""Encoders: one side's tree of inputs in, `[b, d]` unit vectors out."""

from collections.abc import Mapping

from jaxcl.models.decoder import DecoderEncoder, DecoderOptions
from jaxcl.models.static import StaticEncoder, StaticOptions
from jaxcl.models.towers import Encode, EncoderPart, Towers, TowerSpec, make_towers
from jaxcl.models.transformer import TransformerEncoder, TransformerOptions
from jaxcl.models.vision.convnet import ConvNetEncoder, ConvNetOptions
from jaxcl.models.vision.resnet import ResNetEncoder, ResNetOptions
from jaxcl.models.vision.vit import ViTEncoder, ViTOptions

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
    "convnet": EncoderPart(ConvNetEncoder, ConvNetOptions),
    "decoder": EncoderPart(DecoderEncoder, DecoderOptions, any_width=True),
    "resnet": EncoderPart(ResNetEncoder, ResNetOptions),
    "static": EncoderPart(StaticEncoder, StaticOptions),
    "transformer": EncoderPart(TransformerEncoder, TransformerOptions, any_width=True),
    "vit": EncoderPart(ViTEncoder, ViTOptions),
}
"""Encoders by `config.model.name`."""

DEFAULT_ENCODER = "static"
"""The encoder of a config that names none."""
