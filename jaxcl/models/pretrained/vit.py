"""ViT and DINOv2: vision transformers without a text tower."""

from collections.abc import Mapping
from typing import Any

from jaxcl.models.pretrained.config_values import check_supported, flag, number, size
from jaxcl.models.pretrained.description import Family
from jaxcl.models.pretrained.image_tower import ImageArchitecture, ImageNames
from jaxcl.models.pretrained.siglip import HALF
from jaxcl.models.pretrained.tensor_names import attention_names, mlp_names
from jaxcl.models.pretrained.tower_blocks import BlockNames, read_sizes
from jaxcl.models.pretrained.tower_families import image_family
from jaxcl.models.vision.entry import PixelRule

__all__ = ["DINOV2", "VIT"]


def vit_architecture(config: Mapping[str, Any]) -> ImageArchitecture:
    """The architecture that a ViT model's `config.json` describes, without the pooler.

    Reference:
      Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021.
    """
    return _architecture(config, epsilon=1e-12)


def dinov2_architecture(config: Mapping[str, Any]) -> ImageArchitecture:
    """The architecture that a DINOv2 model's `config.json` describes.

    Reference:
      Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", 2023.
    """
    check_supported(config, use_swiglu_ffn=False)
    mlp_dim = int(size(config, "hidden_size", 768) * number(config, "mlp_ratio", 4.0))
    a = _architecture({**config, "intermediate_size": mlp_dim}, epsilon=1e-6)
    return a._replace(sizes=a.sizes._replace(layer_scale=True))


def _architecture(config: Mapping[str, Any], *, epsilon: float) -> ImageArchitecture:
    check_supported(config, quantization_config=None, num_channels=3)
    return ImageArchitecture(
        read_sizes(config, activation="gelu", epsilon=epsilon)._replace(
            dropout=number(config, "hidden_dropout_prob", 0.0),
            projection_bias=flag(config, "qkv_bias", True),
        ),
        image_size=size(config, "image_size", 224),
        patch_size=size(config, "patch_size", 16),
        pooling="cls",
        unit_axes=1,
    )


def _names(
    norms: tuple[str, str], mlp: tuple[str, str], *, scales: Mapping[str, str] | None = None
) -> ImageNames:
    attention = ("attention.query", "attention.key", "attention.value", "output.dense")
    return ImageNames(
        patches="embeddings.patch_embeddings.projection",
        class_token="embeddings.cls_token",
        positions="embeddings.position_embeddings",
        blocks=BlockNames(
            block="encoder.layer.{}.",
            norms=dict(zip(("attention_norm", "mlp_norm"), norms, strict=True)),
            linear=attention_names("attention.", *attention) | mlp_names(*mlp),
            scales=scales or {},
        ),
        final_norm="layernorm",
    )


VIT: Family = image_family(
    ("vit.",),
    vit_architecture,
    _names(("layernorm_before", "layernorm_after"), ("intermediate.dense", "output.dense")),
    pixels=PixelRule(0, HALF, HALF),
    resize="stretch",
    options=("pooling",),
)
DINOV2: Family = image_family(
    ("dinov2.",),
    dinov2_architecture,
    _names(
        ("norm1", "norm2"),
        ("mlp.fc1", "mlp.fc2"),
        scales={"attention_scale": "layer_scale1.lambda1", "mlp_scale": "layer_scale2.lambda1"},
    ),
    pixels=PixelRule(0, kept=224 / 256, cubic=True),
    options=("pooling",),
)
