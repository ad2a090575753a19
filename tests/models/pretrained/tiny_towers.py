"""Tiny CLIP, SigLIP, ViT and DINOv2 folders with random weights, as transformers writes them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from jaxcl.host.files import write_sealed_json
from jaxcl.models.pretrained.families import FAMILIES, TWO_TOWERS
from jaxcl.models.pretrained.folder import TENSOR_LIST
from jaxcl.models.pretrained.tensor_files import specs_as_json
from jaxcl.models.pretrained.two_towers import tower_config
from tests.models.pretrained.tiny import SPECIAL_TOKENS, WORDS

IMAGE_SIZE, PATCH, MAX_TOKENS, WIDTH, END = 12, 4, 16, 16, 3
SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
IMAGES = {**SIZES, "image_size": IMAGE_SIZE, "patch_size": PATCH}
VOCABULARY = (*SPECIAL_TOKENS, *WORDS)
TEXTS = {
    **SIZES,
    "vocab_size": len(VOCABULARY),
    "max_position_embeddings": MAX_TOKENS,
    "eos_token_id": END,
    "bos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "clip": {
        "architectures": ["CLIPModel"],
        "projection_dim": 8,
        "text_config": {**TEXTS, "projection_dim": 8},
        "vision_config": {**IMAGES, "projection_dim": 8},
    },
    "siglip": {"text_config": TEXTS, "vision_config": IMAGES},
    "vit": IMAGES,
    "dinov2": {**IMAGES, "mlp_ratio": 2},
}
LOGITS = {"clip": {"logit_scale": 2.5}, "siglip": {"logit_scale": 4.0, "logit_bias": -7.0}}
PROCESSING = {
    "clip": {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_resize": True,
        "size": {"shortest_edge": IMAGE_SIZE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.3, 0.25, 0.2],
        "do_convert_rgb": True,
    }
}


def write_tiny_towers(
    folder: Path,
    kind: str = "clip",
    *,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    processing: Mapping[str, Any] | None = None,
    normalize: bool = False,
) -> Path:
    """Write a model with one or two towers, and return its folder.

    Args:
      folder: the folder, created if necessary.
      kind: `"clip"`, `"siglip"`, `"vit"` or `"dinov2"`.
      seed: the seed of the weights.
      config: changes of the config.json.
      processing: the preprocessor_config.json; by default, CLIP has one.
      normalize: whether to add modules.json with a CLIPModel and a Normalize module.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = {**CONFIGS[kind], "model_type": kind, **(config or {})}
    _write(folder / "config.json", whole)
    processing = PROCESSING.get(kind) if processing is None else processing
    if processing:
        _write(folder / "preprocessor_config.json", processing)
    if kind in TWO_TOWERS:
        _write_tokenizer(folder)
    if normalize:
        types = [("CLIPModel", ""), ("Normalize", "1_Normalize")]
        listed = [
            {"type": f"sentence_transformers.models.{name}", "path": path} for name, path in types
        ]
        _write(folder / "modules.json", listed)
    save_file(tower_tensors(whole, seed), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_copy_of_towers(folder: Path, config: Mapping[str, Any]) -> Path:
    """Write a run's copy of a model with two towers of any size; the copy has no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    specs = {name: (np.dtype("<f4"), shape) for name, (shape, _) in tower_shapes(config).items()}
    _write(folder / "config.json", config)
    _write_tokenizer(folder, longest=10**30)  # as tokenizers without a limit write it
    write_sealed_json(folder / TENSOR_LIST, specs_as_json({"model.safetensors": specs}))
    return folder


def tower_tensors(config: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors of all towers, by their names in the file, and those of the loss."""
    rng = np.random.default_rng(seed)
    tensors = {
        name: (0.3 * rng.normal(size=shape) + centre).astype(np.float32)
        for name, (shape, centre) in tower_shapes(config).items()
    }
    shape = () if config["model_type"] == "clip" else (1,)
    for name, value in LOGITS.get(config["model_type"], {}).items():
        tensors[name] = np.full(shape, value, np.float32)
    return tensors


def tower_shapes(config: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], int]]:
    """The shapes of the tensors of all towers by name, and whether their values are around 1."""
    kind = config["model_type"]
    towers = [tower_config(config, one) for one in TWO_TOWERS[kind]] if kind in TWO_TOWERS else []
    found = {}
    for one in towers or [config]:
        family = FAMILIES[one["model_type"]]
        module = nnx.eval_shape(lambda family=family, one=one: family.make(one, rngs=nnx.Rngs(0)))
        shapes = {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(
                nnx.to_pure_dict(nnx.state(module, nnx.Param))
            )
        }
        for path, tensor in family.tensors(one).items():
            shape = shapes[path][::-1] if tensor.transposed else shapes[path]
            centre = int(path.endswith(("norm/scale", "_scale")))
            prefixed = bool(towers) and "_projection" not in tensor.name
            name = f"{family.prefixes[0] if prefixed else ''}{tensor.name}"
            found[name] = (shape, centre)
    return found


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def _write_tokenizer(folder: Path, *, longest: int = MAX_TOKENS) -> None:
    ids = {word: number for number, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", END)]
    )
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": longest,
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
        },
    )
