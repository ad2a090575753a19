"""Write the two fine-tuned towers of a CLIP as one folder, with the layout of the original one."""

from collections.abc import Mapping

import numpy as np

from jaxcl.models.pretrained.containment import join
from jaxcl.models.pretrained.description import PretrainedModel
from jaxcl.models.pretrained.modules import SENTENCE_CONFIGS, list_modules, parse_json
from jaxcl.models.pretrained.preprocessing import PREPROCESSING_FILES
from jaxcl.models.pretrained.weights import FileTensors, export_tensors
from jaxcl.run.model_files import ModelFiles, as_json, with_dtype
from jaxcl.run.pretrained_folder import (
    LIBRARY_CONFIG,
    library_config,
    module_list,
    tokenizer_config,
    with_stored_type,
)
from jaxcl.settings.data_sections import DataSettings
from jaxcl.settings.derived import tower_sections
from jaxcl.settings.sections import Settings
from jaxcl.typing import SIDES, PyTree

__all__ = ["CLIP_FAMILIES", "clip_files", "towers_by_modality", "why_not_clip"]

CLIP_FAMILIES: Mapping[str, str] = {"text": "clip_text_model", "image": "clip_vision_model"}
"""The families of the two towers for which sentence-transformers has a module."""


def towers_by_modality(settings: Settings) -> dict[str, str]:
    """Modality -> the side with this tower, for a run with both towers of one folder; else empty.

    The folder is one of `jaxcl.models.pretrained.families.TWO_TOWERS`.
    """
    models = settings.parts.pretrained
    sections = tower_sections(settings.model)
    if set(sections) != set(SIDES) or set(models) != set(sections.values()):
        return {}
    query, key = (models[sections[side]] for side in SIDES)
    if query.modality == key.modality or query.files != key.files:
        return {}
    return {query.modality: "query", key.modality: "key"}


def why_not_clip(settings: Settings, sides: Mapping[str, str]) -> str | None:
    """The reason why sentence-transformers cannot compute the embeddings of two towers, or `None`.

    Args:
      settings: the settings of the run.
      sides: the result of `towers_by_modality`.
    """
    data, models = settings.data, _models(settings, sides)
    families = {modality: model.family for modality, model in models.items()}
    images = models["image"].images
    assert images is not None  # an encoder of images has them
    tower = settings.model if sides["image"] == "query" else settings.model.key
    image_size = tower.options.get("image_size")
    reasons = {
        f"it has no module for the towers {' and '.join(sorted(families.values()))}": families
        != CLIP_FAMILIES,
        f"data.special_tokens={data.special_tokens} differs from its folder": (
            not data.special_tokens
        ),
        f"its images have {image_size} pixels, but its folder says {images.pixels.size}": (
            image_size not in (None, images.pixels.size)
        ),
        f"data.images.size={data.images.size} differs from its folder": (
            image_size is None and data.images.size != images.size
        ),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def clip_files(
    settings: Settings, sides: Mapping[str, str], params: PyTree, *, dtype: np.dtype | None = None
) -> ModelFiles:
    """Collect the files of a fine-tuned CLIP for sentence-transformers.

    The model in the folder normalises its vectors, as in training. The learned temperature is not
    written: `logit_scale` keeps its value.

    Args:
      settings: the settings of the run.
      sides: the result of `towers_by_modality`.
      params: the trained parameters of both sides.
      dtype: type of the tensors; `None` for the original types if they can hold the new values.
    """
    models = _models(settings, sides)
    text = models["text"]
    tensors: FileTensors = {}
    for modality, model in models.items():
        for file, named in export_tensors(model, params[sides[modality]]).items():
            tensors.setdefault(file, {}).update(named)
    tensors = with_dtype(tensors, dtype)
    modules = [("CLIPModel", text.encoder_folder), ("Normalize", "1_Normalize")]
    if "modules.json" in text.files:
        listed = list_modules(text.files["modules.json"])
        modules[1:] = [one for one in listed if one[0] == "Normalize"] or modules[1:]
    contents = {
        name: content
        for name, content in text.files.items()
        if name.rpartition("/")[2] not in ("README.md", *SENTENCE_CONFIGS)
    }
    contents |= {
        "modules.json": module_list(modules),
        LIBRARY_CONFIG: library_config(settings.data, parse_json(text.files, LIBRARY_CONFIG)),
        **_encoder_files(models, tensors, _longest(settings.data, sides["text"])),
    }
    return ModelFiles(contents, tensors)


def _models(settings: Settings, sides: Mapping[str, str]) -> dict[str, PretrainedModel]:
    sections = tower_sections(settings.model)
    return {modality: settings.parts.pretrained[sections[side]] for modality, side in sides.items()}


def _longest(data: DataSettings, side: str) -> int:
    return getattr(data.max_tokens, side)


def _encoder_files(
    models: Mapping[str, PretrainedModel], tensors: FileTensors, longest: int
) -> dict[str, bytes]:
    """The files in the encoder's folder that differ from the original."""
    text, images = models["text"], models["image"].images
    config, tokenizer = (
        join(text.encoder_folder, name) for name in ("config.json", "tokenizer_config.json")
    )
    files = {config: with_stored_type(text, config, tensors)}
    if tokenizer in text.files:
        original = parse_json(text.files, tokenizer)
        files[tokenizer] = as_json({**original, "model_max_length": longest})
    else:
        files[tokenizer] = tokenizer_config(text, longest=longest)
    if images is not None and not any(
        join(text.encoder_folder, name) in text.files for name in PREPROCESSING_FILES
    ):
        # Without this file, sentence-transformers cannot read images.
        pixels = images.pixels
        description = {
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "CLIPProcessor",
            "size": {"shortest_edge": images.size},
            "crop_size": {"height": pixels.size, "width": pixels.size},
            "resample": 3 if pixels.cubic else 2,
            "image_mean": list(pixels.mean),
            "image_std": list(pixels.std),
        }
        flags = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
        files[join(text.encoder_folder, PREPROCESSING_FILES[0])] = as_json(
            description | dict.fromkeys(flags, True)
        )
    return files
