"""What the files of a pretrained encoder say, and what a family of encoders declares."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from jaxcl.host.paths import AnyPath

__all__ = ["Dense", "Family", "Pooling", "PretrainedModel", "Tensor"]


class Pooling(NamedTuple):
    """From the states of tokens to one vector.

    Attributes:
      modes: one or several of `"cls"`, `"max"`, `"mean"`, `"mean_sqrt_len_tokens"`,
        `"weightedmean"` and `"lasttoken"`, whose vectors are concatenated in this order.
      include_prompt: whether the tokens of the prompt take part.
    """

    modes: tuple[str, ...] = ("mean",)
    include_prompt: bool = True


class Dense(NamedTuple):
    """A linear layer after pooling.

    Attributes:
      folder: where its files lie, relative to the model's folder.
      in_features, out_features: its widths.
      bias: whether it has one.
      activation: what follows, such as `"identity"` or `"tanh"`.
      residual: whether its input is added after the activation.
    """

    folder: str
    in_features: int
    out_features: int
    bias: bool = True
    activation: str = "tanh"
    residual: bool = False


class PretrainedModel(NamedTuple):
    """A pretrained encoder without its weights.

    Attributes:
      path: its folder, or a run's copy of the folder's small files.
      family: one of `jaxcl.models.pretrained.families.FAMILIES`.
      config: the content of its `config.json`; for static embeddings also, under `"tensors"`, the
        shape of each tensor.
      encoder_folder: where the encoder's `config.json` and weights lie in `path`; `""` for `path`.
      pooling: one vector from the states of a text's tokens.
      dense: layers after that.
      normalize: whether the folder asks for unit vectors.
      prompts: side -> the text that is put before each text of this side.
      similarity: `"cosine"`, `"dot"`, `"euclidean"` or `"manhattan"`.
      special_tokens: whether texts get the tokenizer's special tokens, such as [CLS] and [SEP].
      skip_unknown: whether unknown tokens are left out.
      max_tokens: the longest text, special tokens included; `None` without a limit.
      vocabulary_size: rows of the token table.
      dim: width of the embeddings.
      tensors: file, relative to `path` -> name of a tensor -> its type in the file and its shape.
      files: JSON and text files, relative to `path` -> their content. They are kept and exported.
    """

    path: AnyPath
    family: str
    config: Mapping[str, Any]
    encoder_folder: str
    pooling: Pooling
    dense: tuple[Dense, ...]
    normalize: bool
    prompts: Mapping[str, str]
    similarity: str
    special_tokens: bool
    skip_unknown: bool
    max_tokens: int | None
    vocabulary_size: int
    dim: int
    tensors: Mapping[str, Mapping[str, tuple[np.dtype, tuple[int, ...]]]]
    files: Mapping[str, bytes]


class Tensor(NamedTuple):
    """Where a parameter lies in a file.

    Attributes:
      name: the tensor's name, without a prefix such as `"bert."`.
      transposed: whether the file holds `[out, in]`, and the parameter is `[in, out]`.
    """

    name: str
    transposed: bool = False


class Family(NamedTuple):
    """One architecture of pretrained encoders.

    Attributes:
      prefixes: what the names of tensors may begin with, such as `"bert."`.
      make: `(config.json, *, rngs, dropout, remat, compute_dtype)` -> a module that maps tokens
        `[b, t]` and their mask to hidden states `[b, t, h]`. Raises a `ValueError` for a config
        that it does not support.
      tensors: `config.json` -> path of a parameter in the module, such as
        `"blocks/0/attention/query/kernel"` -> its tensor.
      hidden_dim: `config.json` -> width of the hidden states.
      vocabulary_size: `config.json` -> rows of the token table.
      max_tokens: `config.json` -> the longest text that the positions allow; `None` for any.
    """

    prefixes: tuple[str, ...]
    make: Callable[..., nnx.Module]
    tensors: Callable[[Mapping[str, Any]], Mapping[str, Tensor]]
    hidden_dim: Callable[[Mapping[str, Any]], int]
    vocabulary_size: Callable[[Mapping[str, Any]], int]
    max_tokens: Callable[[Mapping[str, Any]], int | None]
