"""Write a trained model as a folder in jaxcl's own format, and open such a folder.

jaxcl.json          version of the format, settings, step, fingerprint of the tokenizer
model.safetensors   the parameters, by path
tokenizer.json, …   the files that the inputs depend on
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcl.data.modalities import MODALITIES, build_readers, check_inputs, input_fingerprints
from jaxcl.host.files import read_json_object, read_regular
from jaxcl.host.paths import AnyPath, as_path
from jaxcl.models.pretrained.tensor_files import map_tensors
from jaxcl.models.pretrained.weights import place
from jaxcl.ops.mesh import make_mesh, replicated_sharding
from jaxcl.run.encoder import Encoder
from jaxcl.run.identity import pretrained_fingerprints
from jaxcl.run.model_files import ModelFiles, as_json, with_dtype
from jaxcl.run.opened import OpenedRun
from jaxcl.run.training import build_embedder, build_towers, evaluation_towers
from jaxcl.settings.parts import Trust
from jaxcl.settings.pretrained import COPIES
from jaxcl.settings.read import as_dict, read_settings
from jaxcl.settings.sections import Settings
from jaxcl.typing import PyTree

__all__ = ["EXPORT_FILE", "ExportedModel", "jaxcl_files", "open_exported"]

EXPORT_FILE = "jaxcl.json"
"""The file that marks an exported folder."""

_FORMAT = 1
_WEIGHTS = "model.safetensors"
_MAX_BYTES = 2**30
"""The largest allowed size of a file that the inputs depend on."""


class ExportedModel(NamedTuple):
    """A model from an exported folder, on the available devices.

    Attributes:
      folder: the exported folder.
      settings: the settings of the run that trained the model.
      encoder: the model.
      step: the training step of its parameters.
    """

    folder: AnyPath
    settings: Settings
    encoder: Encoder
    step: int


def jaxcl_files(run: OpenedRun, dtype: np.dtype | None = None) -> ModelFiles:
    """Collect the files of a run's model for `open_exported`.

    Args:
      run: the run that trained the model.
      dtype: type of the parameters in the file; `None` to keep their type.

    Raises:
      ValueError: for a type that cannot hold the parameters.
    """
    run = run.merged()
    data = run.settings.data
    settings = as_dict(run.settings)
    del settings["run"]  # describes folders and devices of the training machine
    description = {
        "format": _FORMAT,
        "step": run.made_from["step"],
        "settings": settings,
        "fingerprints": input_fingerprints(data, run.workdir),
        "pretrained": pretrained_fingerprints(run.settings),
    }
    names = [file for name in sorted(set(data.modality)) for file in MODALITIES[name].files]
    contents = {name: read_regular(run.workdir / name, limit=_MAX_BYTES) for name in names}
    for copy in COPIES.values():
        contents |= _contents(run.workdir, copy)
    contents[EXPORT_FILE] = as_json(description)
    tensors = {path: np.asarray(leaf) for path, leaf in _by_path(run.encoder.params).items()}
    return ModelFiles(contents, with_dtype({_WEIGHTS: tensors}, dtype))


def open_exported(folder: AnyPath, *, trust: Trust = ()) -> ExportedModel:
    """Open a folder that `jaxcl.export` wrote with `--format jaxcl`.

    Args:
      folder: the exported folder.
      trust: packages from which an encoder named `package.module:function` may be imported.

    Raises:
      ValueError: if the folder was not exported by jaxcl, or its files do not match.
      PermissionError: for an encoder from a package that is not trusted.
    """
    folder = as_path(folder)
    description = _read_description(folder)
    settings = read_settings(description["settings"], trust=trust, workdir=folder)
    check_inputs(settings.data, folder, description["fingerprints"])
    _check_copies(folder, settings, description["pretrained"])
    towers = build_towers(settings)
    mesh = make_mesh({"data": -1})
    abstract = towers.abstract_parameters(replicated_sharding(mesh))
    params = place(_map_params(folder / _WEIGHTS, abstract), abstract)
    towers = evaluation_towers(settings, towers)
    embedder = build_embedder(settings, towers, mesh)
    encoder = Encoder(mesh, towers, embedder, params, build_readers(settings.data, folder))
    return ExportedModel(folder, settings, encoder, description["step"])


def _check_copies(folder: AnyPath, settings: Settings, recorded: Mapping[str, str]) -> None:
    for section, fingerprint in pretrained_fingerprints(settings).items():
        if recorded.get(section) != fingerprint:
            raise ValueError(
                f"{COPIES[section]} in {folder} has changed since the model was exported; restore "
                "it from a copy, or export the model again"
            )


def _contents(root: AnyPath, folder: str) -> dict[str, bytes]:
    """Read all files in a folder, at any depth, by their paths relative to `root`."""
    paths = (root / folder).rglob("*")
    return {
        path.relative_to(root).as_posix(): read_regular(path, limit=_MAX_BYTES)
        for path in paths
        if not path.is_dir()
    }


def _read_description(folder: AnyPath) -> Mapping[str, Any]:
    path = folder / EXPORT_FILE
    if not path.exists():
        raise ValueError(
            f"{folder} has no model exported for jaxcl (no {EXPORT_FILE}); write one with "
            "python -m jaxcl.export --format jaxcl"
        )
    description = read_json_object(path, remedy="export the model again")
    if description.get("format") != _FORMAT:
        raise ValueError(
            f"{path} has the format {description.get('format')!r}, but this version of jaxcl reads "
            f"format {_FORMAT}; export the model again, or install the version that wrote it"
        )
    kinds = {"settings": dict, "fingerprints": dict, "pretrained": dict, "step": int}
    if wrong := [
        name for name, kind in kinds.items() if not isinstance(description.get(name), kind)
    ]:
        raise ValueError(f"{path} is damaged (it lacks {', '.join(wrong)}); export the model again")
    return description


def _map_params(path: AnyPath, abstract: PyTree) -> PyTree:
    """Memory-map the parameters in a file, as the tree of an encoder."""
    tensors, expected = map_tensors(path), _by_path(abstract)
    different = [
        f"{name} is {_shape(tensors.get(name))} in the file but {_shape(expected.get(name))} in "
        "the encoder"
        for name in sorted(tensors.keys() | expected.keys())
        if _shape(tensors.get(name)) != _shape(expected.get(name))
    ]
    if different:
        raise ValueError(f"{path} does not fit its encoder: {'; '.join(different[:4])}")
    leaves = [tensors[name] for name in expected]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _by_path(params: PyTree) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def _shape(leaf: Any) -> Any:
    return "absent" if leaf is None else leaf.shape
