"""Tiny pretrained encoders with random weights, as sentence-transformers would write them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from jaxcl.host.files import write_sealed_json
from jaxcl.models.pretrained.families import FAMILIES
from jaxcl.models.pretrained.folder import TENSOR_LIST
from jaxcl.models.pretrained.tensor_files import specs_as_json

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = ("query", "key", ":", "file", "read", *map(str, range(30)))
"""All words in the rows of `tests.prepared_data`, and a few more."""

DIM, HEADS, MLP_DIM, MAX_TOKENS = 16, 2, 32, 24

DECODER = {
    "hidden_size": DIM,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": MLP_DIM,
    "max_position_embeddings": MAX_TOKENS,
}
QWEN3 = DECODER | {"model_type": "qwen3", "rope_theta": 1_000_000}
"""As Qwen3-Embedding: the state of the last token, which the tokenizer adds."""
EMBEDDING_GEMMA = DECODER | {
    "model_type": "gemma3_text",
    "query_pre_attn_scalar": 12,
    "sliding_window": 8,
    "sliding_window_pattern": 2,
    "use_bidirectional_attention": True,
}
"""As EmbeddingGemma: bidirectional attention; it has mean pooling and two dense layers."""


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


def write_tiny_decoder(
    folder: Path,
    config: Mapping[str, Any] = QWEN3,
    *,
    seed: int = 0,
    pooling: str = "lasttoken",
    dense: tuple[tuple[int, int], ...] = (),
    template: str = "$A [SEP]",
    library: Mapping[str, Any] | None = None,
) -> Path:
    """Write a decoder, and return its folder.

    Args:
      folder: where; made if it is not there.
      config: the content of config.json, without the size of the vocabulary.
      seed: of the weights.
      pooling: the mode of its pooling.
      dense: widths of the input and output of each Dense module.
      template: the text with its special tokens.
      library: the content of config_sentence_transformers.json.
    """
    vocabulary = [*SPECIAL_TOKENS, *WORDS]
    config = {**config, "vocab_size": len(vocabulary), "pad_token_id": 0}
    modules = {"": "Transformer", "1_Pooling": "Pooling"}
    modules |= {f"{n}_Dense": "Dense" for n in range(2, 2 + len(dense))}
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": config["hidden_size"],
            "pooling_mode_mean_tokens": False,  # sentence-transformers' default is true
            f"pooling_mode_{pooling}": True,
        },
    )
    _write_modules(folder, modules, True, library)
    _write_tokenizer(folder, vocabulary, template)
    # Without this file, transformers may build another tokenizer, from the type of the model.
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": MAX_TOKENS,
            "pad_token": "[PAD]",
            "padding_side": "left",
        },
    )
    rng = np.random.default_rng(seed)
    _write_tensors(folder, decoder_tensors(config, rng))
    identity = "torch.nn.modules.linear.Identity"
    for number, (inputs, outputs) in enumerate(dense, start=2):
        widths = {"in_features": inputs, "out_features": outputs, "bias": False}
        _write_json(
            folder / f"{number}_Dense" / "config.json", widths | {"activation_function": identity}
        )
        kernel = rng.normal(scale=0.3, size=(outputs, inputs)).astype(np.float32)
        _write_tensors(folder / f"{number}_Dense", {"linear.weight": kernel})
    return folder


def decoder_tensors(config: Mapping[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The tensors of a decoder by name."""
    tensors = {}
    for name, shape in decoder_shapes(config).items():
        centre = name.endswith("norm.weight") and config["model_type"] != "gemma3_text"
        tensors[name] = (0.2 * rng.normal(size=shape) + centre).astype(np.float32)
    return tensors


def decoder_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of a decoder's tensors by name."""
    family = FAMILIES[config["model_type"]]
    module = nnx.eval_shape(lambda: family.make(config, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    return {
        tensor.name: shapes[path][::-1] if tensor.transposed else shapes[path]
        for path, tensor in family.tensors(config).items()
    }


def write_copy_of_decoder(folder: Path, config: Mapping[str, Any]) -> Path:
    """Write a run's copy of a decoder of any size; the copy has no weights."""
    stored = np.dtype(ml_dtypes.bfloat16)
    specs = {name: (stored, shape) for name, shape in decoder_shapes(config).items()}
    _write_json(folder / "config.json", config)
    _write_tokenizer(folder, [*SPECIAL_TOKENS, *WORDS], "$A [SEP]")
    write_sealed_json(folder / TENSOR_LIST, specs_as_json({"model.safetensors": specs}))
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


def _write_tokenizer(folder: Path, vocabulary: list[str], template: str = "[CLS] $A [SEP]") -> None:
    ids = {word: number for number, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    # Many published files have both; neither may affect a run's texts.
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding(length=MAX_TOKENS)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
