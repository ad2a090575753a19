"""SigLIP: a vision transformer with attention pooling, and a bidirectional text transformer."""

from collections.abc import Mapping
from typing import Any

from jaxcl.models.pretrained.clip import CLIP_BLOCKS
from jaxcl.models.pretrained.config_values import check_supported, size
from jaxcl.models.pretrained.description import Family
from jaxcl.models.pretrained.image_tower import ImageArchitecture, ImageNames
from jaxcl.models.pretrained.text_tower import TextArchitecture, TextNames
from jaxcl.models.pretrained.tower_blocks import BlockSizes, read_sizes
from jaxcl.models.pretrained.tower_families import image_family, text_family
from jaxcl.models.vision.entry import PixelRule

__all__ = ["HALF", "SIGLIP_IMAGE", "SIGLIP_TEXT"]

HALF = (0.5, 0.5, 0.5)


def siglip_image_architecture(config: Mapping[str, Any]) -> ImageArchitecture:
    """The architecture that the `vision_config` of a SigLIP model's `config.json` describes.

    Reference:
      Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023.
    """
    check_supported(config, quantization_config=None, num_channels=3, vision_use_head=True)
    return ImageArchitecture(
        _sizes(config),
        image_size=size(config, "image_size", 224),
        patch_size=size(config, "patch_size", 16),
        pooling="attention",
        class_token=False,
    )


def siglip_text_architecture(config: Mapping[str, Any]) -> TextArchitecture:
    """The architecture that the `text_config` of a SigLIP model's `config.json` describes."""
    check_supported(config, quantization_config=None)
    sizes = _sizes(config)
    return TextArchitecture(
        sizes,
        vocabulary_size=size(config, "vocab_size", 32000),
        max_tokens=size(config, "max_position_embeddings", 64),
        end_token=None,
        padding_token=size(config, "pad_token_id", 1, least=0),
        projection_dim=size(config, "projection_size", sizes.hidden_dim),
        projection_bias=True,
    )


def _sizes(config: Mapping[str, Any]) -> BlockSizes:
    return read_sizes(config, activation="gelu_pytorch_tanh", epsilon=1e-6)


SIGLIP_IMAGE: Family = image_family(
    ("vision_model.",),
    siglip_image_architecture,
    ImageNames(
        patches="embeddings.patch_embedding",
        class_token="",
        positions="embeddings.position_embedding.weight",
        blocks=CLIP_BLOCKS,
        final_norm="post_layernorm",
        head="head",
    ),
    pixels=PixelRule(0, HALF, HALF, cubic=True),
    resize="stretch",
)
SIGLIP_TEXT: Family = text_family(
    ("text_model.",),
    siglip_text_architecture,
    TextNames(
        tokens="embeddings.token_embedding",
        positions="embeddings.position_embedding",
        blocks=CLIP_BLOCKS,
        final_norm="final_layer_norm",
        projection="head",
    ),
    any_width=False,
)
