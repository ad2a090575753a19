"""Two towers as plain functions: parameters in a dict, one encoder for both sides or one each."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx

from jaxcl.typing import SIDES, Array, Augment, Embeddings, Key, PyTree, RowKeys

__all__ = ["Encode", "EncoderPart", "Headed", "TowerSpec", "Towers", "make_towers"]

SHARED = "both"
"""The name of the parameters that both sides share."""


@runtime_checkable
class Encode(Protocol):
    """`(parameters, side, inputs, a random key per row or None) -> [b, d]` unit vectors.

    `side` is `"query"` or `"key"`; `rngs=None` is the evaluation mode. Pure.
    """

    def __call__(
        self, params: PyTree, side: str, inputs: PyTree, rngs: RowKeys | None = None
    ) -> Embeddings: ...


@runtime_checkable
class Headed(Protocol):
    """An encoder with a projection head, which the loss needs and evaluation may leave out."""

    def features(self, inputs: PyTree, rngs: RowKeys | None = None) -> Embeddings:
        """Compute the features below the head, as unit vectors."""


class EncoderPart(NamedTuple):
    """An encoder that a config may name.

    Attributes:
      function: `(first, *, dim, rngs, **options) -> module`, where `first` comes from the modality
        of the side (`jaxcl.data.modalities`): for texts, the size of the vocabulary.
      options: a NamedTuple class of its options, each `None` for the encoder's own default, with
        the range of each number (`jaxcl.typing.Range`); `None` if nothing is declared.
      load: as in `TowerSpec`.
      any_width: whether the encoder reads texts that are padded to any width: embeddings do not
        depend on the padding, and cost less with less padding.
    """

    function: Callable[..., nnx.Module]
    options: type | None = None
    load: Callable[[Path, PyTree], PyTree] | None = None
    any_width: bool = False


class TowerSpec(NamedTuple):
    """One encoder.

    Attributes:
      make: builds a module that maps `(inputs, rngs)` to `[b, d]`.
      load: `(file or folder, abstract parameters) -> the same tree of NumPy arrays`; `None` for an
        encoder that cannot be loaded.
    """

    make: Callable[[nnx.Rngs], nnx.Module]
    load: Callable[[Path, PyTree], PyTree] | None = None


def _no_features(
    params: PyTree, side: str, inputs: PyTree, rngs: RowKeys | None = None
) -> Embeddings:
    raise ValueError("these encoders have no projection head")


class Towers(NamedTuple):
    """A model as functions.

    Attributes:
      init: a random key -> initial parameters: a dict of dicts of float32 arrays, under `"both"`,
        or under `"query"` and `"key"`.
      load: maps a file or folder, or a dict of one for each named tower, to the tree of `init` with
        NumPy arrays, or to the named towers of this tree. Arrays keep the types of the files,
        because a conversion would copy arrays that may be memory-mapped.
      encode: the encode function.
      augment: side -> its augmentation in training.
      features: like `encode`, but returns the features below the projection head; raises a
        `ValueError` for an encoder without a head.
    """

    init: Callable[[Key[Array, ""]], PyTree]
    load: Callable[[Path | Mapping[str, Path]], PyTree]
    encode: Encode
    augment: Mapping[str, Augment] = {}
    features: Encode = _no_features

    def abstract_parameters(self, sharding: jax.sharding.Sharding) -> PyTree:
        """The tree of `init` with a `jax.ShapeDtypeStruct` of this sharding for each array."""
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            jax.eval_shape(self.init, jax.random.key(0)),
        )


def make_towers(
    encoders: Callable[[nnx.Rngs], nnx.Module] | Mapping[str, TowerSpec],
    *,
    shared: bool = True,
    augment: Mapping[str, Augment] | None = None,
) -> Towers:
    """Turn encoders into two towers.

    Args:
      encoders: the constructor of an encoder for both sides; or `{"both": one encoder}`, or
        `"query"` and `"key"` -> an encoder each, which may be of different kinds.
      shared: for a constructor: whether both sides share its parameters.
      augment: side -> a function of one row's input and a random key.

    Raises:
      ValueError: if the names are not `both`, or `query` and `key`.
    """
    if not isinstance(encoders, Mapping):
        spec = TowerSpec(encoders)
        encoders = {SHARED: spec} if shared else dict.fromkeys(SIDES, spec)
    specs: dict[str, TowerSpec] = dict(encoders)
    if set(specs) not in ({SHARED}, set(SIDES)):
        raise ValueError(f"encoders={sorted(specs)}; give {SHARED!r}, or {' and '.join(SIDES)}")
    # A graph definition holds no numbers, so an abstract initialisation is enough.
    graphs, abstract = {}, {}
    for name, spec in specs.items():
        # Random streams must be made where they are traced.
        module = nnx.eval_shape(lambda spec=spec: spec.make(_streams(jax.random.key(0))))
        graphs[name], params = nnx.split(module, nnx.Param)
        abstract[name] = nnx.to_pure_dict(params)

    def init(key: Key[Array, ""]) -> PyTree:
        if SHARED in specs:
            return {SHARED: _init_one(specs[SHARED], key)}
        keys = jax.random.split(key, len(SIDES))
        return {side: _init_one(specs[side], own) for side, own in zip(SIDES, keys, strict=True)}

    def load(source: Path | Mapping[str, Path]) -> PyTree:
        sources = source if isinstance(source, Mapping) else dict.fromkeys(specs, source)
        return {name: _load_one(name, specs, abstract, path) for name, path in sources.items()}

    def module_of(params: PyTree, side: str) -> nnx.Module:
        name = SHARED if SHARED in specs else side
        return nnx.merge(graphs[name], params[name])

    def encode(
        params: PyTree, side: str, inputs: PyTree, rngs: RowKeys | None = None
    ) -> Embeddings:
        return module_of(params, side)(inputs, rngs)

    def features(
        params: PyTree, side: str, inputs: PyTree, rngs: RowKeys | None = None
    ) -> Embeddings:
        module = module_of(params, side)
        if not isinstance(module, Headed):
            raise ValueError(f"{type(module).__name__} has no projection head")
        return module.features(inputs, rngs)

    return Towers(init, load, encode, augment or {}, features)


def _init_one(spec: TowerSpec, key: Key[Array, ""]) -> PyTree:
    _, params = nnx.split(spec.make(_streams(key)), nnx.Param)
    return nnx.to_pure_dict(params)


class _Stream(nnx.RngStream):
    """A stream of keys whose counter is stored without comparing shardings.

    In a traced program, flax's own stream asks the old and the new count for their sharding. A
    traced array has none, and JAX searches all equations so far to explain why, for each parameter.
    """

    def __call__(self) -> Key[Array, ""]:
        """The next key, with the bits of flax's stream."""
        count = self.count[...]
        self.count.set_value(count + 1)
        return jax.random.fold_in(self.key[...], count)


def _streams(key: Key[Array, ""]) -> nnx.Rngs:
    rngs: Any = nnx.Rngs()
    rngs.params = _Stream(key, tag="params")
    return rngs


def _load_one(
    name: str, specs: Mapping[str, TowerSpec], abstract: Mapping[str, PyTree], path: Path
) -> PyTree:
    if name not in specs:
        raise ValueError(f"no encoder is called {name!r}; there are {', '.join(specs)}")
    load = specs[name].load
    if load is None:
        raise ValueError(f"the encoder {name!r} cannot be loaded from {path}")
    params, wanted = load(path, abstract[name]), abstract[name]
    leaves, wanted_leaves = (
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (params, wanted)
    )
    if different := sorted(leaves.keys() ^ wanted_leaves.keys()):
        raise ValueError(f"{path} has other parameters than the encoder: {', '.join(different)}")
    for parameter, leaf in wanted_leaves.items():
        if leaves[parameter].shape != leaf.shape:
            raise ValueError(
                f"{path}: {parameter} has the shape {leaves[parameter].shape}, and the encoder's "
                f"{leaf.shape}"
            )
    return jax.tree.map(np.asarray, params)
