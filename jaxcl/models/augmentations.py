"""Augmentations: functions of one row's input and a random key, compiled into the train step.

The key is the run's key folded with the step, the side, the row number and the view, so a row is
augmented in the same way on any number of devices, in any chunk of a gradient cache, and after a
restart. The two sides have different keys.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.models.image_augmentations import clip, moco_v2, random_view, simclr
from jaxcl.models.layers import token_mask, tokens_of
from jaxcl.models.options import options_of
from jaxcl.typing import (
    PADDING_ID,
    Array,
    Augment,
    Count,
    Int,
    Key,
    PyTree,
    Rate,
    Size,
    check_arguments,
)

__all__ = [
    "AUGMENTATIONS",
    "KEEP_SPECIAL_TOKENS",
    "Augmentation",
    "span_masking",
    "token_dropout",
]

KEEP_SPECIAL_TOKENS: Mapping[str, int] = {"keep_first": 1, "keep_last": 1}
"""Options that keep the [CLS] and [SEP] of each text."""


class Augmentation(NamedTuple):
    """An augmentation that a config may name.

    Attributes:
      function: `(**options) -> ((input of one row, key) -> input)`, an `Augment`.
      options: a NamedTuple class of its options, each `None` for the function's own default;
        `None` if nothing is declared.
    """

    function: Callable[..., Augment]
    options: type | None = None


@check_arguments
def token_dropout(*, rate: Rate = 0.4, keep_first: Count = 0, keep_last: Count = 0) -> Augment:
    """Drop a random fraction of a text's tokens; the others keep their positions.

    Args:
      rate: the probability that a token is dropped, in [0, 1).
      keep_first, keep_last: number of tokens that are always kept at each end of a text, such as 1
        for [CLS] and 1 for [SEP].

    Returns:
      The augmentation of `{"tokens": int32[t]}`. A dropped token becomes padding, which every
      encoder of `jaxcl.models` ignores. Inputs with a `"length"` keep their tokens, and get a
      `"mask": bool[t]` that is `False` for dropped tokens.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> drop = token_dropout(rate=0.5, keep_first=1)
      >>> drop({"tokens": jnp.arange(2, 9)}, jax.random.key(0))["tokens"].shape
      (7,)
    """
    return span_masking(rate=rate, keep_first=keep_first, keep_last=keep_last, span_length=1)


@check_arguments
def span_masking(
    *,
    rate: Rate = 0.15,
    keep_first: Count = 0,
    keep_last: Count = 0,
    span_length: Size = 3,
    mask_id: Count | None = None,
) -> Augment:
    r"""Mask random spans of a text.

    A span begins at each position, including `span_length - 1` positions before the text, with the
    probability $p$ for which $1 - (1 - p)^{length}$ is the rate. Each token is therefore masked
    with the same probability, and masked tokens come in runs.

    Args:
      rate: the probability that a token is masked, in [0, 1).
      keep_first, keep_last: number of tokens that are always kept at each end of a text, such as 1
        for [CLS] and 1 for [SEP].
      span_length: length of a span, in tokens; spans may overlap.
      mask_id: id of the token that replaces masked tokens, such as [MASK]; `None` leaves the tokens
        out, as `token_dropout` does.

    Returns:
      The augmentation of `{"tokens": int32[t]}`.

    Raises:
      ValueError: for an option out of range.
    """
    start_rate = 1 - (1 - rate) ** (1 / span_length)

    def augment(inputs: PyTree, key: Key[Array, ""]) -> PyTree:
        tokens: Int[Array, " t"] = tokens_of(inputs, "this augmentation")
        present = token_mask(inputs)
        width = tokens.shape[0]
        starts = ~jax.random.bernoulli(key, 1.0 - start_rate, (width + span_length - 1,))
        masked = jnp.zeros(width, bool)
        for offset in range(span_length):
            masked |= starts[offset : offset + width]
        positions = jnp.arange(width)
        end = jnp.where(present, positions + 1, 0).max()
        masked &= present & (positions >= keep_first) & (positions < end - keep_last)
        if mask_id is None and "length" in inputs:
            return {**inputs, "mask": present & ~masked}
        mask = PADDING_ID if mask_id is None else mask_id
        return {**inputs, "tokens": jnp.where(masked, mask, tokens)}

    return augment


AUGMENTATIONS: Mapping[str, Augmentation] = {
    "clip": Augmentation(clip, options_of(clip)),
    "moco_v2": Augmentation(moco_v2, options_of(random_view)),
    "simclr": Augmentation(simclr, options_of(random_view)),
    "span_masking": Augmentation(span_masking, options_of(span_masking)),
    "token_dropout": Augmentation(token_dropout, options_of(token_dropout)),
}
"""Augmentations by `config.augmentation.name`."""
