"""Read the folder of a pretrained encoder: JSON files, text files and the headers of its tensors.

Folders are untrusted. Only JSON, text and safetensors files are read, up to a size limit. Nothing
is unpickled or imported, and no file outside the folder is opened.
"""

import os
from collections.abc import Mapping
from typing import Any

from jaxcl.host.files import read_regular, read_sealed_json
from jaxcl.host.paths import AnyPath
from jaxcl.models.pretrained.containment import join, lies_in, path_inside
from jaxcl.models.pretrained.description import Family, PretrainedModel
from jaxcl.models.pretrained.families import FAMILIES, TWO_TOWERS
from jaxcl.models.pretrained.hub import local_or_hub
from jaxcl.models.pretrained.modules import (
    MODULE_ORDERS,
    SENTENCE_CONFIGS,
    Modules,
    list_modules,
    parse_json,
    parse_modules,
    parse_prompts,
    parse_sentence_config,
    parse_similarity,
    refuse_foreign_code,
)
from jaxcl.models.pretrained.preprocessing import PREPROCESSING_FILES, parse_image_rule
from jaxcl.models.pretrained.tensor_files import Specs, map_tensors, parse_specs, weight_files
from jaxcl.models.pretrained.two_towers import LOGITS, logit_values, tower_config, tower_tensors

__all__ = ["TENSOR_LIST", "UNUSED_FOLDER", "read_pretrained", "read_towers"]

TENSOR_LIST = "tensors.json"
"""The file that replaces the weights in a run's copy: file -> name -> [type, shape]."""

UNUSED_FOLDER = "unused"
"""The folder in a run's copy with the tensors that are not parameters."""

_CONFIGS = (
    *PREPROCESSING_FILES,
    *("config.json", "modules.json", "config_sentence_transformers.json", *SENTENCE_CONFIGS),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("adapter_config.json", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.txt"),
)
_LARGE_FILES = (
    *("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "README.md"),
    "model.safetensors.index.json",
)
_KEPT_FILES = dict.fromkeys(_CONFIGS, 8 * 2**20) | dict.fromkeys(_LARGE_FILES, 64 * 2**20)
"""Files that a copy keeps of each module's folder -> the largest size allowed, in bytes.

The largest published files, multilingual tokenizers, have about half this size.
"""

_MAX_TOKENS = 10**6
"""Larger values mean no limit: tokenizers without a maximum length write 10^30."""
_STATIC_TABLES = {"embedding.weight": "static_embedding", "embeddings": "model2vec"}
"""Tensor name of the token table -> the family of static embeddings."""
_MODEL2VEC_TOKENS = 512
"""The default maximum length in model2vec."""


def read_pretrained(path: str | os.PathLike[str], *, modality: str = "text") -> PretrainedModel:
    """Read the description of a pretrained encoder from its folder, without loading the weights.

    Args:
      path: a folder of sentence-transformers, a folder that `save_pretrained` of transformers or
        model2vec has written, a run's copy of such a folder, or the id of a model on the Hugging
        Face Hub (`jaxcl.models.pretrained.hub`).
      modality: what the encoder reads, `"text"` or `"image"`. A folder with two towers, such as
        CLIP's, has one encoder for each.

    Raises:
      ValueError: if the folder is damaged, needs an unsupported feature, has no encoder of this
        modality, or could run code; the message begins with the folder's path.
      OSError: if the folder does not exist, or a file cannot be read or downloaded.
    """
    return _read(path, modality)[modality]


def read_towers(path: str | os.PathLike[str]) -> dict[str, PretrainedModel]:
    """Read the descriptions of all encoders in a folder: modality -> encoder.

    Args:
      path: as for `read_pretrained`.

    Raises:
      ValueError, OSError: as for `read_pretrained`.
    """
    return _read(path, None)


def _read(path: str | os.PathLike[str], modality: str | None) -> dict[str, PretrainedModel]:
    root = local_or_hub(path)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; give the folder of a pretrained model")
    try:
        return _describe_towers(root, _read_small_files(root), modality)
    except ValueError as error:
        if str(error).startswith(str(root)):
            raise
        raise ValueError(f"{root}: {error}") from error


def _describe_towers(
    root: AnyPath, files: Mapping[str, bytes], modality: str | None
) -> dict[str, PretrainedModel]:
    modules = parse_modules(files)
    folder = modules.encoder_folder
    if not {"config.json", "modules.json"} & files.keys():
        raise ValueError(
            "it has no config.json or modules.json; give a folder that was saved by "
            "sentence-transformers, transformers or model2vec"
        )
    refuse_foreign_code(files, folder)
    config = parse_json(files, join(folder, "config.json"))
    tensors = _read_tensors(root, modules)
    shapes = _shapes(tensors, folder)
    name = _family_name(config, shapes, static=modules.static)
    towers = TWO_TOWERS.get(name) or {_family(name).modality: name}
    if modality is not None and modality not in towers:
        raise ValueError(
            f"it has an encoder of {next(iter(towers))}s ({name}), but this side has {modality}s; "
            "see data.modality and model.key"
        )
    described = {}
    for one in towers if modality is None else (modality,):
        if name in TWO_TOWERS:
            described[one] = _describe(
                root,
                files,
                modules,
                towers[one],
                tower_config(config, one),
                tower_tensors(tensors, one),
            )
        else:
            own = _single_config(config, name, shapes)
            described[one] = _describe(root, files, modules, name, own, tensors)
    return described


def _single_config(
    config: Mapping[str, Any], name: str, shapes: Mapping[str, list[int]]
) -> Mapping[str, Any]:
    """The config of a folder with one encoder, with the sizes that only the tensors determine."""
    if name in _STATIC_TABLES.values():
        return {**config, "tensors": shapes}
    if name.startswith("clip_") and not any("_projection." in tensor for tensor in shapes):
        return {**config, "projection_dim": None}
    return config


def _describe(
    root: AnyPath,
    files: Mapping[str, bytes],
    modules: Modules,
    name: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Specs],
) -> PretrainedModel:
    folder, family = modules.encoder_folder, _family(name)
    if family.modality == "text" and join(folder, "tokenizer.json") not in files:
        raise ValueError(
            "it has no tokenizer.json; load its tokenizer with transformers' AutoTokenizer and "
            "save it into the folder with save_pretrained"
        )
    if modules.embeds is not None and modules.embeds != family.embeds:
        with_or_without = "without" if modules.embeds else "with"
        raise ValueError(
            f"modules.json lists modules {with_or_without} Pooling for a {name} model; supported "
            f"are {MODULE_ORDERS}"
        )
    _check_layers(config, len(_shapes(tensors, folder)))
    static = name in _STATIC_TABLES.values()
    images = None
    if family.images is not None:
        resize, pixels = family.images(config)
        images = parse_image_rule(files, folder, resize=resize, pixels=pixels)
    return PretrainedModel(
        path=root,
        family=name,
        config=config,
        encoder_folder=folder,
        pooling=modules.pooling,
        dense=modules.dense,
        normalize=modules.normalize or (name == "model2vec" and config.get("normalize") is True),
        prompts=parse_prompts(files),
        similarity=parse_similarity(files),
        special_tokens=not static,
        skip_unknown=name == "model2vec",
        max_tokens=None
        if images is not None
        else _max_tokens(name, files, folder, limit=family.max_tokens(config)),
        vocabulary_size=family.vocabulary_size(config),
        dim=_dim(modules, family.hidden_dim(config)),
        tensors=tensors,
        files=files,
        images=images,
        logits=_read_logits(root, tensors),
    )


def _read_logits(root: AnyPath, tensors: Mapping[str, Specs]) -> dict[str, float]:
    """Read the scalars of the loss, which belong to neither encoder."""
    folder = UNUSED_FOLDER if (root / TENSOR_LIST).exists() else ""
    values: dict[str, float] = {}
    for file, specs in tensors.items():
        if any(name in specs for name in LOGITS):
            values |= logit_values(map_tensors(path_inside(root, join(folder, file))))
    return values


def _read_small_files(root: AnyPath) -> dict[str, bytes]:
    files = _read_folder(root, "")
    if "modules.json" in files:
        for _, folder in list_modules(files["modules.json"]):
            files |= _read_folder(root, folder) if folder else {}
    return files


def _read_folder(root: AnyPath, folder: str) -> dict[str, bytes]:
    directory = path_inside(root, folder)
    present = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    return {
        join(folder, name): read_regular(path_inside(root, join(folder, name)), limit=limit)
        for name, limit in _KEPT_FILES.items()
        if name in present
    }


def _read_tensors(root: AnyPath, modules: Modules) -> dict[str, Specs]:
    """File -> its tensors, for the encoder and the dense layers."""
    listed = path_inside(root, TENSOR_LIST)
    if listed.exists():
        specs = parse_specs(read_sealed_json(listed))
        for file in specs:  # an export writes files with these names
            path_inside(root, file)
        return specs
    tensors: dict[str, Specs] = {}
    for folder in (modules.encoder_folder, *(dense.folder for dense in modules.dense)):
        tensors |= weight_files(root, folder)
    return tensors


def _shapes(tensors: Mapping[str, Specs], folder: str) -> dict[str, list[int]]:
    """The shapes of the tensors in a folder."""
    return {
        name: list(shape)
        for file, specs in tensors.items()
        if lies_in(file, folder)
        for name, (_, shape) in specs.items()
    }


def _family_name(
    config: Mapping[str, Any], shapes: Mapping[str, list[int]], *, static: bool
) -> str:
    model_type = config.get("model_type")
    if static or model_type in (None, "model2vec"):
        for table, family in _STATIC_TABLES.items():
            if table in shapes:
                if len(shapes[table]) != 2:
                    raise ValueError(f"{table} has the shape {shapes[table]}; it must be [v, d]")
                return family
        if static or model_type is not None:
            raise ValueError(f"it has no tensor {' or '.join(_STATIC_TABLES)} with embeddings")
    if not isinstance(model_type, str):
        raise ValueError("its config.json is missing, or has no model_type; restore it")
    return model_type


def _check_layers(config: Mapping[str, Any], num_tensors: int) -> None:
    """Refuse a number of layers that would exhaust the memory before the tensors are checked."""
    for key in ("num_hidden_layers", "n_layers"):
        value = config.get(key)
        if isinstance(value, int) and value > num_tensors:
            raise ValueError(
                f"config.json has {key}={value}, but there are {num_tensors} tensors; restore it"
            )


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise ValueError(
            f"config.json has model_type={name!r:.99}, which is not supported; known are "
            f"{', '.join(FAMILIES)}"
        )
    return FAMILIES[name]


def _max_tokens(
    name: str, files: Mapping[str, bytes], folder: str, *, limit: int | None
) -> int | None:
    """The maximum length of a text that both the folder's limit and the positions allow."""
    of_tokenizer = parse_json(files, join(folder, "tokenizer_config.json")).get("model_max_length")
    if name == "model2vec":
        config = parse_json(files, join(folder, "config.json"))
        length = config.get("max_length", _MODEL2VEC_TOKENS)
    elif name == "static_embedding":
        # Only for this family does sentence-transformers obey the truncation in tokenizer.json.
        truncation = parse_json(files, join(folder, "tokenizer.json")).get("truncation")
        length = truncation.get("max_length") if isinstance(truncation, dict) else None
    else:
        length = parse_sentence_config(files, folder).get("max_seq_length") or of_tokenizer
    if length is not None and (type(length) is not int or length < 1):
        raise ValueError(f"its maximum length is {length!r:.99} tokens; give a positive number")
    return min((n for n in (length, limit) if n is not None and n <= _MAX_TOKENS), default=None)


def _dim(modules: Modules, hidden_dim: int) -> int:
    """The width of the embeddings, after all dense layers."""
    dim = hidden_dim * len(modules.pooling.modes)
    for dense in modules.dense:
        if dense.in_features != dim:
            raise ValueError(
                f"{dense.folder}/config.json has in_features={dense.in_features}, but the layer "
                f"receives {dim} features"
            )
        dim = dense.out_features
    return dim
