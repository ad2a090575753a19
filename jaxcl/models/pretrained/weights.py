"""Load the weights of a pretrained encoder into parameters, and write parameters back to tensors.

Every parameter must have a tensor, and every tensor must be used or known to be unused, such as the
pretraining head. Otherwise loading fails, so that no part of a model silently stays random.
"""

import fnmatch
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.host.files import is_remote, write_sealed_json, write_whole
from jaxcl.host.paths import AnyPath
from jaxcl.host.staging import put_in_place, staging_folder
from jaxcl.models.pretrained.containment import join, lies_in, path_inside
from jaxcl.models.pretrained.description import PretrainedModel, Tensor
from jaxcl.models.pretrained.families import FAMILIES
from jaxcl.models.pretrained.folder import TENSOR_LIST, UNUSED_FOLDER
from jaxcl.models.pretrained.tensor_files import map_tensors, specs_as_json, write_tensors
from jaxcl.models.pretrained.two_towers import LOGITS
from jaxcl.typing import PyTree

__all__ = ["export_tensors", "keep_copy", "load_parameters", "place", "unused_tensors"]

FileTensors: TypeAlias = dict[str, dict[str, np.ndarray]]
"""File, relative to the model's folder -> name of a tensor -> the tensor."""

_UNUSED = (
    *("*pooler.*", "cls.*", "lm_head.*", "qa_outputs.*", "classifier.*", "pre_classifier.*"),
    *("vocab_transform.*", "vocab_layer_norm.*", "vocab_projector.*", "head.*", "decoder.*"),
    *("*position_ids", "*.inv_freq", "*mask_token", *LOGITS),
)
"""Tensors that transformers writes but embeddings do not use: heads, and computed constants."""
_DENSE = {"kernel": Tensor("linear.weight", transposed=True), "bias": Tensor("linear.bias")}
_SHOWN = 20


class _Source(NamedTuple):
    """The tensor of a parameter in the files."""

    file: str
    name: str
    transposed: bool


class _Match(NamedTuple):
    """The matches between the parameters and tensors of a model.

    Attributes:
      sources: path of a parameter -> its tensor.
      missing: path of a parameter -> the name of its tensor, which the files lack.
      unused: known tensors without a parameter, `(file, name)`.
      unknown: other tensors without a parameter, `(file, name)`.
    """

    sources: dict[str, _Source]
    missing: dict[str, str]
    unused: list[tuple[str, str]]
    unknown: list[tuple[str, str]]


def load_parameters(model: PretrainedModel, abstract: PyTree) -> PyTree:
    """Map the weights of a folder as parameters, in the types of the files.

    Args:
      model: the description of the folder.
      abstract: the parameters of a `PretrainedEncoder`, nested dicts of arrays or
        `jax.ShapeDtypeStruct`.

    Returns:
      The same tree with NumPy arrays, which are read-only views of the files. `place` converts them
      shard by shard.

    Raises:
      ValueError: if a parameter has no tensor, a tensor has the wrong shape or type, or an unknown
        tensor is left over; the message lists them. Also for a run's copy, which has no weights.
      OSError: if a file cannot be read.
    """
    if _is_copy(model):
        raise ValueError(
            f"{model.path} is a run's copy without the weights; load them from the run's "
            "checkpoints, or give the original folder"
        )
    match = _match(model)
    wanted = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
    _check(model, match, wanted)
    mapped = {file: _map(model, file, names) for file, names in model.tensors.items()}

    def view(path: tuple, _: object) -> np.ndarray:
        source = match.sources[_name(path)]
        tensor = mapped[source.file][source.name]
        return tensor.T if source.transposed else tensor

    return jax.tree_util.tree_map_with_path(view, abstract)


def place(parameters: PyTree, abstract: PyTree) -> PyTree:
    """Put parameters on devices, reading and converting them shard by shard.

    Args:
      parameters: a tree of NumPy arrays, such as `load_parameters` returns.
      abstract: the same tree of `jax.ShapeDtypeStruct` with shardings.

    Returns:
      The same tree of JAX arrays, in the types of `abstract`.
    """

    def placed(array: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
        # A copy, because JAX may keep a reference to the array, and so to the mapped file.
        return jax.make_array_from_callback(
            like.shape, like.sharding, lambda part: np.array(array[part], like.dtype, order="C")
        )

    return jax.tree.map(placed, parameters, abstract)


def unused_tensors(model: PretrainedModel) -> FileTensors:
    """Map the known tensors without a parameter, such as a pooler's weights, by file and name.

    Raises:
      ValueError: if a file is damaged.
      OSError: if a file cannot be read.
    """
    names: dict[str, list[str]] = {}
    for file, name in _match(model).unused:
        names.setdefault(file, []).append(name)
    folder = UNUSED_FOLDER if _is_copy(model) else ""
    tensors: FileTensors = {}
    for file, unused in names.items():
        mapped = _map(model, file, unused, folder=folder)
        tensors[file] = {name: mapped[name] for name in unused}
    return tensors


def export_tensors(model: PretrainedModel, parameters: PyTree) -> FileTensors:
    """Convert trained parameters to the tensors of the original files.

    A tensor keeps the type of its file if this type holds the values exactly, and becomes float32
    otherwise. Untrained weights therefore keep their bytes. Unused tensors are copied unchanged.

    Args:
      model: the description of the original folder, or of a run's copy of it.
      parameters: the parameters of a `PretrainedEncoder`, as NumPy arrays or local JAX arrays.

    Returns:
      File -> name -> tensor, for `write_tensors`.

    Raises:
      ValueError: if the parameters do not fit the model.
      OSError: if an unused tensor cannot be read.
    """
    match = _match(model)
    leaves = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(parameters)}
    _check(model, match, leaves)
    tensors = unused_tensors(model)
    for path, source in match.sources.items():
        values = np.asarray(leaves[path])
        stored, _ = model.tensors[source.file][source.name]
        tensors.setdefault(source.file, {})[source.name] = _as_stored(
            values.T if source.transposed else values, stored
        )
    return tensors


def keep_copy(model: PretrainedModel, directory: AnyPath) -> None:
    """Copy a model's folder, without the weights that are loaded as parameters.

    `read_pretrained` returns the same description for the copy, except its path. The copy is
    complete or absent.

    Args:
      model: the description of the folder, or of another copy.
      directory: the folder of the copy; an older copy is replaced.

    Raises:
      OSError: if the copy cannot be written.
    """
    if is_remote(directory):
        _write_copy(model, directory)
        return
    with staging_folder(Path(directory)) as staging:
        _write_copy(model, staging / directory.name)
        put_in_place(staging / directory.name, Path(directory), replace=True)


def _is_copy(model: PretrainedModel) -> bool:
    return (model.path / TENSOR_LIST).exists()


def _write_copy(model: PretrainedModel, directory: AnyPath) -> None:
    for file, content in model.files.items():
        path = directory / file
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    for file, tensors in unused_tensors(model).items():
        path = directory / UNUSED_FOLDER / file
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors)
    # Written last: without this file, the copy cannot be read.
    write_sealed_json(directory / TENSOR_LIST, specs_as_json(model.tensors))


def _match(model: PretrainedModel) -> _Match:
    family = FAMILIES[model.family]
    match = _Match({}, {}, [], [])
    tensors = family.tensors(model.config)
    _match_part(match, model, "encoder", model.encoder_folder, tensors, family.prefixes)
    for number, dense in enumerate(model.dense):
        tensors = {key: tensor for key, tensor in _DENSE.items() if key != "bias" or dense.bias}
        _match_part(match, model, f"dense/{number}", dense.folder, tensors, ())
    return match


def _match_part(
    match: _Match,
    model: PretrainedModel,
    root: str,
    folder: str,
    tensors: Mapping[str, Tensor],
    prefixes: tuple[str, ...],
) -> None:
    """Match the parameters below `root` with the tensors in a folder."""
    files = {
        name: file
        for file, specs in model.tensors.items()
        if lies_in(file, folder)
        for name in specs
    }
    names = max(
        ({_plain(name, prefix): name for name in files} for prefix in ("", *prefixes)),
        key=lambda names: sum(tensor.name in names for tensor in tensors.values()),
    )
    used = set()
    for path, tensor in tensors.items():
        name = names.get(tensor.name)
        if name is None:
            match.missing[f"{root}/{path}"] = tensor.name
        else:
            match.sources[f"{root}/{path}"] = _Source(files[name], name, tensor.transposed)
            used.add(name)
    plain = {name: key for key, name in names.items()}
    for name, file in files.items():
        if name not in used:
            # Another spelling of a used tensor's name is unknown too.
            known = any(fnmatch.fnmatchcase(plain.get(name, ""), pattern) for pattern in _UNUSED)
            (match.unused if known else match.unknown).append((file, name))


def _plain(name: str, prefix: str) -> str:
    """The name of a tensor without its prefix, with the newer names for the weights of norms."""
    name = name.removeprefix(prefix)
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _check(model: PretrainedModel, match: _Match, wanted: Mapping[str, Any]) -> None:
    """Compare the parameters with the tensors, and raise a `ValueError` that lists differences."""
    unlike = []
    for path in sorted(wanted.keys() & match.sources.keys()):
        source = match.sources[path]
        dtype, shape = model.tensors[source.file][source.name]
        shape = shape[::-1] if source.transposed else shape
        leaf = wanted[path]
        if shape != leaf.shape or not jnp.issubdtype(dtype, np.floating):
            unlike.append(f"{path} {list(leaf.shape)} ({source.name}: {dtype}{list(shape)})")
    lacking = sorted(wanted.keys() - match.sources.keys())
    unasked = sorted(match.sources.keys() - wanted.keys())
    problems = {
        "parameters without a tensor": [
            f"{path} ({match.missing.get(path, 'unknown')})" for path in lacking
        ],
        "parameters whose tensor has another shape or type": unlike,
        "tensors without a parameter": [
            *(name for _, name in match.unknown),
            *(match.sources[path].name for path in unasked),
        ],
    }
    if listed := [f"{kind}: {_shortened(names)}" for kind, names in problems.items() if names]:
        raise ValueError(
            f"{model.path}: its weights do not fit its {model.family} config: {'; '.join(listed)}"
        )


def _shortened(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _map(
    model: PretrainedModel, file: str, names: Iterable[str], *, folder: str = ""
) -> dict[str, np.ndarray]:
    """Map the tensors of a file, and check `names` against the description."""
    path = path_inside(model.path, join(folder, file))
    tensors = map_tensors(path)
    for name in names:
        spec = (tensors[name].dtype, tensors[name].shape) if name in tensors else None
        if spec != model.tensors[file][name]:
            raise ValueError(
                f"{path} has changed since its folder was read: the tensor {name} differs"
            )
    return tensors


def _as_stored(values: np.ndarray, stored: np.dtype) -> np.ndarray:
    """Convert values to the stored type if it holds them exactly, else to float32."""
    with np.errstate(over="ignore"):
        converted = values.astype(stored, copy=False)
        exact = np.array_equal(converted.astype(values.dtype), values, equal_nan=True)
    return converted if exact else values.astype(np.float32)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
