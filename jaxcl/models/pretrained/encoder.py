"""A pretrained encoder as one module: tokens or images in, one vector per row out."""

from typing import Annotated, Any, NamedTuple

from flax import nnx

from jaxcl.models.layers import images_of, token_mask, tokens_of, unit_vectors
from jaxcl.models.pretrained.activations import ACTIVATIONS
from jaxcl.models.pretrained.description import Computation, Dense, Pooling, PretrainedModel
from jaxcl.models.pretrained.families import FAMILIES
from jaxcl.models.pretrained.pooling import pool_states, without_prompt
from jaxcl.models.pretrained.preprocessing import with_image_size
from jaxcl.models.pretrained.static_embedding import StaticEmbedding
from jaxcl.models.vision.entry import PixelRule, enter
from jaxcl.typing import Embeddings, PyTree, Range, RowKeys, check_ranges

__all__ = ["PretrainedEncoder", "PretrainedOptions"]


class PretrainedOptions(NamedTuple):
    """Options of `PretrainedEncoder` in a config."""

    dropout: Annotated[float, Range(least=0, below=1)] | None = None
    remat: bool | None = None
    compute_dtype: str | None = None
    image_size: Annotated[int, Range(least=1)] | None = None
    pooling: str | None = None


class PretrainedEncoder(nnx.Module):
    """Embed texts or images with a pretrained encoder, its pooling and its dense layers.

    The paths of the parameters begin with `encoder`, followed by the path in the family's module,
    or with `dense/0`, `dense/1` and so on.

    Args:
      model: the description of the encoder's folder.
      normalize: scale embeddings to unit norm, as the losses require; otherwise, return the output
        of the last layer unchanged.
      dropout: dropout rate of the embeddings and of the two outputs of each block, with a mask per
        row; `None` for the rate in pretraining. Attention weights have no dropout.
      remat: keep one activation per block for the backward pass, and recompute the others.
      compute_dtype: type of activations, such as `"bfloat16"`; `None` means bfloat16 on
        accelerators and float32 on CPUs. Parameters, pooling and dense layers stay float32.
      image_size: for image encoders, the height and width that the encoder reads; `None` for the
        size in the folder. For any other size, positions are interpolated.
      pooling: for texts, replaces the folder's pooling. For ViT and DINOv2, `"cls"` (the class
        token, the default) or `"mean"` (the mean over the patches).
      rngs: random streams for the initial parameters.

    Raises:
      ValueError: for an unknown family, an unsupported config or layer, layers whose widths do not
        match, or an option out of range.
    """

    def __init__(
        self,
        model: PretrainedModel,
        *,
        normalize: bool = True,
        dropout: float | None = None,
        remat: bool = False,
        compute_dtype: str | None = None,
        image_size: int | None = None,
        pooling: Pooling | str | None = None,
        rngs: nnx.Rngs,
    ):
        check_ranges(PretrainedOptions(dropout, image_size=image_size))
        if model.family not in FAMILIES:
            raise ValueError(
                f"family={model.family!r} is unknown; use one of {', '.join(FAMILIES)}"
            )
        family = FAMILIES[model.family]
        own: dict[str, Any] = {}
        if isinstance(pooling, str):
            if "pooling" not in family.options:
                raise ValueError(
                    f"pooling={pooling!r} has no effect on {model.family} models; leave it out"
                )
            own, pooling = {"pooling": pooling}, None
        computation = Computation(dropout, remat, compute_dtype)
        self.encoder = family.make(model.config, computation, rngs=rngs, **own)
        self.pixels = _pixel_rule(model, image_size)
        self.embeds = family.embeds
        self.modes = (pooling or model.pooling).modes
        _check_dense(family.hidden_dim(model.config) * len(self.modes), model.dense)
        self.dense = nnx.List(
            [
                nnx.Linear(layer.in_features, layer.out_features, use_bias=layer.bias, rngs=rngs)
                for layer in model.dense
            ]
        )
        self.activations = tuple(layer.activation for layer in model.dense)
        self.residuals = tuple(layer.residual for layer in model.dense)
        self.normalize = normalize

    def __call__(self, inputs: PyTree, rngs: RowKeys | None = None) -> Embeddings:
        """Embed texts or images.

        Args:
          inputs: `{"tokens": int32[b, t], "length": int32[b]}`. With `"prompt_length": int32[b]`,
            pooling leaves out the prompt's tokens. `jaxcl.models.layers.token_mask` explains
            `"mask"` and inputs without a length. For images, `{"image": uint8[b, y, x, 3]}`, or
            floats in [0, 1].
          rngs: a random key per row for dropout, or `None` for evaluation.

        Returns:
          One embedding per row, in at least float32; zeros for a text without tokens.
        """
        vectors = self._embed(inputs, rngs)
        layers = zip(self.dense, self.activations, self.residuals, strict=True)
        for layer, activation, residual in layers:
            out = ACTIVATIONS[activation](layer(vectors))
            vectors = out + vectors if residual else out
        return unit_vectors(vectors) if self.normalize else vectors

    def _embed(self, inputs: PyTree, rngs: RowKeys | None) -> Embeddings:
        """One vector per row, before the dense layers."""
        if self.pixels is not None:
            return self.encoder(enter(images_of(inputs, "PretrainedEncoder"), self.pixels), rngs)
        tokens, mask = tokens_of(inputs, "PretrainedEncoder"), token_mask(inputs)
        pooled = mask
        if "prompt_length" in inputs:
            pooled = without_prompt(mask, inputs["prompt_length"])
        if isinstance(self.encoder, StaticEmbedding) and self.modes == ("mean",):
            return self.encoder.mean(tokens, pooled)
        states = self.encoder(tokens, mask, rngs)
        return states if self.embeds else pool_states(states, pooled, modes=self.modes)


def _pixel_rule(model: PretrainedModel, image_size: int | None) -> PixelRule | None:
    if model.images is None:
        if image_size is not None:
            raise ValueError(
                f"image_size={image_size} has no effect on {model.family} models; leave it out"
            )
        return None
    return (
        model.images if image_size is None else with_image_size(model.images, image_size)
    ).pixels


def _check_dense(width: int, dense: tuple[Dense, ...]) -> None:
    for layer in dense:
        if layer.activation not in ACTIVATIONS:
            raise ValueError(
                f"{layer.folder}: the activation {layer.activation!r} is not supported; only "
                f"{', '.join(ACTIVATIONS)} are"
            )
        if layer.in_features != width:
            raise ValueError(f"{layer.folder} reads {layer.in_features} features, but gets {width}")
        if layer.residual and layer.out_features != width:
            raise ValueError(
                f"{layer.folder} adds {width} features to {layer.out_features}; a residual between "
                "different widths is not supported"
            )
        width = layer.out_features
