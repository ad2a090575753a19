"""A tiny BERT with random weights, as a folder that sentence-transformers would write."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = ("query", "key", ":", "file", "read", *map(str, range(30)))
"""All words of the rows of `tests.prepared_data`, and a few more."""
DIM, HEADS, MLP_DIM, MAX_TOKENS = 16, 2, 32, 24


def write_tiny_bert(
    folder: Path,
    *,
    seed: int = 0,
    dim: int = DIM,
    num_layers: int = 1,
    words: tuple[str, ...] = WORDS,
    normalize: bool = True,
    sentence_transformers: dict[str, Any] | None = None,
    pooling: dict[str, Any] | None = None,
) -> Path:
    """Write the folder, and return it.

    Args:
      folder: where; made if it is not there.
      seed: of the weights.
      dim: the width of the hidden states.
      num_layers: how many blocks there are.
      words: the vocabulary after the special tokens.
      normalize: whether it has a Normalize module.
      sentence_transformers: the content of config_sentence_transformers.json.
      pooling: further keys of the pooling's config.json.
    """
    vocabulary = [*SPECIAL_TOKENS, *words]
    modules = {"": "Transformer", "1_Pooling": "Pooling"}
    if normalize:
        modules["2_Normalize"] = "Normalize"
    content = {
        "config.json": {
            "model_type": "bert",
            "hidden_size": dim,
            "num_hidden_layers": num_layers,
            "num_attention_heads": HEADS,
            "intermediate_size": MLP_DIM,
            "max_position_embeddings": MAX_TOKENS,
            "vocab_size": len(vocabulary),
            "type_vocab_size": 2,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.1,
            "pad_token_id": 0,
        },
        "modules.json": [
            {
                "idx": number,
                "name": str(number),
                "path": path,
                "type": f"sentence_transformers.{one}",
            }
            for number, (path, one) in enumerate(modules.items())
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": dim,
            "pooling_mode_mean_tokens": True,
            **(pooling or {}),
        },
        "sentence_bert_config.json": {"max_seq_length": MAX_TOKENS, "do_lower_case": False},
    }
    if sentence_transformers is not None:
        content["config_sentence_transformers.json"] = sentence_transformers
    for name, value in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    (folder / "tokenizer.json").write_text(_tokenizer(vocabulary).to_str())
    tensors = random_tensors(dim, num_layers, len(vocabulary), seed)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def random_tensors(
    dim: int, num_layers: int, vocabulary_size: int, seed: int
) -> dict[str, np.ndarray]:
    """The tensors of the model by name, a pooler that jaxcl does not use among them."""
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


def _tokenizer(vocabulary: list[str]) -> Tokenizer:
    ids = {word: number for number, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    # As in many released files; neither may reach the texts.
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    return tokenizer
