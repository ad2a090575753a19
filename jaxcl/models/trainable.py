"""Find parameters by patterns of their paths, and split them into trained and frozen ones."""

import difflib
import fnmatch
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxcl.typing import PyTree

__all__ = [
    "Block",
    "block_of",
    "is_stacked",
    "is_table",
    "map_paths",
    "matching_paths",
    "merge",
    "parameter_paths",
    "split",
    "with_frozen_momentum",
]

_BLOCK = re.compile(r"(.*)/blocks/([^/]+)/")


class Block(NamedTuple):
    """The position of a block's parameter in an encoder.

    Attributes:
      encoder: the path of the encoder that has the `blocks`.
      layer: the number of the block; `None` if the layers are stacked, so that the parameter has a
        leading layer axis (`jaxcl.models.layers.stacked`).
    """

    encoder: str
    layer: int | None


def block_of(path: str) -> Block | None:
    """The block that a parameter is in; `None` for parameters outside of blocks.

    Example:
      >>> block_of("towers/both/blocks/3/widen/bias")
      Block(encoder='towers/both', layer=3)
    """
    match = _BLOCK.match(path)
    if match is None:
        return None
    encoder, layer = match.groups()
    return Block(encoder, int(layer) if layer.isdigit() else None)


def is_stacked(path: str) -> bool:
    """Whether a parameter has a leading layer axis.

    Example:
      >>> [is_stacked(f"towers/both/blocks/{rest}") for rest in ("widen/bias", "3/widen/bias")]
      [True, False]
    """
    block = block_of(path)
    return block is not None and block.layer is None


def is_table(path: str) -> bool:
    """Whether a parameter is an embedding table: named `…table`, or the table of an `nnx.Embed`.

    Example:
      >>> [is_table(f"towers/both/{rest}") for rest in ("token_table", "embed/embedding", "kernel")]
      [True, True, False]
    """
    name = path.rpartition("/")[2]
    return name.endswith("table") or name == "embedding"


def map_paths(function: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """Map `(path, leaf) -> leaf` over a tree of parameters."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(jax.tree_util.keystr(path, simple=True, separator="/"), leaf),
        tree,
    )


def parameter_paths(params: PyTree) -> list[str]:
    """The path of each parameter, in alphabetical order.

    Example:
      >>> parameter_paths({"towers": {"both": {"table": 1.0}}, "log_temperature": 0.0})
      ['log_temperature', 'towers/both/table']
    """
    return sorted(_leaf_paths(params, ""))


def matching_paths(
    setting: str, patterns: Sequence[str], paths: Sequence[str], *, kind: str = "parameter"
) -> list[list[str]]:
    """The paths that each pattern matches.

    A pattern matches a whole path. In it, `*` stands for any characters including `/`, `?` for any
    single character, and `[ab]` for `a` or `b`.

    Args:
      setting: the setting with the patterns, for messages.
      patterns: such as `"towers/both/blocks/0/*"` or `"*bias"`.
      paths: the paths of all parameters.
      kind: a name for the items, for messages.

    Raises:
      ValueError: for a pattern that matches no path, with the nearest paths.

    Example:
      >>> matching_paths("optimizer.freeze", ["*/table"], ["towers/both/table", "log_temperature"])
      [['towers/both/table']]
    """
    matches = []
    for pattern in patterns:
        matches.append([path for path in paths if fnmatch.fnmatchcase(path, pattern)])
        if not matches[-1]:
            raise ValueError(f"{setting} has {pattern!r}, {_no_match(pattern, paths, kind)}")
    return matches


def _no_match(pattern: str, paths: Sequence[str], kind: str) -> str:
    folder = pattern.rstrip("/")
    if any(path.startswith(f"{folder}/") for path in paths):
        return f"which is not the whole path of a parameter; {folder}/* matches all below it"
    nearest = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.0)
    return f"which matches no {kind}; the nearest are {', '.join(nearest)}"


def split(params: PyTree, frozen: Collection[str]) -> tuple[PyTree, PyTree]:
    """Split parameters into the trained and the frozen ones.

    Args:
      params: dicts of dicts of arrays.
      frozen: the paths of the frozen parameters.

    Returns:
      The trained and the frozen parameters, as nested dicts without the others.

    Example:
      >>> split({"a": {"b": 1, "c": 2}, "d": 3}, {"a/b"})
      ({'a': {'c': 2}, 'd': 3}, {'a': {'b': 1}})
    """
    if not frozen:
        return params, {}
    trained = _selected(params, lambda path: path not in frozen, "")
    return trained, _selected(params, lambda path: path in frozen, "")


def merge(trained: PyTree, frozen: PyTree) -> PyTree:
    """Merge trained and frozen parameters; the inverse of `split`.

    Example:
      >>> merge({"a": {"c": 2}, "d": 3}, {"a": {"b": 1}})
      {'a': {'c': 2, 'b': 1}, 'd': 3}
    """
    if not frozen:
        return trained
    joined = dict(trained)
    for name, part in frozen.items():
        joined[name] = merge(joined[name], part) if name in joined else part
    return joined


def with_frozen_momentum(
    memory: Mapping[str, PyTree], params: PyTree, frozen: Collection[str]
) -> Mapping[str, PyTree]:
    """The memory of a run, with all parameters of its momentum encoder.

    The state holds only the trained parameters, since the frozen parameters equal the model's.

    Args:
      memory: `TrainState.memory`.
      params: the model's parameters.
      frozen: the paths of the frozen parameters.
    """
    if "momentum" not in memory:
        return memory
    _, held = split(params, frozen)
    return {**memory, "momentum": merge(memory["momentum"], held.get("towers", {}))}


def _leaf_paths(tree: PyTree, path: str) -> Iterator[str]:
    if not isinstance(tree, Mapping):
        yield path
        return
    for name, part in tree.items():
        yield from _leaf_paths(part, _below(path, name))


def _selected(tree: Mapping, wanted: Callable[[str], bool], path: str) -> dict:
    """The part of nested dicts whose paths are wanted, without empty dicts."""
    parts = {}
    for name, part in tree.items():
        below = _below(path, name)
        if isinstance(part, Mapping):
            if chosen := _selected(part, wanted, below):
                parts[name] = chosen
        elif wanted(below):
            parts[name] = part
    return parts


def _below(path: str, name: Any) -> str:
    return f"{path}/{name}" if path else str(name)
