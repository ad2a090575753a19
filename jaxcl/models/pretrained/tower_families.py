"""Families of image and text towers, which return one vector per row."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from jaxcl.models.pretrained.description import PLAIN, Computation, Family
from jaxcl.models.pretrained.image_tower import ImageArchitecture, ImageNames, ImageTower
from jaxcl.models.pretrained.tensor_names import family_of
from jaxcl.models.pretrained.text_tower import TextArchitecture, TextNames, TextTower
from jaxcl.models.vision.entry import PixelRule

__all__ = ["IMAGE_POOLINGS", "image_family", "text_family"]

IMAGE_POOLINGS = ("cls", "mean")
"""The class token, or the mean over the patches."""


def image_family(
    prefixes: tuple[str, ...],
    architecture: Callable[[Mapping[str, Any]], ImageArchitecture],
    names: ImageNames,
    *,
    pixels: PixelRule,
    resize: str = "crop",
    options: tuple[str, ...] = (),
) -> Family:
    """A family of vision transformers.

    Args:
      prefixes: optional prefixes of tensor names.
      architecture: `config.json` -> the architecture. Raises a `ValueError` for an unsupported
        config.
      names: the names of the tensors.
      pixels: mean, standard deviation, kept share and interpolation, for folders without
        `preprocessor_config.json`.
      resize: `"crop"` or `"stretch"`, for such folders too.
      options: names of further options of `make`.
    """

    def make(
        config: Mapping[str, Any],
        computation: Computation = PLAIN,
        *,
        pooling: str | None = None,
        rngs: nnx.Rngs,
    ) -> nnx.Module:
        a = architecture(config)
        if pooling is not None:
            if pooling not in IMAGE_POOLINGS:
                raise ValueError(
                    f"pooling={pooling!r} is unknown; use one of {', '.join(IMAGE_POOLINGS)}"
                )
            a = a._replace(pooling=pooling)
        return ImageTower(a, computation, rngs=rngs)

    return Family(
        prefixes=prefixes,
        make=make,
        tensors=lambda config: names.tensors(architecture(config)),
        hidden_dim=lambda config: architecture(config).dim,
        vocabulary_size=lambda config: 0,
        max_tokens=lambda config: None,
        any_width=False,
        embeds=True,
        images=lambda config: (resize, pixels._replace(size=architecture(config).image_size)),
        options=options,
    )


def text_family(
    prefixes: tuple[str, ...],
    architecture: Callable[[Mapping[str, Any]], TextArchitecture],
    names: TextNames,
    *,
    any_width: bool = True,
) -> Family:
    """A family of text towers; the arguments are as for `image_family` and `Family`."""

    family = family_of(prefixes, architecture, TextTower, names.tensors)
    return family._replace(
        hidden_dim=lambda config: architecture(config).dim,
        any_width=any_width,
        embeds=True,
        required_token=lambda config: architecture(config).required_token,
    )
