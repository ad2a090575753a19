"""CLIP: a vision transformer and a causal text transformer with projections to a shared space."""

from collections.abc import Mapping
from typing import Any

from jaxcl.models.pretrained.config_values import check_supported, size
from jaxcl.models.pretrained.description import Family
from jaxcl.models.pretrained.image_tower import ImageArchitecture, ImageNames
from jaxcl.models.pretrained.tensor_names import attention_names, mlp_names
from jaxcl.models.pretrained.text_tower import TextArchitecture, TextNames
from jaxcl.models.pretrained.tower_blocks import BlockNames, read_sizes
from jaxcl.models.pretrained.tower_families import image_family, text_family
from jaxcl.models.vision.entry import PixelRule

__all__ = ["CLIP_BLOCKS", "CLIP_IMAGE", "CLIP_MEAN", "CLIP_STD", "CLIP_TEXT", "projection_dim"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

CLIP_BLOCKS = BlockNames(
    block="encoder.layers.{}.",
    norms={"attention_norm": "layer_norm1", "mlp_norm": "layer_norm2"},
    linear=attention_names("self_attn.", "q_proj", "k_proj", "v_proj", "out_proj")
    | mlp_names("mlp.fc1", "mlp.fc2"),
)


def projection_dim(config: Mapping[str, Any], default: int | None) -> int | None:
    """The width of the projection; `None` for a folder without one."""
    value = config.get("projection_dim", default)
    return None if value is None else size(config, "projection_dim", default)


def clip_image_architecture(config: Mapping[str, Any]) -> ImageArchitecture:
    """The architecture that the `vision_config` of a CLIP model's `config.json` describes.

    Reference:
      Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021.
    """
    check_supported(config, quantization_config=None, num_channels=3)
    return ImageArchitecture(
        read_sizes(config, activation="quick_gelu", epsilon=1e-5),
        image_size=size(config, "image_size", 224),
        patch_size=size(config, "patch_size", 32),
        pooling="cls",
        projection_dim=projection_dim(config, 512),
        patch_bias=False,
        embedding_norm=True,
    )


def clip_text_architecture(config: Mapping[str, Any]) -> TextArchitecture:
    """The architecture that the `text_config` of a CLIP model's `config.json` describes.

    A text's embedding is the state of its first end token. In older config files `eos_token_id` is
    2, whatever the tokenizer; the token with the largest id then ends a text.
    """
    check_supported(config, quantization_config=None)
    narrow = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048}
    sizes = read_sizes({**narrow, **config}, activation="quick_gelu", epsilon=1e-5)
    return TextArchitecture(
        sizes._replace(causal=True),
        vocabulary_size=size(config, "vocab_size", 49408),
        max_tokens=size(config, "max_position_embeddings", 77),
        end_token=size(config, "eos_token_id", 49407, least=0),
        padding_token=0,  # never attended to
        projection_dim=projection_dim(config, 512),
        projection_bias=False,
    )


CLIP_IMAGE: Family = image_family(
    ("vision_model.",),
    clip_image_architecture,
    ImageNames(
        patches="embeddings.patch_embedding",
        class_token="embeddings.class_embedding",
        positions="embeddings.position_embedding.weight",
        blocks=CLIP_BLOCKS,
        final_norm="post_layernorm",
        embedding_norm="pre_layrnorm",  # spelled like this in the files
        projection="visual_projection",
    ),
    pixels=PixelRule(0, CLIP_MEAN, CLIP_STD, cubic=True),
)
CLIP_TEXT: Family = text_family(
    ("text_model.",),
    clip_text_architecture,
    TextNames(
        tokens="embeddings.token_embedding",
        positions="embeddings.position_embedding",
        blocks=CLIP_BLOCKS,
        final_norm="final_layer_norm",
        projection="text_projection",
    ),
)
