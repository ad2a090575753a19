"""A trained model as a folder that sentence-transformers loads.

The static encoder becomes a `StaticEmbedding`: its token weights and its projection are folded into
one table, and the mean over tokens differs from the weighted sum by a factor that normalisation
removes.
"""

import json
from collections.abc import Mapping

import numpy as np
from tokenizers import Tokenizer

from jaxcl.data.tokenizer import load_pretrained_tokenizer, load_tokenizer
from jaxcl.run.model_files import ModelFiles, as_json, with_dtype
from jaxcl.run.opened import OpenedRun
from jaxcl.settings.sections import Settings
from jaxcl.typing import PADDING_ID, Float, PyTree

__all__ = ["sentence_transformers_files"]

# The short names of version 5, which later versions load as well.
_TYPES = "sentence_transformers.models"


def sentence_transformers_files(run: OpenedRun, dtype: np.dtype | None = None) -> ModelFiles:
    """The files of a run's model for sentence-transformers.

    Args:
      run: which trained the model.
      dtype: of the tensors; `None` for float32.

    Raises:
      ValueError: for a model that sentence-transformers has no equivalent of, with the reason, and
        for a type that cannot hold the parameters.
    """
    settings = run.settings
    if (reason := _no_equivalent(settings)) is not None:
        raise ValueError(
            f"the model of the run in {run.workdir} has no equivalent in sentence-transformers: "
            f"{reason}; export it for jaxcl.load with --format jaxcl"
        )
    return _static_files(run, dtype)


def _no_equivalent(settings: Settings) -> str | None:
    """Why sentence-transformers cannot compute a model's embeddings, or `None` if it can."""
    data, model = settings.data, settings.model
    position_weights = model.options.get("position_weights", True)
    reasons = {
        f"data.modality={data.modality._asdict()} is not text": set(data.modality) != {"text"},
        "its queries and keys have separate encoders (model.shared=False)": not model.shared,
        f"it has no encoder like model.name={model.name!r}": model.name != "static",
        "the static encoder has position weights, unless it is trained with "
        "model.options.position_weights=False": position_weights,
        "data.distinct_tokens=True counts each token of a text once": data.distinct_tokens,
        "data.add_cls=True begins each text with [CLS]": data.add_cls,
        "data.special_tokens=True adds special tokens to each text": bool(data.special_tokens),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def _static_files(run: OpenedRun, dtype: np.dtype | None) -> ModelFiles:
    data = run.settings.data
    table = folded_table(run.encoder.params["both"])
    path = run.workdir / "tokenizer.json"
    if data.special_tokens is None:
        table[PADDING_ID] = 0
        tokenizer = _without_special_tokens(load_tokenizer(path))
    else:
        tokenizer = Tokenizer.from_str(load_pretrained_tokenizer(path).to_str())  # of a cache
    tokenizer.enable_truncation(max(data.max_tokens))
    contents = {
        "modules.json": _modules({"": "StaticEmbedding", "1_Normalize": "Normalize"}),
        "config_sentence_transformers.json": _library_config(run.settings),
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
    }
    tensors = {"model.safetensors": {"embedding.weight": table}}
    return ModelFiles(contents, with_dtype(tensors, dtype))


def folded_table(params: PyTree) -> Float[np.ndarray, "v d"]:
    r"""One vector per token, $e^{a_v}\, W\, T_v$: their sum is a text's embedding before its norm.

    Args:
      params: of a `StaticEncoder` without position weights.

    Returns:
      The table in float32.
    """
    weights = np.exp(np.asarray(params["token_weight"], np.float64))
    table = weights[:, None] * np.asarray(params["table"], np.float64)
    if "projection" in params:
        table = table @ np.asarray(params["projection"]["kernel"], np.float64)
    return table.astype(np.float32)


def _without_special_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """A copy for which the names of special tokens are plain text, wherever it is loaded.

    jaxcl reads "[PAD]" in a text as a word in brackets, by a setting that files do not keep. The
    tokens stay in the vocabulary; a token that is only declared as special stays special.
    """
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [
        token
        for token in content["added_tokens"]
        if not token["special"] or token["content"] not in vocabulary
    ]
    return Tokenizer.from_str(json.dumps(content))


def _modules(types: Mapping[str, str]) -> bytes:
    """`modules.json`: path of a module -> its class, in the order in which they are applied."""
    return as_json(
        [
            {"idx": index, "name": str(index), "path": path, "type": f"{_TYPES}.{kind}"}
            for index, (path, kind) in enumerate(types.items())
        ]
    )


def _library_config(settings: Settings) -> bytes:
    """`config_sentence_transformers.json`: the prompts of both sides, and the similarity."""
    prompts = settings.data.prompts
    return as_json(
        {
            "model_type": "SentenceTransformer",
            "prompts": {"query": prompts.query or "", "document": prompts.key or ""},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        }
    )
