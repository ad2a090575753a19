"""Read the modules of a sentence-transformers folder from its JSON files, without any imports."""

import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from jaxcl.models.pretrained.containment import join
from jaxcl.models.pretrained.description import Dense, Pooling

__all__ = [
    "MODULE_ORDERS",
    "POOLING_FLAGS",
    "POOLING_MODES",
    "SENTENCE_CONFIGS",
    "Modules",
    "list_modules",
    "parse_json",
    "parse_modules",
    "parse_prompts",
    "parse_sentence_config",
    "parse_similarity",
    "refuse_foreign_code",
]

SENTENCE_CONFIGS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""File names of a Transformer module's config in all versions of sentence-transformers."""

POOLING_FLAGS: Mapping[str, str] = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
"""Pooling mode -> its flag in the configs of sentence-transformers 5. The vectors of several modes
are concatenated in this order."""

POOLING_MODES = tuple(POOLING_FLAGS)
_SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
_MAX_MODULES = 32
_PACKAGE = "sentence_transformers."
MODULE_ORDERS = (
    "Transformer, Pooling, any number of Dense, and an optional Normalize; StaticEmbedding, any "
    "number of Dense, and an optional Normalize; or CLIPModel and an optional Normalize"
)
"""The supported lists of modules."""


class Modules(NamedTuple):
    """The modules of a folder, with their options.

    Attributes:
      static: whether the encoder is a table of embeddings, without a transformer.
      encoder_folder: the folder of the encoder's files; `""` for the model's folder.
      pooling: how to pool the hidden states into one vector.
      dense: the linear layers after pooling.
      normalize: whether the folder asks for unit vectors.
      embeds: whether the encoder needs no pooling, as in CLIP; `None` without `modules.json`.
    """

    static: bool = False
    encoder_folder: str = ""
    pooling: Pooling = Pooling()
    dense: tuple[Dense, ...] = ()
    normalize: bool = False
    embeds: bool | None = None


def parse_json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """Parse the JSON object in one of the files; return an empty one for a missing file.

    Raises:
      ValueError: if the file holds anything else.
    """
    content = _parse(files[name], name) if name in files else {}
    if not isinstance(content, dict):
        raise ValueError(f"{name} is not a JSON object; restore it")
    return content


def list_modules(content: bytes) -> list[tuple[str, str]]:
    """List the class name and the folder of each module in a `modules.json`.

    Raises:
      ValueError: if the file is damaged, or names a class outside of sentence-transformers.
    """
    listed = _parse(content, "modules.json")
    if not isinstance(listed, list) or not 0 < len(listed) <= _MAX_MODULES:
        raise ValueError(f"modules.json is not a list of 1 to {_MAX_MODULES} modules; restore it")
    return [_parse_module(module) for module in listed]


def parse_modules(files: Mapping[str, bytes]) -> Modules:
    """Parse the modules of a folder; without `modules.json`, a transformer with mean pooling.

    Args:
      files: path in the folder -> content.

    Raises:
      ValueError: for an unsupported module, order or option.
    """
    if "modules.json" not in files:
        return Modules()
    modules = list_modules(files["modules.json"])
    (first, encoder_folder), *rest = modules
    static = first == "StaticEmbedding"
    kinds = [kind for kind, _ in rest]
    # Newer versions of the library write a Transformer without Pooling for CLIP.
    embeds = first == "CLIPModel" or (first == "Transformer" and "Pooling" not in kinds)
    normalize = kinds[-1:] == ["Normalize"]
    num_dense = kinds.count("Dense")
    pooled = [] if static or embeds else ["Pooling"]
    wanted = pooled + ["Dense"] * num_dense + ["Normalize"] * normalize
    known = first in ("StaticEmbedding", "Transformer", "CLIPModel")
    if not known or kinds != wanted or (embeds and num_dense):
        names = ", ".join(kind for kind, _ in modules)
        raise ValueError(f"modules.json lists {names}; supported are {MODULE_ORDERS}")
    folders = [encoder_folder, *(folder for kind, folder in rest if kind == "Dense")]
    if len(set(folders)) < len(folders):
        raise ValueError(f"modules.json gives one folder to two modules: {', '.join(folders)}")
    return Modules(
        static,
        encoder_folder,
        _parse_pooling(files, rest[0][1]) if pooled else Pooling(),
        tuple(_parse_dense(files, folder) for folder in folders[1:]),
        normalize,
        embeds,
    )


def parse_prompts(files: Mapping[str, bytes]) -> dict[str, str]:
    """Parse the prompt of each side, `""` for none.

    Queries use the prompt named "query"; keys use the one named "document", "passage" or "corpus".
    A side without its own prompt uses the default prompt, as sentence-transformers' `encode` does,
    unless that is the prompt of the other side.

    Raises:
      ValueError: if a prompt is not a string, or the default prompt does not exist.
    """
    file = "config_sentence_transformers.json"
    config = parse_json(files, file)
    prompts = config.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(
        isinstance(prompt, str | None) for prompt in prompts.values()
    ):
        raise ValueError(f"{file} has the prompts {prompts!r:.99}; give a text for each name")
    default = config.get("default_prompt_name")
    if default is not None and (not isinstance(default, str) or default not in prompts):
        raise ValueError(
            f"{file} has default_prompt_name={default!r:.99}; choose one of {', '.join(prompts)}"
        )

    names = {"query": ("query",), "key": ("document", "passage", "corpus")}
    shared = () if any(default in of_side for of_side in names.values()) else (default,)
    return {
        side: next((prompts[name] or "" for name in (*own, *shared) if name in prompts), "")
        for side, own in names.items()
    }


def parse_similarity(files: Mapping[str, bytes]) -> str:
    """Parse the name of the similarity function, `"cosine"` by default.

    Raises:
      ValueError: for an unknown name.
    """
    file = "config_sentence_transformers.json"
    similarity = parse_json(files, file).get("similarity_fn_name") or "cosine"
    if similarity not in _SIMILARITIES:
        raise ValueError(
            f"{file} has similarity_fn_name={similarity!r:.99}; known are "
            f"{', '.join(_SIMILARITIES)}"
        )
    return similarity


def parse_sentence_config(files: Mapping[str, bytes], folder: str) -> dict[str, Any]:
    """Parse the config of the Transformer module in a folder; empty without a config."""
    names = [join(folder, name) for name in SENTENCE_CONFIGS]
    return next((parse_json(files, name) for name in names if name in files), {})


def refuse_foreign_code(files: Mapping[str, bytes], folder: str) -> None:
    """Raise a `ValueError` for a folder whose embeddings depend on code outside jaxcl.

    A config with `auto_map` is refused even if its `model_type` is known, because the code that it
    names may compute something else from the same tensors.

    Args:
      files: path in the model's folder -> content.
      folder: the encoder's folder.
    """
    for name in (join(folder, "config.json"), join(folder, "tokenizer_config.json")):
        if parse_json(files, name).get("auto_map"):
            raise ValueError(
                f"{name} asks to import code with auto_map, which is not supported; remove "
                "auto_map if transformers' own classes give the same vectors"
            )
    if join(folder, "adapter_config.json") in files:
        raise ValueError(
            "it holds an adapter; merge it into the weights with peft's merge_and_unload and save "
            "the result"
        )
    config = parse_sentence_config(files, folder)
    changed = [key for key in ("config_args", "config_kwargs") if config.get(key)]
    if changed or config.get("transformer_task", "feature-extraction") != "feature-extraction":
        raise ValueError(
            f"{', '.join(changed) or 'transformer_task'} in the config of its Transformer module "
            "is not supported"
        )
    if config.get("do_lower_case") and not _lowercases(
        parse_json(files, join(folder, "tokenizer.json")).get("normalizer")
    ):
        raise ValueError(
            "do_lower_case is true, but tokenizer.json has no Lowercase normalizer; add one there"
        )
    kind = parse_json(files, "config_sentence_transformers.json").get("model_type")
    if kind not in (None, "SentenceTransformer"):
        raise ValueError(f"it holds a {kind!r:.99}; give a model of dense embeddings")


def _lowercases(normalizer: Any) -> bool:
    return isinstance(normalizer, dict) and (
        normalizer.get("type") == "Lowercase"
        or normalizer.get("lowercase") is True
        or any(_lowercases(part) for part in normalizer.get("normalizers") or ())
    )


def _parse(content: bytes, name: str) -> Any:
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is damaged ({error}); restore it") from error


def _parse_module(module: Any) -> tuple[str, str]:
    if not isinstance(module, dict) or not all(
        isinstance(module.get(key), str) for key in ("type", "path")
    ):
        raise ValueError(f"modules.json has the module {module!r:.99}; give its type and path")
    if not module["type"].startswith(_PACKAGE):
        raise ValueError(
            f"modules.json asks to import {module['type']!r:.99}, which could run any code; "
            f"supported are {MODULE_ORDERS} of sentence-transformers"
        )
    # The package of a class differs between versions of the library.
    folder = PurePosixPath(module["path"])
    return module["type"].rpartition(".")[2], "" if folder == PurePosixPath() else str(folder)


def _parse_pooling(files: Mapping[str, bytes], folder: str) -> Pooling:
    name = join(folder, "config.json")
    if name not in files:
        raise ValueError(f"{name}, the pooling config, is missing; download the folder again")
    config = parse_json(files, name)
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for mode, flag in POOLING_FLAGS.items() if config.get(flag)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or not modes or not all(mode in POOLING_MODES for mode in modes):
        raise ValueError(
            f"{name} has pooling_mode={modes!r:.99}; known are {', '.join(POOLING_MODES)}"
        )
    return Pooling(tuple(modes), _flag(config, "include_prompt", name, default=True))


def _parse_dense(files: Mapping[str, bytes], folder: str) -> Dense:
    name = join(folder, "config.json")
    config = parse_json(files, name)
    for key in ("in_features", "out_features"):
        if type(config.get(key)) is not int or config[key] < 1:
            raise ValueError(f"{name} has {key}={config.get(key)!r:.99}; give a width")
    for key in ("module_input_name", "module_output_name"):
        if (config.get(key) or "sentence_embedding") != "sentence_embedding":
            raise ValueError(
                f"{name} has {key}={config[key]!r:.99}; only 'sentence_embedding' is supported"
            )
    return Dense(
        folder,
        config["in_features"],
        config["out_features"],
        _flag(config, "bias", name, default=True),
        _parse_activation(config, name),
        _flag(config, "use_residual", name, default=False),
    )


def _parse_activation(config: Mapping[str, Any], name: str) -> str:
    """Parse the lower-case name of a class of torch.nn, such as `"identity"`."""
    path = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    if not isinstance(path, str) or not path.startswith("torch."):
        raise ValueError(
            f"{name} asks to import activation_function={path!r:.99}, which could run any code; "
            "supported are classes of torch.nn"
        )
    return path.rpartition(".")[2].lower()


def _flag(config: Mapping[str, Any], key: str, name: str, *, default: bool) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"{name} has {key}={value!r:.99}; give true or false")
    return value
