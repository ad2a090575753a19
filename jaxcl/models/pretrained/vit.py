"""ViT and DINOv2: vision transformers without a text tower."""

from collections.abc import Mapping
from typing import Any

from jaxcl.models.pretrained.config_values import activation, check_supported, flag, number, size
from jaxcl.models.pretrained.description import Family
from jaxcl.models.pretrained.image_tower import ImageArchitecture, ImageNames
from jaxcl.models.pretrained.siglip import HALF
from jaxcl.models.pretrained.tower_blocks import BlockNames, BlockSizes
from jaxcl.models.pretrained.tower_families import image_family
from jaxcl.models.vision.entry import PixelRule

__all__ = ["DINOV2", "VIT"]


def vit_architecture(config: Mapping[str, Any]) -> ImageArchitecture:
    """The architecture that a ViT's `config.json` describes, without the pooler.

    Raises:
      ValueError: for an unsupported value; the message names its key.

    Reference:
      Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021.
    """
    return _architecture(config, size(config, "intermediate_size", 3072), epsilon=1e-12)


def dinov2_architecture(config: Mapping[str, Any]) -> ImageArchitecture:
    """The architecture that a DINOv2's `config.json` describes.

    Raises:
      ValueError: for an unsupported value; the message names its key.

    Reference:
      Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", 2023.
    """
    check_supported(config, use_swiglu_ffn=False)
    mlp_dim = int(size(config, "hidden_size", 768) * number(config, "mlp_ratio", 4.0))
    a = _architecture(config, mlp_dim, epsilon=1e-6)
    return a._replace(sizes=a.sizes._replace(layer_scale=True))


def _architecture(config: Mapping[str, Any], mlp_dim: int, *, epsilon: float) -> ImageArchitecture:
    check_supported(config, quantization_config=None, num_channels=3)
    return ImageArchitecture(
        BlockSizes(
            hidden_dim=size(config, "hidden_size", 768),
            num_layers=size(config, "num_hidden_layers", 12),
            num_heads=size(config, "num_attention_heads", 12),
            mlp_dim=mlp_dim,
            activation=activation(config, "hidden_act"),
            epsilon=number(config, "layer_norm_eps", epsilon),
            dropout=number(config, "hidden_dropout_prob", 0.0),
            projection_bias=flag(config, "qkv_bias", True),
        ),
        image_size=size(config, "image_size", 224),
        patch_size=size(config, "patch_size", 16),
        pooling="cls",
        unit_axes=1,
    )


_ATTENTION = {
    "attention/query": "attention.attention.query",
    "attention/key": "attention.attention.key",
    "attention/value": "attention.attention.value",
    "attention/output": "attention.output.dense",
}


def _names(blocks: BlockNames) -> ImageNames:
    return ImageNames(
        patches="embeddings.patch_embeddings.projection",
        class_token="embeddings.cls_token",
        positions="embeddings.position_embeddings",
        blocks=blocks,
        final_norm="layernorm",
    )


VIT: Family = image_family(
    ("vit.",),
    vit_architecture,
    _names(
        BlockNames(
            block="encoder.layer.{}.",
            norms={"attention_norm": "layernorm_before", "mlp_norm": "layernorm_after"},
            linear={
                **_ATTENTION,
                "mlp/widen": "intermediate.dense",
                "mlp/narrow": "output.dense",
            },
        )
    ),
    pixels=PixelRule(0, HALF, HALF),
    resize="stretch",
    options=("pooling",),
)
DINOV2: Family = image_family(
    ("dinov2.",),
    dinov2_architecture,
    _names(
        BlockNames(
            block="encoder.layer.{}.",
            norms={"attention_norm": "norm1", "mlp_norm": "norm2"},
            linear={**_ATTENTION, "mlp/widen": "mlp.fc1", "mlp/narrow": "mlp.fc2"},
            scales={
                "attention_scale": "layer_scale1.lambda1",
                "mlp_scale": "layer_scale2.lambda1",
            },
        )
    ),
    pixels=PixelRule(0, kept=224 / 256, cubic=True),
    options=("pooling",),
)
