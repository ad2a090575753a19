"""The optimizers that a config names, with their options."""

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp
import optax

from jaxcl.models.trainable import is_stacked, is_table, map_paths
from jaxcl.settings.parts import Part
from jaxcl.typing import Array, PyTree, Range

__all__ = ["OPTIMIZERS"]

_Size = Annotated[int, Range(least=1)]
_Rate = Annotated[float, Range(least=0, below=1)]
_NotNegative = Annotated[float, Range(least=0)]
_Positive = Annotated[float, Range(above=0)]


class AdafactorOptions(NamedTuple):
    """Options of `optax.adafactor`."""

    min_dim_size_to_factor: _Size | None = None
    decay_rate: Annotated[float, Range(above=0, below=1)] | None = None
    multiply_by_parameter_scale: bool | None = None
    clipping_threshold: Annotated[float, Range(least=1)] | None = None
    momentum: _Rate | None = None


class AdagradOptions(NamedTuple):
    """Options of `optax.scale_by_rss`."""

    initial_accumulator_value: _NotNegative | None = None
    eps: _NotNegative | None = None


class AdamOptions(NamedTuple):
    """Options of `optax.scale_by_adam`."""

    b1: _Rate | None = None
    b2: _Rate | None = None
    eps: _NotNegative | None = None
    eps_root: _NotNegative | None = None
    mu_dtype: str | None = None
    nesterov: bool | None = None


class AdanOptions(NamedTuple):
    """Options of `optax.scale_by_adan`."""

    b1: _Rate | None = None
    b2: _Rate | None = None
    b3: _Rate | None = None
    eps: _NotNegative | None = None
    eps_root: _NotNegative | None = None


class LionOptions(NamedTuple):
    """Options of `optax.scale_by_lion`."""

    b1: _Rate | None = None
    b2: _Rate | None = None
    mu_dtype: str | None = None


class MuonOptions(NamedTuple):
    """Options of `optax.contrib.muon`."""

    beta: _Rate | None = None
    ns_steps: _Size | None = None
    eps: _NotNegative | None = None
    nesterov: bool | None = None
    mu_dtype: str | None = None
    consistent_rms: _Positive | None = None
    adam_b1: _Rate | None = None
    adam_b2: _Rate | None = None


class RadamOptions(NamedTuple):
    """Options of `optax.scale_by_radam`."""

    b1: _Rate | None = None
    b2: _Rate | None = None
    eps: _NotNegative | None = None
    eps_root: _NotNegative | None = None
    nesterov: bool | None = None


class RmspropOptions(NamedTuple):
    """Options of `optax.scale_by_rms`."""

    decay: _Rate | None = None
    eps: _NotNegative | None = None


class SgdOptions(NamedTuple):
    """Options of stochastic gradient descent: the decay of its momentum."""

    decay: _Rate | None = None
    nesterov: bool | None = None


def _adafactor(
    *,
    min_dim_size_to_factor: int = 128,
    decay_rate: float = 0.8,
    multiply_by_parameter_scale: bool = True,
    clipping_threshold: float = 1.0,
    momentum: float | None = None,
) -> optax.GradientTransformation:
    negative = optax.adafactor(
        min_dim_size_to_factor=min_dim_size_to_factor,
        decay_rate=decay_rate,
        multiply_by_parameter_scale=multiply_by_parameter_scale,
        clipping_threshold=clipping_threshold,
        momentum=momentum,
    )
    return optax.chain(negative, optax.scale(-1.0))


def _muon(**options: Any) -> optax.GradientTransformation:
    """Muon for the matrices inside the encoders; Adam for embedding tables, vectors and scalars."""
    negative = optax.contrib.muon(1.0, muon_weight_dimension_numbers=_muon_dimensions, **options)
    return optax.chain(negative, optax.scale(-1.0))


def _muon_dimensions(params: PyTree) -> PyTree:
    def of_leaf(path: str, leaf: Array) -> optax.contrib.MuonDimensionNumbers | None:
        stacked = is_stacked(path)
        if jnp.ndim(leaf) - stacked != 2 or is_table(path):
            return None
        return optax.contrib.MuonDimensionNumbers(stacked, 1 + stacked)

    return map_paths(of_leaf, params)


def _sgd(decay: float = 0.9, nesterov: bool = False) -> optax.GradientTransformation:
    return optax.trace(decay, nesterov)


OPTIMIZERS: Mapping[str, Part] = {
    "adam": Part(optax.scale_by_adam, AdamOptions),
    "adamw": Part(optax.scale_by_adam, AdamOptions),
    "adafactor": Part(_adafactor, AdafactorOptions),
    "adagrad": Part(optax.scale_by_rss, AdagradOptions),
    "adan": Part(optax.scale_by_adan, AdanOptions),
    "lion": Part(optax.scale_by_lion, LionOptions),
    "muon": Part(_muon, MuonOptions),
    "radam": Part(optax.scale_by_radam, RadamOptions),
    "rmsprop": Part(optax.scale_by_rms, RmspropOptions),
    "sgd": Part(_sgd, SgdOptions),
}
"""Gradient transformations by `config.optimizer.name`; clipping, weight decay and the learning rate
are added around them. Since weight decay is decoupled for all of them, `"adam"` and `"adamw"` are
the same."""
