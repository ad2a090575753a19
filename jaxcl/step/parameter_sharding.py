"""Shards parameters over a mesh axis, `"fsdp"`.

Parameters, the optimizer state and the momentum encoder are sharded along one of their dimensions
and gathered just before use. Rows are sharded over all axes, so the results are the same as
with replicated parameters (Zhao et al., "PyTorch FSDP", VLDB 2023).
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcl.typing import PyTree

__all__ = ["FSDP", "Rule", "parameter_shardings"]

FSDP = "fsdp"
"""The axis over which parameters are sharded."""

Rule = tuple[str, int | None]
"""A regular expression for paths, and the dimension to shard; `None` replicates the arrays."""

_WORTH_CUTTING = 2**14  # elements; smaller arrays cost more to gather than to replicate


def parameter_shardings(
    mesh: Mesh, tree: PyTree, *, rules: Sequence[Rule] = (), strict: bool = True
) -> PyTree:
    """The sharding of each array of a tree.

    The first rule whose expression matches an array's path applies. If no rule matches, the longest
    dimension divisible by the size of the axis `"fsdp"` is sharded; if several are equally long,
    the first of them. Arrays with fewer than 16,384 elements are replicated.

    Args:
      mesh: the devices; without an axis `"fsdp"`, all arrays are replicated.
      tree: arrays or their shapes: parameters, or a tree that contains the same paths.
      rules: rules for paths such as `"towers/both/table"`, or for parts of them.
      strict: whether a rule that does not fit an array is an error. Otherwise it is ignored, as for
        the state of an optimizer, whose arrays may have fewer dimensions than the parameters.

    Raises:
      ValueError: if a rule's dimension does not exist, or the axis size does not divide it.

    Example:
      >>> import numpy as np
      >>> from jaxcl.ops.mesh import make_mesh
      >>> mesh = make_mesh({"data": -1, "fsdp": 1})
      >>> tuple(parameter_shardings(mesh, {"table": np.zeros((300, 512))})["table"].spec)
      (None, 'fsdp')
    """
    size = dict(mesh.shape).get(FSDP)

    def placed(path: tuple, leaf: Any) -> NamedSharding:
        if size is None:
            return NamedSharding(mesh, PartitionSpec())
        dimension = _dimension(
            jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, size, rules, strict
        )
        if dimension is None:
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, PartitionSpec(*[None] * dimension, FSDP))

    return jax.tree_util.tree_map_with_path(placed, tree)


def _dimension(
    path: str, shape: tuple[int, ...], size: int, rules: Sequence[Rule], strict: bool
) -> int | None:
    for expression, dimension in rules:
        if re.search(expression, path):
            if dimension is not None and (
                not 0 <= dimension < len(shape) or shape[dimension] % size
            ):
                if not strict:
                    continue
                raise ValueError(
                    f"the rule ({expression!r}, {dimension}) cannot cut {path} {list(shape)} over "
                    f"{size} devices; name a dimension that they divide, or None"
                )
            return dimension
    divided = [number for number, length in enumerate(shape) if length % size == 0]
    if not divided or math.prod(shape) < _WORTH_CUTTING:
        return None
    return max(divided, key=lambda number: shape[number])
