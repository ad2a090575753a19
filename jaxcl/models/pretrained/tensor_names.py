"""Tensor names for the parameters of pretrained transformers and decoders."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import nnx

from jaxcl.models.pretrained.blocks import Architecture, Transformer
from jaxcl.models.pretrained.description import PLAIN, Computation, Family, Tensor

__all__ = [
    "Names",
    "attention_names",
    "family_of",
    "linear_tensors",
    "mlp_names",
    "norm_tensors",
    "transformer_family",
]


class Names(NamedTuple):
    """The tensor names of a family, without `.weight` and `.bias`.

    Attributes:
      tables: table of `Transformer`, such as `"token_table"` -> its name.
      norms: norm outside the blocks -> its name.
      block: the prefix of each block's names; `{}` is replaced by its number.
      block_norms: norm in a block -> its name in the block.
      block_linear: linear layer in a block, such as `"attention/query"` -> its name in the block.
    """

    tables: Mapping[str, str]
    norms: Mapping[str, str]
    block: str
    block_norms: Mapping[str, str]
    block_linear: Mapping[str, str]

    def tensors(self, a: Architecture) -> dict[str, Tensor]:
        """Map the path of each parameter to its tensor."""
        tensors = {path: Tensor(f"{name}.weight") for path, name in self.tables.items()}
        for path, name in self.norms.items():
            tensors |= norm_tensors(path, name, bias=a.norm_bias)
        for layer in range(a.num_layers):
            at, block = f"blocks/{layer}/", self.block.format(layer)
            for path, name in self.block_norms.items():
                if not (a.pre_norm and layer == 0 and path == "attention_norm"):
                    tensors |= norm_tensors(at + path, block + name, bias=a.norm_bias)
            for path, name in self.block_linear.items():
                bias = a.mlp_bias if path.startswith("mlp/") else a.attention_bias
                tensors |= linear_tensors(at + path, block + name, bias=bias)
        return tensors


def attention_names(prefix: str, *names: str) -> dict[str, str]:
    """The names of the projections to queries, keys and values, and of attention's output."""
    parts = ("query", "key", "value", "output")
    return {f"attention/{part}": prefix + name for part, name in zip(parts, names, strict=True)}


def mlp_names(widen: str, narrow: str) -> dict[str, str]:
    """The names of the two linear layers of an MLP."""
    return {"mlp/widen": widen, "mlp/narrow": narrow}


def norm_tensors(path: str, name: str, *, bias: bool) -> dict[str, Tensor]:
    """The tensors of a norm: its scale, and its bias if it has one."""
    scale = {f"{path}/scale": Tensor(f"{name}.weight")}
    return scale | ({f"{path}/bias": Tensor(f"{name}.bias")} if bias else {})


def linear_tensors(path: str, name: str, *, bias: bool) -> dict[str, Tensor]:
    """The tensors of a linear layer: its kernel, and its bias if it has one."""
    kernel = {f"{path}/kernel": Tensor(f"{name}.weight", transposed=True)}
    return kernel | ({f"{path}/bias": Tensor(f"{name}.bias")} if bias else {})


def transformer_family(
    prefixes: tuple[str, ...],
    architecture: Callable[[Mapping[str, Any]], Architecture],
    names: Names,
) -> Family:
    """A family whose models are transformers; `family_of` explains the first two arguments."""
    return family_of(prefixes, architecture, Transformer, names.tensors)


def family_of(
    prefixes: tuple[str, ...],
    architecture: Callable[[Mapping[str, Any]], Any],
    module: Callable[..., nnx.Module],
    tensors: Callable[[Any], Mapping[str, Tensor]],
) -> Family:
    """A family whose `config.json` describes an architecture.

    Args:
      prefixes: optional prefixes of tensor names.
      architecture: `config.json` -> the architecture. Raises a `ValueError` for an unsupported
        config.
      module: `(architecture, computation, *, rngs)` -> the module.
      tensors: the architecture -> path of each parameter -> its tensor.
    """

    def make(
        config: Mapping[str, Any], computation: Computation = PLAIN, *, rngs: nnx.Rngs
    ) -> nnx.Module:
        return module(architecture(config), computation, rngs=rngs)

    return Family(
        prefixes=prefixes,
        make=make,
        tensors=lambda config: tensors(architecture(config)),
        hidden_dim=lambda config: architecture(config).hidden_dim,
        vocabulary_size=lambda config: architecture(config).vocabulary_size,
        max_tokens=lambda config: architecture(config).max_tokens,
    )
