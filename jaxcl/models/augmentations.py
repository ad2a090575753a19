"""Augmentations: functions of one row's input and a random key, compiled into the train step.

The key is the run's key folded with the step, the side, the row number and the view, so a row is
augmented in the same way on any number of devices, in any chunk of a gradient cache, and after a
restart. The two sides have different keys.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.models.layers import tokens_of
from jaxcl.typing import PADDING_ID, Array, Augment, Int, Key, PyTree, Range, check_ranges

__all__ = ["AUGMENTATIONS", "Augmentation", "span_masking", "token_dropout"]


class Augmentation(NamedTuple):
    """An augmentation that a config may name.

    Attributes:
      function: `(**options) -> ((input of one row, key) -> input of the same shapes)`.
      options: a NamedTuple class of its options, each `None` for the function's own default;
        `None` if nothing is declared.
    """

    function: Callable[..., Augment]
    options: type | None = None


class TokenDropoutOptions(NamedTuple):
    """Options of `token_dropout` in a config."""

    rate: Annotated[float, Range(least=0, below=1)] | None = None
    keep_first: Annotated[int, Range(least=0)] | None = None


class SpanMaskingOptions(NamedTuple):
    """Options of `span_masking` in a config."""

    rate: Annotated[float, Range(least=0, below=1)] | None = None
    keep_first: Annotated[int, Range(least=0)] | None = None
    span_length: Annotated[int, Range(least=1)] | None = None
    mask_id: Annotated[int, Range(least=0)] | None = None


def token_dropout(*, rate: float = 0.4, keep_first: int = 0) -> Augment:
    """Leave out a random share of a text's tokens; the others keep their places.

    Args:
      rate: the probability that a token is left out, in [0, 1).
      keep_first: tokens at the start that are never left out, such as 1 for [CLS].

    Returns:
      The augmentation of `{"tokens": int32[t]}`. A token left out becomes padding, which every
      encoder of `jaxcl.models` ignores.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> drop = token_dropout(rate=0.5, keep_first=1)
      >>> drop({"tokens": jnp.arange(2, 9)}, jax.random.key(0))["tokens"].shape
      (7,)
    """
    return span_masking(rate=rate, keep_first=keep_first, span_length=1)


def span_masking(
    *, rate: float = 0.15, keep_first: int = 0, span_length: int = 3, mask_id: int = PADDING_ID
) -> Augment:
    r"""Mask random spans of a text.

    A span begins at each place, also up to `span_length - 1` places before the text, with the
    probability $p$ for which $1 - (1 - p)^{length}$ is the rate. So each token is masked with
    the same probability, and masked tokens come in runs.

    Args:
      rate: the probability that a token is masked, in [0, 1).
      keep_first: tokens at the start that are never masked, such as 1 for [CLS].
      span_length: tokens of a span; spans may overlap.
      mask_id: the token id that masks, such as that of [MASK]; padding leaves the tokens out.

    Returns:
      The augmentation of `{"tokens": int32[t]}`.

    Raises:
      ValueError: for an option out of range.
    """
    check_ranges(SpanMaskingOptions(rate, keep_first, span_length, mask_id))
    start_rate = 1 - (1 - rate) ** (1 / span_length)

    def augment(inputs: PyTree, key: Key[Array, ""]) -> PyTree:
        tokens: Int[Array, " t"] = tokens_of(inputs, "this augmentation")
        width = tokens.shape[0]
        starts = ~jax.random.bernoulli(key, 1.0 - start_rate, (width + span_length - 1,))
        masked = jnp.zeros(width, bool)
        for offset in range(span_length):
            masked |= starts[offset : offset + width]
        masked &= (tokens != PADDING_ID) & (jnp.arange(width) >= keep_first)
        return {**inputs, "tokens": jnp.where(masked, mask_id, tokens)}

    return augment


AUGMENTATIONS: Mapping[str, Augmentation] = {
    "span_masking": Augmentation(span_masking, SpanMaskingOptions),
    "token_dropout": Augmentation(token_dropout, TokenDropoutOptions),
}
"""Augmentations by `config.augmentation.name`."""
