"""Write a trained model as a folder that sentence-transformers loads.

A fine-tuned encoder is written with the layout of its original folder, and the trained weights
(`jaxcl.run.pretrained_folder`), and so are the two towers of a CLIP (`jaxcl.run.clip_folder`). A
static encoder becomes a `StaticEmbedding`, with one table that combines its embeddings, token
weights and projection. The mean over tokens then differs from the weighted sum only by a factor,
which normalisation removes.
"""

import json

import numpy as np
from tokenizers import Tokenizer

from jaxcl.data.modalities import text_rule
from jaxcl.data.text_rule import unknown_id
from jaxcl.data.tokenizer import load_pretrained_tokenizer, load_tokenizer
from jaxcl.host.paths import AnyPath
from jaxcl.run.clip_folder import clip_files, towers_by_modality, why_not_clip
from jaxcl.run.model_files import ModelFiles, with_dtype
from jaxcl.run.opened import OpenedRun
from jaxcl.run.pretrained_folder import library_config, module_list, pretrained_files
from jaxcl.settings.sections import Settings
from jaxcl.typing import PADDING_ID, SIDES, Float, PyTree

__all__ = ["check_equivalent", "sentence_transformers_files", "why_no_equivalent"]


def sentence_transformers_files(run: OpenedRun, dtype: np.dtype | None = None) -> ModelFiles:
    """Collect the files of a run's model for sentence-transformers.

    Args:
      run: the run that trained the model.
      dtype: type of the tensors; `None` for float32, or for the types in a pretrained model's files
        if they can hold the trained values.

    Raises:
      ValueError: for a model without an equivalent in sentence-transformers, with the reason, or a
        type that cannot hold the parameters.
    """
    run = run.merged()
    settings = run.settings
    check_equivalent(settings, run.workdir)
    if sides := towers_by_modality(settings):
        return clip_files(settings, sides, run.encoder.params, dtype=dtype)
    pretrained = settings.parts.pretrained.get("model")
    if pretrained is None:
        return _static_files(run, dtype)
    return pretrained_files(pretrained, settings.data, run.encoder.params["both"], dtype=dtype)


def check_equivalent(settings: Settings, workdir: AnyPath) -> None:
    """Raise a `ValueError` if sentence-transformers cannot compute a model's embeddings."""
    if (reason := why_no_equivalent(settings)) is not None:
        raise ValueError(
            f"the model of the run in {workdir} has no equivalent in sentence-transformers: "
            f"{reason}; export it for jaxcl.load with --format jaxcl"
        )


def why_no_equivalent(settings: Settings) -> str | None:
    """The reason why sentence-transformers cannot compute a model's embeddings, or `None`."""
    sides = towers_by_modality(settings)
    return why_not_clip(settings, sides) if sides else _no_equivalent(settings)


def _no_equivalent(settings: Settings) -> str | None:
    data, model = settings.data, settings.model
    reasons = {
        f"data.modality={data.modality._asdict()} is not text": set(data.modality) != {"text"},
        "its queries and keys have separate encoders (model.shared=False)": not model.shared,
    }
    pretrained = settings.parts.pretrained.get("model")
    if pretrained is not None:
        folded = pretrained.family == "model2vec" and bool(pretrained.dense)
        excluded = any(text_rule(data, side).excludes_prompt for side in SIDES)
        reasons |= {
            "dense layers follow its model2vec embeddings": folded,
            f"data.special_tokens={data.special_tokens} differs from its {pretrained.family} "
            "folder": data.special_tokens != pretrained.special_tokens,
            f"data.skip_unknown={data.skip_unknown} differs from its {pretrained.family} "
            "folder": data.skip_unknown != pretrained.skip_unknown,
            "data.exclude_prompt=True leaves prompts out of the mean of static embeddings": excluded
            and pretrained.family in ("model2vec", "static_embedding"),
        }
    else:
        weighted = model.options.get("position_weights", True)
        reasons |= {
            f"it has no encoder like model.name={model.name!r}": model.name != "static",
            "the static encoder has position weights, unless it is trained with "
            "model.options.position_weights=False": weighted,
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
        # A copy, because the loaded tokenizer is cached.
        tokenizer = Tokenizer.from_str(load_pretrained_tokenizer(path).to_str())
    if data.skip_unknown and (unknown := unknown_id(tokenizer)) is not None:
        table[unknown] = 0
    tokenizer.enable_truncation(max(data.max_tokens))
    contents = {
        "modules.json": module_list([("StaticEmbedding", ""), ("Normalize", "1_Normalize")]),
        "config_sentence_transformers.json": library_config(data),
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
    }
    tensors = {"model.safetensors": {"embedding.weight": table}}
    return ModelFiles(contents, with_dtype(tensors, dtype))


def folded_table(params: PyTree) -> Float[np.ndarray, "v d"]:
    r"""Fold the parameters into one vector per token, $e^{a_v}\, W\, T_v$, to sum over each text.

    Args:
      params: parameters of a `StaticEncoder` without position weights.

    Returns:
      The table in float32.
    """
    weights = np.exp(np.asarray(params["token_weight"], np.float64))
    table = weights[:, None] * np.asarray(params["table"], np.float64)
    if "projection" in params:
        table = table @ np.asarray(params["projection"]["kernel"], np.float64)
    return table.astype(np.float32)


def _without_special_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """Copy a tokenizer so that it reads the names of special tokens in a text as plain text.

    jaxcl reads "[PAD]" in a text as a word in brackets, by a setting that `tokenizer.json` does not
    store. Here the tokens are no longer marked as special, but they stay in the vocabulary. Tokens
    outside the vocabulary stay special.
    """
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [
        token
        for token in content["added_tokens"]
        if not token["special"] or token["content"] not in vocabulary
    ]
    return Tokenizer.from_str(json.dumps(content))
