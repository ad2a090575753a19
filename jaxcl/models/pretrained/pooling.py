"""Pool the hidden states of a text into one vector, as sentence-transformers does."""

from collections.abc import Sequence

import jax.numpy as jnp

from jaxcl.models.layers import Hidden, TokenMask
from jaxcl.models.pretrained.modules import POOLING_MODES
from jaxcl.typing import Array, Embeddings, Float, Int

__all__ = ["pool_states", "without_prompt"]


def without_prompt(mask: TokenMask, prompt_length: Int[Array, " b"]) -> TokenMask:
    """The mask of tokens after each text's prompt, for pooling without the prompt."""
    return mask & (jnp.arange(mask.shape[1]) >= prompt_length[:, None])


def pool_states(hidden: Hidden, mask: TokenMask, *, modes: Sequence[str]) -> Embeddings:
    r"""Pool hidden states into one vector per text, and concatenate the vectors of several modes.

    | mode | vector |
    |---|---|
    | `"cls"` | the state of the first token |
    | `"max"` | the largest value of each feature |
    | `"mean"` | $\sum_j h_j / n$ over the $n$ tokens |
    | `"mean_sqrt_len_tokens"` | $\sum_j h_j / \sqrt{n}$ |
    | `"weightedmean"` | $\sum_j j h_j / \sum_j j$, counting positions from $j = 1$ |
    | `"lasttoken"` | the state of the last token |

    Args:
      hidden: the hidden states.
      mask: `True` for the tokens to pool.
      modes: one or more of `POOLING_MODES`.

    Returns:
      The pooled vectors, in at least float32; zeros for a text without tokens.

    Raises:
      ValueError: for an unknown mode.
    """
    places = jnp.arange(mask.shape[1])[None]
    hidden = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
    vectors = [_pooled(hidden, mask, places, mode) for mode in modes]
    return jnp.where(mask.any(1, keepdims=True), jnp.concatenate(vectors, axis=1), 0)


def _pooled(
    hidden: Hidden, mask: TokenMask, places: Int[Array, "1 t"], mode: str
) -> Float[Array, "b h"]:
    if mode == "cls":
        return _state_at(hidden, mask.argmax(1))
    if mode == "lasttoken":
        return _state_at(hidden, jnp.where(mask, places, 0).max(1))
    if mode == "max":
        return jnp.where(mask[..., None], hidden, jnp.finfo(hidden.dtype).min).max(1)
    if mode not in POOLING_MODES:
        raise ValueError(f"pooling={mode!r} is unknown; use one of {', '.join(POOLING_MODES)}")
    weights = mask * (places + 1 if mode == "weightedmean" else 1)
    total = jnp.einsum("bt,bth->bh", weights.astype(hidden.dtype), hidden)
    count = jnp.maximum(weights.sum(1, keepdims=True), 1).astype(hidden.dtype)
    return total / (jnp.sqrt(count) if mode == "mean_sqrt_len_tokens" else count)


def _state_at(hidden: Hidden, positions: Int[Array, " b"]) -> Float[Array, "b h"]:
    return jnp.take_along_axis(hidden, positions[:, None, None], axis=1)[:, 0]
