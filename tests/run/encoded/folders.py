"""Tiny sentence-transformers folders, written without sentence-transformers and without jaxcl."""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

HERE = Path(__file__).parent
BERT = HERE.parents[1] / "models" / "pretrained" / "reference" / "bert"
WORDS = ["parse", "the", "iso", "date", "of", "a", "message", "and", "open", "socket"]
WORDS += ["query", ":", "task"]
TEXTS = [
    "parse the ISO date",
    "",
    "open a socket and parse a message",
    "unknown words",
    " ".join(["date of the message"] * 9),
    "a",
]
FOLDERS = ("mean", "prompts", "dense", "static")
"""The folders that `write_folder` can write."""

_TYPE = "sentence_transformers.models."


def write_folder(name, folder):
    """Write one of `FOLDERS` into an empty folder."""
    rng = np.random.default_rng(0)
    tokenizer = _tokenizer(static=name == "static")
    tokenizer.save(str(folder / "tokenizer.json"))
    modules = [("", "StaticEmbedding" if name == "static" else "Transformer")]
    if name == "static":
        table = rng.normal(size=(60, 16)).astype(np.float32)
        save_file({"embedding.weight": table}, folder / "model.safetensors")
    else:
        for file in ("config.json", "model.safetensors"):
            shutil.copy(BERT / file, folder)
        _write(folder, "sentence_bert_config.json", {"max_seq_length": 12})
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"}
        settings |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
        _write(folder, "tokenizer_config.json", settings)
        modes = ["cls", "mean"] if name == "prompts" else ["mean"]
        pooling = {"embedding_dimension": 16, "pooling_mode": modes}
        pooling["include_prompt"] = name != "prompts"
        _write(folder, "1_Pooling/config.json", pooling)
        modules.append(("1_Pooling", "Pooling"))
    if name == "dense":
        sizes = {"in_features": 16, "out_features": 8, "bias": True}
        _write(folder, "2_Dense/config.json", sizes)
        tensors = {"linear.weight": rng.normal(size=(8, 16)), "linear.bias": rng.normal(size=8)}
        tensors = {key: value.astype(np.float32) for key, value in tensors.items()}
        save_file(tensors, folder / "2_Dense" / "model.safetensors", metadata={"format": "pt"})
        modules.append(("2_Dense", "Dense"))
    if name in ("mean", "static"):
        modules.append((f"{len(modules)}_Normalize", "Normalize"))
    kinds = [
        {"idx": number, "name": str(number), "path": path, "type": _TYPE + kind}
        for number, (path, kind) in enumerate(modules)
    ]
    _write(folder, "modules.json", kinds)
    if name == "prompts":
        prompts = {"query": "query : ", "document": "", "task": "task : open "}
        config = {"prompts": prompts, "similarity_fn_name": "dot"}
        _write(folder, "config_sentence_transformers.json", config)
    return folder


def _tokenizer(*, static):
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = {word: number for number, word in enumerate([*specials, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.add_special_tokens(specials)
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    if not static:  # a decoy: this is not the model's limit
        tokenizer.enable_truncation(7)
        tokenizer.enable_padding(length=7)
    return tokenizer


def _write(folder, name, content):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
