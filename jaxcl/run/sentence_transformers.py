"""A trained model as a folder that sentence-transformers loads.

The static encoder becomes a `StaticEmbedding`: its token weights and its projection are folded into
one table, and the mean over tokens differs from the weighted sum by a factor that normalisation
removes.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from jaxcl.data.tokenizer import load_tokenizer
from jaxcl.run.model_files import ModelFiles
from jaxcl.run.opened import OpenedRun
from jaxcl.settings.sections import Settings
from jaxcl.typing import PADDING_ID, Float, PyTree

__all__ = ["sentence_transformers_files"]

# The short names of version 5, which later versions load as well.
_TYPES = "sentence_transformers.models"


def sentence_transformers_files(run: OpenedRun) -> ModelFiles:
    """The files of a run's model for sentence-transformers.

    Raises:
      ValueError: for a model that sentence-transformers has no equivalent of, with the reason.
    """
    settings = run.settings
    if (reason := _no_equivalent(settings)) is not None:
        raise ValueError(
            f"the model of the run in {run.workdir} has no equivalent in sentence-transformers: "
            f"{reason}; export it for jaxcl.load with --format jaxcl"
        )
    return _static_files(run)


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


def _static_files(run: OpenedRun) -> ModelFiles:
    data = run.settings.data
    table = folded_table(run.encoder.params["both"])
    tokenizer = load_tokenizer(run.workdir / "tokenizer.json")
    contents = {
        "modules.json": _modules({"": "StaticEmbedding", "1_Normalize": "Normalize"}),
        "config_sentence_transformers.json": _library_config(run.settings),
        "tokenizer.json": _static_tokenizer(tokenizer, longest=max(data.max_tokens)),
    }
    return ModelFiles(contents, {"model.safetensors": {"embedding.weight": table}})


def folded_table(params: PyTree) -> Float[np.ndarray, "v d"]:
    r"""One vector per token, $e^{a_v}\, W\, T_v$: their sum is a text's embedding before its norm.

    Args:
      params: of a `StaticEncoder` without position weights.

    Returns:
      The table in float32. The row of padding is zero.
    """
    weights = np.exp(np.asarray(params["token_weight"], np.float64))
    table = weights[:, None] * np.asarray(params["table"], np.float64)
    if "projection" in params:
        table = table @ np.asarray(params["projection"]["kernel"], np.float64)
    table[PADDING_ID] = 0
    return table.astype(np.float32)


def _static_tokenizer(tokenizer: Tokenizer, *, longest: int) -> bytes:
    """A `tokenizer.json` that cuts texts and reads the names of special tokens as plain text.

    jaxcl reads "[PAD]" in a text as a bracket and a word. In the file no special token is declared,
    so that this holds wherever it is loaded; those that only the declaration names are kept.
    """
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [
        token
        for token in content["added_tokens"]
        if not token["special"] or token["content"] not in vocabulary
    ]
    content["truncation"] = {
        "direction": "Right",
        "max_length": longest,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    return _json(content, ascii_only=False)


def _modules(types: Mapping[str, str]) -> bytes:
    """`modules.json`: path of a module -> its class, in the order in which they are applied."""
    return _json(
        [
            {"idx": index, "name": str(index), "path": path, "type": f"{_TYPES}.{kind}"}
            for index, (path, kind) in enumerate(types.items())
        ]
    )


def _library_config(settings: Settings) -> bytes:
    """`config_sentence_transformers.json`: the prompts of both sides, and the similarity."""
    prompts = settings.data.prompts
    return _json(
        {
            "model_type": "SentenceTransformer",
            "prompts": {"query": prompts.query or "", "document": prompts.key or ""},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        }
    )


def _json(content: Mapping[str, Any] | Sequence[Any], *, ascii_only: bool = True) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=ascii_only) + "\n").encode()
