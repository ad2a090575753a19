r"""Low-rank adapters (LoRA): small trained matrices next to frozen linear layers.

A linear layer with an adapter computes

$$y = x W + b + \frac{\alpha}{r}\, (x A)\, B$$

with a frozen kernel $W$ `[in, out]` and trained matrices $A$ `[in, r]` and $B$ `[r, out]` of a
small rank $r$. $B$ starts at zero, so the first step has the outputs of the frozen model. Training
never computes the product $A B$ or the gradient of $W$; an export adds $\frac{\alpha}{r} A B$ to
the kernel.

Adapters are added to any flax module with `nnx.Linear` layers. A layer keeps the paths of its
kernel and bias, and its adapter is stored next to them as `lora_a` and `lora_b`.
"""

import fnmatch
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxcl.models.trainable import matching_paths
from jaxcl.typing import Array, Float, PyTree, Range

__all__ = [
    "BASE_DTYPES",
    "Lora",
    "LoraLinear",
    "add_adapters",
    "cast_base",
    "frozen_base",
    "has_adapters",
    "merge_adapters",
    "with_base",
    "without_adapters",
]

BASE_DTYPES = ("float32", "bfloat16", "float16")
"""The types in which the frozen kernels can be stored."""

_A, _B = "lora_a", "lora_b"
_LARGE = ("kernel", "table", "token_table")


class Lora(NamedTuple):
    r"""The size and the layers of adapters; `config.model.lora`.

    Attributes:
      rank: the rank $r$ of each adapter; `None` for no adapters.
      alpha: the scale $\alpha$ of all adapters. With a fixed alpha, the learning rate need not
        change with the rank.
      targets: patterns of the paths of linear layers in the encoder, such as
        `"*/attention/query"`; `*` also stands for `/`.
      also_train: patterns of the paths of other parameters that are trained, such as `"*/dense/*"`.
      base_dtype: type in which frozen kernels and token tables are stored, such as `"bfloat16"`;
        `None` for float32. All other parameters are stored in float32.

    Reference:
      Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
    """

    rank: Annotated[int, Range(least=1)] | None = None
    alpha: Annotated[float, Range(above=0)] = 32.0
    targets: tuple[str, ...] = ("*blocks/*",)
    also_train: tuple[str, ...] = ()
    base_dtype: str | None = None


class LoraLinear(nnx.Linear):
    r"""A linear layer with an adapter.

    Args:
      linear: the layer whose parameters and types to take over. A stack of layers, whose kernels
        have leading axes, gets a stack of adapters.
      rank: the rank of the adapter.
      alpha: the scale of the adapter.
      rngs: random streams for the initial $A$, uniform between $\pm 1 / \sqrt{in}$.
    """

    def __init__(self, linear: nnx.Linear, *, rank: int, alpha: float, rngs: nnx.Rngs):
        for name, value in vars(linear).items():
            if not name.startswith("_"):  # internal to flax
                setattr(self, name, value)
        *stack, inputs, outputs = linear.kernel.shape
        bound = 1 / math.sqrt(inputs)
        initial = jax.random.uniform(
            rngs.params(), (*stack, inputs, rank), jnp.float32, minval=-bound, maxval=bound
        )
        self.lora_a = nnx.Param(initial)
        self.lora_b = nnx.Param(jnp.zeros((*stack, rank, outputs), jnp.float32))
        self.scale = alpha / rank

    def __call__(
        self, inputs: Float[Array, "*b i"], out_sharding: Any = None
    ) -> Float[Array, "*b o"]:
        """Apply the layer and its adapter."""
        outputs = super().__call__(inputs, out_sharding)
        adapter = (inputs.reshape(-1, inputs.shape[-1]), self.lora_a[...], self.lora_b[...])
        rows, a, b = (one.astype(outputs.dtype) for one in adapter)
        low = self.scale * jnp.matmul(rows, a, precision=self.precision)
        return outputs + jnp.matmul(low, b, precision=self.precision).reshape(outputs.shape)


def add_adapters(module: nnx.Module, lora: Lora, *, rngs: nnx.Rngs) -> nnx.Module:
    """Add adapters to the linear layers of a module that `lora.targets` match.

    Args:
      module: an encoder, which is changed.
      lora: the options of the adapters; the rank must be set.
      rngs: random streams for the initial adapters.

    Returns:
      The same module.

    Raises:
      ValueError: for an encoder without linear layers, and for a pattern that matches no layer; the
        message lists the layers.
    """
    if lora.rank is None:
        raise ValueError("model.lora.rank=None; set the rank of the adapters")
    modules: dict[tuple, Any] = dict(nnx.iter_modules(module))
    layers = {
        "/".join(map(str, path)): path
        for path, one in modules.items()
        if isinstance(one, nnx.Linear) and path
    }
    targets = _targets(lora.targets, list(layers))
    for name, path in layers.items():
        if name not in targets:
            continue
        parent, last = modules[path[:-1]], path[-1]
        adapted = LoraLinear(modules[path], rank=lora.rank, alpha=lora.alpha, rngs=rngs)
        if isinstance(last, int):
            parent[last] = adapted
        else:
            setattr(parent, last, adapted)
    return module


def _targets(patterns: Sequence[str], layers: Sequence[str]) -> set[str]:
    if not layers:
        raise ValueError(
            "model.lora.rank is set, but the encoder has no linear layers, which adapters need; "
            "leave it None. To train only a part of the encoder, use optimizer.freeze"
        )
    targets: set[str] = set()
    for pattern in patterns:
        matched = {path for path in layers if fnmatch.fnmatchcase(path, pattern)}
        if not matched:
            kinds = dict.fromkeys(re.sub(r"\b\d+\b", "*", path) for path in layers)
            default = ", its default" if pattern in Lora().targets else ""
            raise ValueError(
                f"model.lora.targets has {pattern!r}{default}, which matches no linear layer of "
                f"the encoder; name some of its layers: {', '.join(kinds)}"
            )
        targets |= matched
    return targets


def frozen_base(lora: Lora, paths: Sequence[str]) -> set[str]:
    """The paths of the parameters that adapters leave frozen.

    These are all parameters of the encoders, except adapters and the matches of `lora.also_train`.

    Args:
      lora: the options.
      paths: the paths of all parameters. Those under `towers/` belong to the encoders.

    Raises:
      ValueError: for a pattern of `lora.also_train` that matches no parameter.

    Example:
      >>> layer = "towers/both/blocks/output"
      >>> paths = [f"{layer}/kernel", f"{layer}/lora_a", f"{layer}/lora_b", "log_temperature"]
      >>> frozen_base(Lora(rank=4), paths)
      {'towers/both/blocks/output/kernel'}
    """
    if lora.rank is None:
        return set()
    base = [path for path in paths if path.startswith("towers/") and not _is_adapter(path)]
    trained = matching_paths("model.lora.also_train", lora.also_train, base)
    return set(base).difference(*trained)


def has_adapters(params: PyTree) -> bool:
    """Whether nested dicts of parameters contain an adapter."""
    if not isinstance(params, Mapping):
        return False
    return _A in params or any(map(has_adapters, params.values()))


def without_adapters(params: PyTree) -> PyTree:
    """Nested dicts of parameters without the adapters.

    Example:
      >>> without_adapters({"kernel": 1, "lora_a": 2, "lora_b": 3})
      {'kernel': 1}
    """
    if not isinstance(params, Mapping):
        return params
    return {name: without_adapters(part) for name, part in params.items() if name not in (_A, _B)}


def with_base(params: PyTree, base: PyTree) -> PyTree:
    """Replace the parameters that are in `base`, which may lack adapters or whole encoders.

    Example:
      >>> with_base({"kernel": 0, "lora_a": 2, "lora_b": 3}, {"kernel": 1})
      {'kernel': 1, 'lora_a': 2, 'lora_b': 3}
    """
    if not isinstance(base, Mapping):
        return base
    return {
        name: with_base(part, base[name]) if name in base else part for name, part in params.items()
    }


def merge_adapters(params: PyTree, lora: Lora) -> PyTree:
    r"""Add the adapters to their kernels, $W + \frac{\alpha}{r} A B$.

    The product and the sum are computed in float64, and the merged kernels are float32 or wider.

    Args:
      params: nested dicts of NumPy arrays, or of local JAX arrays.
      lora: the options of the adapters.

    Returns:
      The parameters of the same encoder without adapters. Other leaves are returned unchanged.

    Example:
      >>> a, b = np.array([[1.0], [2.0]]), np.array([[3.0]])
      >>> layer = {"kernel": np.array([[10.0], [20.0]]), "lora_a": a, "lora_b": b}
      >>> merge_adapters(layer, Lora(rank=1, alpha=2.0))["kernel"].tolist()
      [[16.0], [32.0]]
    """
    if not isinstance(params, Mapping):
        return params
    merged = {
        name: merge_adapters(part, lora) for name, part in params.items() if name not in (_A, _B)
    }
    if _A in params and lora.rank is not None:
        kernel, a, b = (np.asarray(params[name]).astype(float) for name in ("kernel", _A, _B))
        dtype = jnp.promote_types(params["kernel"].dtype, jnp.float32)
        merged["kernel"] = np.add(kernel, lora.alpha / lora.rank * (a @ b)).astype(dtype)
    return merged


def cast_base(params: PyTree, frozen: Collection[str], dtype: str | None) -> PyTree:
    """Cast the frozen kernels and token tables to another type.

    Args:
      params: nested dicts of arrays.
      frozen: the paths of the frozen parameters.
      dtype: the new type; `None` returns all parameters unchanged.
    """
    if dtype is None:
        return params

    def cast(path: tuple, leaf: Array) -> Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        # Vectors and small tables are added to activations, so they keep their precision.
        large = name.rpartition("/")[2] in _LARGE
        return leaf.astype(dtype) if large and name in frozen else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def _is_adapter(path: str) -> bool:
    return path.rpartition("/")[2] in (_A, _B)
