"""Descriptions of pretrained encoders and of their families, without weights."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
from flax import nnx

from jaxcl.host.paths import AnyPath
from jaxcl.models.vision.entry import PixelRule

__all__ = [
    "PLAIN",
    "Computation",
    "Dense",
    "Family",
    "ImagePreprocessing",
    "Pooling",
    "PretrainedModel",
    "Tensor",
]


A = TypeVar("A", bound=Any)  # a NamedTuple with a field `dropout`


class ImagePreprocessing(NamedTuple):
    """How image files become the pixels that an encoder reads.

    Attributes:
      size: height and width to which images are decoded.
      resize: `"crop"` resizes the shorter side to `size` and crops the centre; `"stretch"` resizes
        both sides to `size`.
      pixels: the fixed part of the encoder, from decoded images to normalised pixels.
    """

    size: int
    resize: str
    pixels: PixelRule


class Pooling(NamedTuple):
    """The pooling of a text's hidden states into one vector.

    Attributes:
      modes: one or more of `"cls"`, `"max"`, `"mean"`, `"mean_sqrt_len_tokens"`, `"weightedmean"`
        and `"lasttoken"`. Their vectors are concatenated in the given order.
      include_prompt: whether pooling includes the prompt's tokens.
    """

    modes: tuple[str, ...] = ("mean",)
    include_prompt: bool = True


class Dense(NamedTuple):
    """A linear layer after pooling.

    Attributes:
      folder: the folder of the layer's files, relative to the model's folder.
      in_features, out_features: widths of the input and the output.
      bias: whether the layer has a bias.
      activation: the activation after the layer, such as `"identity"` or `"tanh"`.
      residual: whether the layer's input is added to the activation's output.
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
      path: the model's folder, or a run's copy of the folder's small files.
      family: one of `jaxcl.models.pretrained.families.FAMILIES`.
      config: the content of the `config.json`. For static embeddings, `"tensors"` adds the shape of
        each tensor.
      encoder_folder: the folder of the encoder's `config.json` and weights, relative to `path`;
        `""` for `path` itself.
      pooling: how to pool the hidden states into one vector.
      dense: the linear layers after pooling.
      normalize: whether the folder asks for unit vectors.
      prompts: side -> the prompt that precedes each text.
      similarity: `"cosine"`, `"dot"`, `"euclidean"` or `"manhattan"`.
      special_tokens: whether texts get the tokenizer's special tokens, such as [CLS] and [SEP].
      skip_unknown: whether unknown tokens are left out.
      max_tokens: the maximum length of a text, including special tokens; `None` for no limit.
      vocabulary_size: rows of the token table.
      dim: width of the embeddings.
      tensors: file, relative to `path` -> name of a tensor -> its type in the file and its shape.
      files: JSON or text file, relative to `path` -> its content, for copies and exports.
      images: for image encoders, how files become pixels; `None` for text encoders.
      logits: for folders with two towers, the initial value of each learned scalar of the loss,
        `"logit_scale"` and, for SigLIP, `"logit_bias"`.
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
    images: ImagePreprocessing | None = None
    logits: Mapping[str, float] = {}

    @property
    def modality(self) -> str:
        """`"image"` or `"text"`."""
        return "text" if self.images is None else "image"


class Tensor(NamedTuple):
    """The tensor of a parameter in a file.

    Attributes:
      name: the tensor's name, without a prefix such as `"bert."`.
      transposed: whether the file holds `[out, in]` for a parameter of shape `[in, out]`. With more
        than two axes, the order of all axes is reversed.
    """

    name: str
    transposed: bool = False


class Computation(NamedTuple):
    """The options of a pretrained encoder's forward and backward pass.

    Attributes:
      dropout: dropout rate of the embeddings and of the two outputs of each block, with a mask per
        row; `None` for the rate in pretraining.
      remat: keep one activation per block for the backward pass, and recompute the others.
      compute_dtype: type of activations, such as `"bfloat16"`; `None` means bfloat16 on
        accelerators and float32 on CPUs. Parameters and the sums in norms and softmax stay float32.
    """

    dropout: float | None = None
    remat: bool = False
    compute_dtype: str | None = None

    def of(self, sizes: A) -> A:
        """Set the dropout rate of an architecture or of its block sizes, unless it is `None`."""
        return sizes if self.dropout is None else sizes._replace(dropout=self.dropout)


PLAIN = Computation()


class Family(NamedTuple):
    """An architecture of pretrained encoders.

    Attributes:
      prefixes: optional prefixes of tensor names, such as `"bert."`.
      make: `(config.json, computation, *, rngs)` -> a module that maps tokens `[b, t]` and their
        mask to hidden states `[b, t, h]`. Raises a `ValueError` for an unsupported config.
      tensors: `config.json` -> path of a parameter in the module, such as
        `"blocks/0/attention/query/kernel"` -> its tensor.
      hidden_dim: `config.json` -> width of the hidden states.
      vocabulary_size: `config.json` -> rows of the token table.
      max_tokens: `config.json` -> the number of tokens that the positions allow; `None` for no
        limit.
      any_width: whether texts may be padded to any width, as in `EncoderPart`.
      embeds: whether the module returns one vector per row instead of hidden states. The inputs are
        then tokens and their mask, or normalised pixels.
      images: for image encoders, `config.json` -> the fields `resize` and `pixels` of
        `ImagePreprocessing`, for folders that do not set them; `None` for text encoders.
      options: names of further options of `make`.
      required_token: `config.json` -> the id of the token whose state is a text's embedding; `None`
        if no token is required.
    """

    prefixes: tuple[str, ...]
    make: Callable[..., nnx.Module]
    tensors: Callable[[Mapping[str, Any]], Mapping[str, Tensor]]
    hidden_dim: Callable[[Mapping[str, Any]], int]
    vocabulary_size: Callable[[Mapping[str, Any]], int]
    max_tokens: Callable[[Mapping[str, Any]], int | None]
    any_width: bool = True
    embeds: bool = False
    images: Callable[[Mapping[str, Any]], tuple[str, PixelRule]] | None = None
    options: tuple[str, ...] = ()
    required_token: Callable[[Mapping[str, Any]], int | None] = lambda config: None

    @property
    def modality(self) -> str:
        """`"image"` or `"text"`."""
        return "text" if self.images is None else "image"
