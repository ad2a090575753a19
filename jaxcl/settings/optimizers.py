"""The optimizers that a config names, with their options."""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import jax.numpy as jnp
import optax

from jaxcl.models.options import option_class
from jaxcl.models.trainable import is_stacked, is_table, map_paths
from jaxcl.settings.parts import Part
from jaxcl.typing import Array, NotNegative, Positive, PyTree, Range, Rate, Size

__all__ = ["OPTIMIZERS"]

_OPTIONS: Mapping[str, Any] = {
    "adam_b1": Rate,
    "adam_b2": Rate,
    "b1": Rate,
    "b2": Rate,
    "b3": Rate,
    "beta": Rate,
    "clipping_threshold": Annotated[float, Range(least=1)],
    "consistent_rms": Positive,
    "decay": Rate,
    "decay_rate": Annotated[float, Range(above=0, below=1)],
    "eps": NotNegative,
    "eps_root": NotNegative,
    "initial_accumulator_value": NotNegative,
    "min_dim_size_to_factor": Size,
    "momentum": Rate,
    "mu_dtype": str,
    "multiply_by_parameter_scale": bool,
    "nesterov": bool,
    "ns_steps": Size,
}
"""The type and range of each option, the same for all optimizers that have it."""


def _optimizer(
    function: Callable[..., optax.GradientTransformation], options: Sequence[str]
) -> Part:
    return Part(function, option_class({name: _OPTIONS[name] for name in options}))


def _adafactor(**options: Any) -> optax.GradientTransformation:
    return optax.chain(optax.adafactor(**options), optax.scale(-1.0))


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


_ADAM_OPTIONS = ("b1", "b2", "eps", "eps_root", "mu_dtype", "nesterov")
_ADAFACTOR_OPTIONS = (
    "min_dim_size_to_factor",
    "decay_rate",
    "multiply_by_parameter_scale",
    "clipping_threshold",
    "momentum",
)
_MUON_OPTIONS = (
    *("beta", "ns_steps", "eps", "nesterov", "mu_dtype"),
    *("consistent_rms", "adam_b1", "adam_b2"),
)

OPTIMIZERS: Mapping[str, Part] = {
    "adam": _optimizer(optax.scale_by_adam, _ADAM_OPTIONS),
    "adamw": _optimizer(optax.scale_by_adam, _ADAM_OPTIONS),
    "adafactor": _optimizer(_adafactor, _ADAFACTOR_OPTIONS),
    "adagrad": _optimizer(optax.scale_by_rss, ("initial_accumulator_value", "eps")),
    "adan": _optimizer(optax.scale_by_adan, ("b1", "b2", "b3", "eps", "eps_root")),
    "lion": _optimizer(optax.scale_by_lion, ("b1", "b2", "mu_dtype")),
    "muon": _optimizer(_muon, _MUON_OPTIONS),
    "radam": _optimizer(optax.scale_by_radam, ("b1", "b2", "eps", "eps_root", "nesterov")),
    "rmsprop": _optimizer(optax.scale_by_rms, ("decay", "eps")),
    "sgd": _optimizer(_sgd, ("decay", "nesterov")),
}
"""Gradient transformations by `config.optimizer.name`; clipping, weight decay and the learning rate
are added around them. Since weight decay is decoupled for all of them, `"adam"` and `"adamw"` are
the same."""
