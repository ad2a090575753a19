"""Two towers as plain functions: parameters in a dict, one encoder for both sides or one each."""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax
from flax import nnx

from jaxcl.typing import SIDES, Array, Embeddings, Key, PyTree, RowKeys

__all__ = ["Encode", "Towers", "make_towers"]


@runtime_checkable
class Encode(Protocol):
    """`(parameters, side, inputs, a random key per row or None) -> [b, d]` unit vectors.

    `side` is `"query"` or `"key"`; `rngs=None` is the evaluation mode. Pure.
    """

    def __call__(
        self, params: PyTree, side: str, inputs: PyTree, rngs: RowKeys | None = None
    ) -> Embeddings: ...


class Towers(NamedTuple):
    """What an application needs of a model: initial parameters and an encode function."""

    init: Callable[[Key[Array, ""]], PyTree]
    encode: Encode


def make_towers(make_encoder: Callable[[nnx.Rngs], nnx.Module], *, shared: bool) -> Towers:
    """Turns an encoder's constructor into two towers.

    Args:
      make_encoder: builds a module that maps `(inputs, rngs)` to `[b, d]`.
      shared: one set of parameters for queries and keys, or one for each side.

    Returns:
      The towers. Their parameters are a dict of dicts of float32 arrays, under `"both"` or under
      `"query"` and `"key"`.
    """
    # The graph definition holds no numbers, so an abstract initialisation will do.
    graph, _ = nnx.split(nnx.eval_shape(lambda: make_encoder(nnx.Rngs(0))), nnx.Param)

    def init_one(key: Key[Array, ""]) -> PyTree:
        _, params = nnx.split(make_encoder(nnx.Rngs(params=key)), nnx.Param)
        return nnx.to_pure_dict(params)

    def init(key: Key[Array, ""]) -> PyTree:
        if shared:
            return {"both": init_one(key)}
        keys = jax.random.split(key, len(SIDES))
        return {side: init_one(own) for side, own in zip(SIDES, keys, strict=True)}

    def encode(
        params: PyTree, side: str, inputs: PyTree, rngs: RowKeys | None = None
    ) -> Embeddings:
        return nnx.merge(graph, params["both" if shared else side])(inputs, rngs)

    return Towers(init, encode)
