"""Activation functions by their names in the configs of pretrained encoders."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import jax
from jax import lax

from jaxcl.models.layers import saving_slope
from jaxcl.typing import Array, Float

__all__ = ["ACTIVATIONS"]

Activation: TypeAlias = Callable[[Float[Array, "*b h"]], Float[Array, "*b h"]]


@saving_slope
def _gelu(values: Float[Array, "*b h"]) -> Float[Array, "*b h"]:
    # `jax.nn.gelu` uses erfc, which costs more, and is more exact only where gelu is near 0.
    return 0.5 * values * (1 + lax.erf(values * math.sqrt(0.5)))


@saving_slope
def _quick_gelu(values: Float[Array, "*b h"]) -> Float[Array, "*b h"]:
    return values * jax.nn.sigmoid(1.702 * values)


_gelu_tanh = saving_slope(functools.partial(jax.nn.gelu, approximate=True))
_silu = saving_slope(jax.nn.silu)

ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": _gelu,
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": _gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "identity": lambda values: values,
    "leaky_relu": jax.nn.leaky_relu,
    "linear": lambda values: values,
    "mish": saving_slope(jax.nn.mish),
    "quick_gelu": _quick_gelu,
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "silu": _silu,
    "swish": _silu,
    "tanh": jax.numpy.tanh,
}
"""The name in a `config.json`, or the lower-case name of a PyTorch class -> the function."""
