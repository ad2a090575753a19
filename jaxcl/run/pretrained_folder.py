"""Write a fine-tuned encoder with the layout of its original folder, and the trained weights.

Modules have the names of sentence-transformers 5, which later versions also read.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from jaxcl.data.text_rule import special_tokens_around, unknown_id
from jaxcl.models.pretrained.containment import join, lies_in
from jaxcl.models.pretrained.description import PretrainedModel
from jaxcl.models.pretrained.families import DECODERS
from jaxcl.models.pretrained.modules import (
    POOLING_FLAGS,
    SENTENCE_CONFIGS,
    list_modules,
    parse_json,
)
from jaxcl.models.pretrained.weights import FileTensors, export_tensors
from jaxcl.run.model_files import ModelFiles, as_json, with_dtype
from jaxcl.settings.data_sections import DataSettings
from jaxcl.typing import PyTree

__all__ = [
    "LIBRARY_CONFIG",
    "library_config",
    "module_list",
    "pretrained_files",
    "tokenizer_config",
    "with_stored_type",
]

_TYPES = "sentence_transformers.models"
_DENSE_FIELDS = ("in_features", "out_features", "bias", "activation_function")
LIBRARY_CONFIG = "config_sentence_transformers.json"


def pretrained_files(
    model: PretrainedModel, data: DataSettings, params: PyTree, *, dtype: np.dtype | None = None
) -> ModelFiles:
    """Collect the files of a fine-tuned encoder for sentence-transformers.

    Tensors without a trained parameter, such as those of a pooler, are copied unchanged. The model
    in the folder normalises its vectors, as in training, and truncates texts of both sides to the
    larger limit.

    Args:
      model: the pretrained model.
      data: the data settings of the run, with the prompt and the largest length of each side.
      params: the trained parameters of the encoder.
      dtype: type of the tensors; `None` for the original types if they can hold the new values.
    """
    tensors = export_tensors(model, params)
    if model.family == "model2vec":
        tensors = _folded(model, tensors)
    tensors = with_dtype(tensors, dtype)
    modules = _modules_of(model)
    contents = {
        name: content
        for name, content in model.files.items()
        if name.rpartition("/")[2] not in ("README.md", *SENTENCE_CONFIGS)
    }
    if model.family == "model2vec":
        # transformers does not know its model_type.
        contents.pop(join(model.encoder_folder, "config.json"), None)
    contents |= {
        "modules.json": module_list(modules),
        LIBRARY_CONFIG: library_config(data, parse_json(model.files, LIBRARY_CONFIG)),
    }
    for kind, folder in modules:
        config = join(folder, "config.json")
        if kind == "Transformer":
            contents |= _encoder_files(model, tensors, longest=max(data.max_tokens))
        elif kind == "Pooling":
            contents[config] = _pooling_config(model, include_prompt=not data.exclude_prompt)
        elif kind == "Dense":
            contents[config] = _dense_config(parse_json(model.files, config))
        elif kind == "StaticEmbedding":
            name = join(folder, "tokenizer.json")
            tokenizer = Tokenizer.from_str(model.files[name].decode())
            tokenizer.enable_truncation(max(data.max_tokens))
            contents[name] = tokenizer.to_str(pretty=True).encode()
    return ModelFiles(contents, tensors)


def library_config(data: DataSettings, before: Mapping[str, Any] | None = None) -> bytes:
    """Write `config_sentence_transformers.json` with the run's prompts and cosine similarity.

    Args:
      data: the data settings of the run.
      before: the config of the pretrained model, whose other prompts are kept.
    """
    before = before or {}
    prompts = (before.get("prompts") or {}) | {
        "query": data.prompts.query or "",
        "document": data.prompts.key or "",
    }
    return as_json(
        {
            "model_type": "SentenceTransformer",
            "prompts": prompts,
            "default_prompt_name": before.get("default_prompt_name"),
            "similarity_fn_name": "cosine",
        }
    )


def module_list(modules: Sequence[tuple[str, str]]) -> bytes:
    """Write `modules.json` with the class and folder of each module, in order."""
    return as_json(
        [
            {"idx": index, "name": str(index), "path": folder, "type": f"{_TYPES}.{kind}"}
            for index, (kind, folder) in enumerate(modules)
        ]
    )


def _modules_of(model: PretrainedModel) -> list[tuple[str, str]]:
    """The classes and folders of the model's modules, with `Normalize` as the last one."""
    if "modules.json" in model.files:
        modules = list_modules(model.files["modules.json"])
    elif model.family in ("model2vec", "static_embedding"):
        modules = [("StaticEmbedding", "")]
    else:
        modules = [("Transformer", ""), ("Pooling", "1_Pooling")]
    normalized = modules[-1][0] == "Normalize"
    return modules if normalized else [*modules, ("Normalize", f"{len(modules)}_Normalize")]


def _folded(model: PretrainedModel, tensors: FileTensors) -> FileTensors:
    """Fold the tensors of a model2vec model into the table of a `StaticEmbedding`.

    model2vec leaves unknown tokens out of the mean, but sentence-transformers does not. Their row
    is set to zero, so that only the norm of the mean differs.
    """
    ((file, named),) = tensors.items()
    table = named["embeddings"].astype(np.float32)
    if "weights" in named:
        table *= named["weights"].astype(np.float32)[:, None]
    tokenizer = Tokenizer.from_str(
        model.files[join(model.encoder_folder, "tokenizer.json")].decode()
    )
    if (unknown := unknown_id(tokenizer)) is not None:
        table[unknown] = 0
    return {file: {"embedding.weight": table}}


def _encoder_files(
    model: PretrainedModel, tensors: FileTensors, *, longest: int
) -> dict[str, bytes]:
    """The files of the Transformer module that differ from the original."""
    folder = model.encoder_folder
    config, of_tokenizer = (join(folder, name) for name in ("config.json", "tokenizer_config.json"))
    length = {"max_seq_length": longest, "do_lower_case": False}
    files = {
        join(folder, "sentence_bert_config.json"): as_json(length),
        config: with_stored_type(model, config, tensors),
    }
    if of_tokenizer not in model.files:
        # Without this file, transformers may build a tokenizer that differs from tokenizer.json.
        files[of_tokenizer] = tokenizer_config(model, longest=longest)
    elif model.family in DECODERS and not _names_padding(model):
        original = parse_json(model.files, of_tokenizer)
        files[of_tokenizer] = as_json({**original, "pad_token": _padding_token(model)})
    return files


def _names_padding(model: PretrainedModel) -> bool:
    files = (
        join(model.encoder_folder, f"{name}.json")
        for name in ("tokenizer_config", "special_tokens_map")
    )
    return any(parse_json(model.files, file).get("pad_token") for file in files)


def with_stored_type(model: PretrainedModel, name: str, tensors: FileTensors) -> bytes:
    """Write `config.json` with the type of the tensors, with which transformers loads them."""
    content = parse_json(model.files, name)
    stored = [
        tensor.dtype
        for file, named in tensors.items()
        if lies_in(file, model.encoder_folder)
        for tensor in named.values()
        if jnp.issubdtype(tensor.dtype, np.floating)
    ]
    widest = np.result_type(*stored).name
    changed = {
        key: widest
        for key in ("dtype", "torch_dtype")
        if content.get(key) is not None and content[key] != widest
    }
    return as_json({**content, **changed}) if changed else model.files[name]


def tokenizer_config(model: PretrainedModel, *, longest: int) -> bytes:
    """Write the `tokenizer_config.json` of a folder that has none."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": longest,
    }
    tokenizer = _tokenizer(model)
    # If the last token had no name, sentence-transformers would exclude it with the prompt.
    before, after = special_tokens_around(tokenizer)
    named = {"cls_token": before[:1], "sep_token": after[-1:]}
    config |= {name: tokenizer.id_to_token(ids[0]) for name, ids in named.items() if ids}
    token = _padding_token(model)
    return as_json(config | ({"pad_token": token} if token else {}))


def _padding_token(model: PretrainedModel) -> str | None:
    """The token that pads texts in a batch; in a decoder without one, the token that ends texts.

    sentence-transformers needs the name of a token. The choice of token does not change vectors.
    """
    content = model.files[join(model.encoder_folder, "tokenizer.json")].decode()
    padding = Tokenizer.from_str(content).padding or {}
    tokenizer = _tokenizer(model)
    numbers = [model.config.get("pad_token_id")]
    if model.family in DECODERS:
        ends = model.config.get("eos_token_id")
        before, after = special_tokens_around(tokenizer)
        numbers += [*(ends if isinstance(ends, list) else [ends]), *after[::-1], *before, 0]
    tokens = (tokenizer.id_to_token(n) for n in numbers if type(n) is int and n >= 0)
    return padding.get("pad_token") or next(filter(None, tokens), None)


def _tokenizer(model: PretrainedModel) -> Tokenizer:
    """The tokenizer, without padding and truncation."""
    content = model.files[join(model.encoder_folder, "tokenizer.json")].decode()
    tokenizer = Tokenizer.from_str(content)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _pooling_config(model: PretrainedModel, *, include_prompt: bool) -> bytes:
    modes = model.pooling.modes
    width = (model.dense[0].in_features if model.dense else model.dim) // len(modes)
    if [mode for mode in POOLING_FLAGS if mode in modes] != list(modes):
        # Flags cannot express this order; only later versions read `pooling_mode`.
        return as_json(
            {
                "embedding_dimension": width,
                "pooling_mode": list(modes),
                "include_prompt": include_prompt,
            }
        )
    flags = {flag: mode in modes for mode, flag in POOLING_FLAGS.items()}
    return as_json({"word_embedding_dimension": width, **flags, "include_prompt": include_prompt})


def _dense_config(config: Mapping[str, Any]) -> bytes:
    """The config of a Dense module, without the fields that version 5 does not know."""
    residual = {"use_residual": True} if config.get("use_residual") else {}
    return as_json({name: config[name] for name in _DENSE_FIELDS if name in config} | residual)
