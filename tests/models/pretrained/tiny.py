"""Tiny pretrained encoders with random weights, as sentence-transformers would write them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = ("query", "key", ":", "file", "read", *map(str, range(30)))
"""All words in the rows of `tests.prepared_data`, and a few more."""

DIM, HEADS, MLP_DIM, MAX_TOKENS = 16, 2, 32, 24


def write_tiny_bert(
    folder: Path,
    *,
    seed: int = 0,
    dim: int = DIM,
    num_layers: int = 1,
    words: tuple[str, ...] = WORDS,
    normalize: bool = True,
    pooling: Mapping[str, Any] | None = None,
    library: Mapping[str, Any] | None = None,
) -> Path:
    """Write a BERT, and return its folder.

    Args:
      folder: the folder, created if necessary.
      seed: the seed of the weights.
      dim: the width of the hidden states.
      num_layers: the number of blocks.
      words: the vocabulary after the special tokens.
      normalize: whether to add a Normalize module.
      pooling: further keys of the config of its Pooling.
      library: the content of config_sentence_transformers.json.
    """
    vocabulary = [*SPECIAL_TOKENS, *words]
    config = {
        "model_type": "bert",
        "hidden_size": dim,
        "num_hidden_layers": num_layers,
        "num_attention_heads": HEADS,
        "intermediate_size": MLP_DIM,
        "max_position_embeddings": MAX_TOKENS,
        "vocab_size": len(vocabulary),
        "hidden_dropout_prob": 0.1,
    }
    pooling = {"word_embedding_dimension": dim, "pooling_mode_mean_tokens": True, **(pooling or {})}
    _write_json(folder / "config.json", config)
    _write_json(folder / "1_Pooling" / "config.json", pooling)
    _write_modules(folder, {"": "Transformer", "1_Pooling": "Pooling"}, normalize, library)
    _write_tokenizer(folder, vocabulary)
    _write_tensors(folder, bert_tensors(dim, num_layers, len(vocabulary), seed))
    return folder


def write_tiny_static(
    folder: Path,
    *,
    seed: int = 0,
    normalize: bool = True,
    library: Mapping[str, Any] | None = None,
) -> Path:
    """Write a table of static embeddings, which is quick to compile, and return its folder."""
    vocabulary = [*SPECIAL_TOKENS, *WORDS]
    _write_modules(folder, {"": "StaticEmbedding"}, normalize, library)
    _write_tokenizer(folder, vocabulary)
    table = np.random.default_rng(seed).normal(size=(len(vocabulary), DIM))
    _write_tensors(folder, {"embedding.weight": table.astype(np.float32)})
    return folder


def bert_tensors(
    dim: int, num_layers: int, vocabulary_size: int, seed: int
) -> dict[str, np.ndarray]:
    """The tensors of a BERT by name, including a pooler that jaxcl does not use."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}

    def add(name: str, *shape: int) -> None:
        tensors[name] = rng.normal(scale=0.2, size=shape).astype(np.float32)

    def add_linear(name: str, outputs: int, inputs: int) -> None:
        add(f"{name}.weight", outputs, inputs)
        add(f"{name}.bias", outputs)

    def add_norm(name: str) -> None:
        tensors[f"{name}.weight"] = rng.uniform(0.5, 1.5, dim).astype(np.float32)
        add(f"{name}.bias", dim)

    for name, rows in {"word": vocabulary_size, "position": MAX_TOKENS, "token_type": 2}.items():
        add(f"embeddings.{name}_embeddings.weight", rows, dim)
    add_norm("embeddings.LayerNorm")
    for layer in (f"encoder.layer.{number}" for number in range(num_layers)):
        for name in ("query", "key", "value"):
            add_linear(f"{layer}.attention.self.{name}", dim, dim)
        add_linear(f"{layer}.attention.output.dense", dim, dim)
        add_norm(f"{layer}.attention.output.LayerNorm")
        add_linear(f"{layer}.intermediate.dense", MLP_DIM, dim)
        add_linear(f"{layer}.output.dense", dim, MLP_DIM)
        add_norm(f"{layer}.output.LayerNorm")
    add_linear("pooler.dense", dim, dim)
    return tensors


def _write_modules(
    folder: Path, modules: dict[str, str], normalize: bool, library: Mapping[str, Any] | None
) -> None:
    if normalize:
        modules = modules | {f"{len(modules)}_Normalize": "Normalize"}
    listed = [
        {"idx": idx, "name": str(idx), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for idx, (path, kind) in enumerate(modules.items())
    ]
    _write_json(folder / "modules.json", listed)
    if library is not None:
        _write_json(folder / "config_sentence_transformers.json", library)


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _write_tensors(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _write_tokenizer(folder: Path, vocabulary: list[str]) -> None:
    ids = {word: number for number, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    # Many published files have both; neither may affect a run's texts.
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding(length=MAX_TOKENS)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
