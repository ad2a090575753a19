"""Write the adapters of a run as a folder for peft, without the weights of the encoder.

The folder has the layout of the pretrained model's folder, so that sentence-transformers loads it
too: both libraries read the name of the pretrained model from `adapter_config.json` and load that
model first.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxcl.models.lora import has_adapters, without_adapters
from jaxcl.models.pretrained.containment import join, lies_in
from jaxcl.models.pretrained.families import FAMILIES
from jaxcl.models.trainable import parameter_paths
from jaxcl.run.model_files import ModelFiles, as_json, with_dtype
from jaxcl.run.opened import OpenedRun
from jaxcl.run.optimizer import frozen_parameters
from jaxcl.run.pretrained_folder import pretrained_files
from jaxcl.run.sentence_transformers import check_equivalent
from jaxcl.run.training import abstract_parameters, build_towers
from jaxcl.settings.sections import Settings
from jaxcl.typing import PyTree

__all__ = ["adapter_files"]

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # the prefix of all tensor names in peft
_ENCODER = "encoder/"


def adapter_files(run: OpenedRun, dtype: np.dtype | None = None) -> ModelFiles:
    """Collect the files of a run's adapters.

    Args:
      run: the run that trained the adapters of a pretrained encoder.
      dtype: type of the adapters in the file; `None` for float32.

    Raises:
      ValueError: for a run without adapters or without a pretrained encoder, a run that trains
        other parameters of the encoder, and adapters of layers that `transformers` does not have.
    """
    settings = run.settings
    _check(settings)
    check_equivalent(settings, run.workdir)
    model = settings.parts.pretrained["model"]
    params = run.encoder.params["both"]
    files = pretrained_files(model, settings.data, without_adapters(params))
    modules = FAMILIES[model.family].tensors(model.config)
    tensors: dict[str, np.ndarray] = {}
    adapted = []
    for path, layer in _adapted(params):
        if not path.startswith(_ENCODER):
            raise ValueError(
                f"model.lora.targets match {path}, which is no layer of the transformers model; "
                "merge the adapters with --format sentence-transformers"
            )
        kernel = modules[f"{path.removeprefix(_ENCODER)}/kernel"]
        module = kernel.name.removesuffix(".weight")
        adapted.append(module)
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = np.asarray(layer["lora_a"]).T
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = np.asarray(layer["lora_b"]).T
    folder = model.encoder_folder
    contents = dict(files.contents)
    # With a config.json next to the adapters, transformers would look for the weights there, too.
    for file in ("config.json", "model.safetensors.index.json"):
        contents.pop(join(folder, file), None)
    contents[join(folder, _CONFIG)] = as_json(_config(settings, sorted(adapted)))
    other_tensors = {
        file: named for file, named in files.tensors.items() if not lies_in(file, folder)
    }
    written = with_dtype({join(folder, _WEIGHTS): tensors}, dtype)
    return ModelFiles(contents, {**other_tensors, **written})


def _config(settings: Settings, modules: list[str]) -> dict[str, Any]:
    """The fields that peft reads; all other fields have peft's defaults."""
    lora, model = settings.model.lora, str(settings.model.pretrained)
    folder = settings.parts.pretrained["model"].encoder_folder
    return {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": f"{model}/{folder}" if folder else model,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,
    }


def _check(settings: Settings) -> None:
    """Raise a `ValueError` unless the adapters of a pretrained encoder are all that was trained."""
    merge = "export the whole model with --format sentence-transformers or jaxcl"
    if settings.model.lora.rank is None:
        raise ValueError(f"--format peft writes adapters, but model.lora.rank is None; {merge}")
    if settings.model.pretrained is None:
        raise ValueError(
            "--format peft writes adapters of the model in model.pretrained, which is None; "
            f"{merge}"
        )
    params = abstract_parameters(settings, build_towers(settings))
    paths = {*parameter_paths(without_adapters(params))} - frozen_parameters(settings, params)
    if trained := sorted(path for path in paths if path.startswith("towers/")):
        raise ValueError(
            f"the run trained {', '.join(trained[:4])} in addition to its adapters, which an "
            f"adapter of peft cannot hold; {merge}"
        )


def _adapted(params: PyTree, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the path and the parameters of each layer with an adapter."""
    if not has_adapters(params):
        return
    if "lora_a" in params:
        yield path, params
    for name, part in params.items():
        yield from _adapted(part, f"{path}/{name}" if path else str(name))
