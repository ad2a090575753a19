"""The similarities that a model gives to pairs of texts."""

import numpy as np

from jaxcl.data.scored_pairs import ScoredPairs
from jaxcl.evaluation.protocol import Encode
from jaxcl.typing import Float

__all__ = ["pair_similarities"]


def pair_similarities(pairs: ScoredPairs, encode: Encode) -> Float[np.ndarray, " n"]:
    """Compute the inner product of the embeddings of each pair.

    Args:
      pairs: the pairs, each text on its side.
      encode: embeds the texts.

    Returns:
      Similarities in float32, summed in float64, so that equal pairs have equal similarities.

    Raises:
      ValueError: if an embedding is not finite.
    """
    first_side, second_side = pairs.sides
    if first_side == second_side:
        # A text that is on both sides is embedded once.
        vectors = encode(first_side, [*pairs.first, *pairs.second])
        first, second = vectors[: len(pairs.first)], vectors[len(pairs.first) :]
    else:
        first, second = encode(first_side, pairs.first), encode(second_side, pairs.second)
    similarities = np.einsum("nd,nd->n", first, second, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(similarities))
    if bad.size:
        raise ValueError(
            f"{bad.size} of {len(similarities)} pairs have a similarity that is not finite, first "
            f"pair {bad[0] + 1}; look for NaN in the model's parameters"
        )
    return similarities.astype(np.float32)
