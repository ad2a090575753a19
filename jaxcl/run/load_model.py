"""Load a model that embeds texts or images, from the workdir of a run or a model's folder."""

import os
from collections.abc import Mapping

from flax import nnx
from tokenizers import Tokenizer

from jaxcl.data.modalities import Text, text_rule
from jaxcl.data.text_rule import UNLIMITED, TextRule
from jaxcl.data.tokenizer import load_pretrained_tokenizer
from jaxcl.host.files import digest_of
from jaxcl.host.paths import AnyPath, as_path
from jaxcl.models import TowerSpec, make_towers
from jaxcl.models.pretrained.description import PretrainedModel
from jaxcl.models.pretrained.encoder import PretrainedEncoder
from jaxcl.models.pretrained.families import FAMILIES
from jaxcl.models.pretrained.folder import read_towers
from jaxcl.models.pretrained.hub import local_or_hub
from jaxcl.models.pretrained.modules import parse_json
from jaxcl.models.pretrained.weights import load_parameters, place
from jaxcl.ops.mesh import make_mesh, replicated_sharding
from jaxcl.run.embedding_model import EmbeddingModel
from jaxcl.run.encoder import Encoder
from jaxcl.run.exported import EXPORT_FILE, open_exported
from jaxcl.run.image_batches import ImageSide, image_side
from jaxcl.run.opened import OpenedRun, open_run
from jaxcl.run.training import embedding_dim
from jaxcl.run.workdir import CHECKPOINTS, ID_FILE
from jaxcl.settings.data_sections import DataSettings
from jaxcl.settings.derived import origin_of
from jaxcl.settings.parts import Trust
from jaxcl.settings.read import as_dict
from jaxcl.settings.sections import Settings
from jaxcl.typing import SIDES

__all__ = ["is_run", "load", "model_of_run"]

_PRETRAINED_FILES = ("modules.json", "config.json", "model.safetensors")


def load(
    path: str | os.PathLike[str], *, compute_dtype: str = "float32", trust: Trust = ()
) -> EmbeddingModel:
    """Load a model that embeds texts, images or both, on all devices.

    Args:
      path: one of

        - the workdir of a run, whose newest checkpoint is loaded; the run may still be training;
        - `WORKDIR/checkpoints/STEP`, or `WORKDIR/checkpoints/best` for the step with the highest
          `config.evaluation.best_metric`;
        - a folder written by `jaxcl.export`;
        - the folder of a pretrained encoder saved by sentence-transformers, transformers or
          model2vec, or its id on the Hugging Face Hub (`jaxcl.models.pretrained`). For CLIP and
          SigLIP, both towers are loaded: images are queries, and texts are keys.
      compute_dtype: type of the activations of a pretrained encoder, such as `"bfloat16"`. The
        model of a run uses the type in its config. On accelerators, JAX multiplies float32 in
        lower precision unless `jax_default_matmul_precision` is `"highest"`.
      trust: packages from which an encoder named `package.module:function` may be imported.

    Raises:
      FileNotFoundError: if there is no such folder.
      ValueError: if the folder has no model, or its model is damaged or not supported.
      CheckpointError: if no checkpoint of a run can be read.
      PermissionError: for an encoder from a package that is not trusted.

    Example:
      model = jaxcl.load("runs/code_search")
      model.encode("parse an ISO date").shape  # (512,)
    """
    if is_run(path):
        return model_of_run(open_run(as_path(path), trust=trust))
    folder = local_or_hub(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; give the folder of a run or model")
    if (folder / EXPORT_FILE).exists():
        exported = open_exported(folder, trust=trust)
        return _trained_model(exported.folder, exported.settings, exported.encoder)
    if any((folder / name).exists() for name in _PRETRAINED_FILES):
        return _pretrained_model(read_towers(folder), compute_dtype)
    raise ValueError(
        f"{folder} has no model: neither {CHECKPOINTS}/ of a run, nor {EXPORT_FILE} of an exported "
        f"model, nor {' or '.join(_PRETRAINED_FILES)} of a pretrained model"
    )


def is_run(path: str | os.PathLike[str]) -> bool:
    """Whether a path is the workdir of a run or one of its checkpoints."""
    folder, checkpoint = origin_of(path)
    # Models of other packages may also be in a folder named checkpoints.
    files = (CHECKPOINTS, ID_FILE) if checkpoint is None else (ID_FILE,)
    return any((folder / name).exists() for name in files)


def model_of_run(run: OpenedRun) -> EmbeddingModel:
    """The embedding model of an opened run.

    Raises:
      ValueError: if a side has inputs other than texts.
    """
    model = _trained_model(run.workdir, run.settings, run.encoder)
    model.source = str(run.path)
    return model


def _trained_model(folder: AnyPath, settings: Settings, encoder: Encoder) -> EmbeddingModel:
    data = settings.data
    sides = {side: getattr(data.modality, side) for side in SIDES}
    if set(sides.values()) - {"text", "image"}:
        raise ValueError(
            f"{folder} has a model with data.modality={data.modality._asdict()}; jaxcl.load "
            "accepts models of texts and images only"
        )
    texts = [side for side in SIDES if sides[side] == "text"]
    return EmbeddingModel(
        source=str(folder),
        encode=encoder.towers.encode,
        params=encoder.params,
        mesh=encoder.mesh,
        dim=embedding_dim(settings, encoder.towers),
        tokenizer=Text().tokenizer(data, folder) if texts else None,
        rules={side: rule for side, rule in _trained_rules(settings).items() if side in texts},
        images={side: image_side(data, side, folder) for side in SIDES if side not in texts},
        matryoshka_dims=settings.loss.matryoshka_dims,
        description={"model": as_dict(settings)["model"]},
    )


def _trained_rules(settings: Settings) -> dict[str, TextRule]:
    rules = {side: text_rule(settings.data, side) for side in SIDES}
    if not settings.parts.pretrained or not settings.model.shared:
        return rules
    # An exported folder has one limit for both sides, so the model has one limit before export too.
    longest = max(rule.max_tokens for rule in rules.values())
    return {side: rule._replace(max_tokens=longest) for side, rule in rules.items()}


def _pretrained_model(models: Mapping[str, PretrainedModel], compute_dtype: str) -> EmbeddingModel:
    sides = {"query": "image", "key": "text"} if len(models) > 1 else {"both": next(iter(models))}
    towers = make_towers(
        {name: _tower_of(models[modality], compute_dtype) for name, modality in sides.items()}
    )
    mesh = make_mesh({"data": -1})
    abstract = towers.abstract_parameters(replicated_sharding(mesh))
    params = {
        name: place(load_parameters(models[modality], abstract[name]), abstract[name])
        for name, modality in sides.items()
    }
    first = next(iter(models.values()))
    text = models.get("text")
    by_side = {side: models[sides.get(side, next(iter(models)))] for side in SIDES}
    return EmbeddingModel(
        source=str(first.path),
        encode=towers.encode,
        params=params,
        mesh=mesh,
        dim=first.dim,
        tokenizer=None if text is None else _tokenizer_of(text),
        rules={
            side: _pretrained_rule(model, side)
            for side, model in by_side.items()
            if model.modality == "text"
        },
        images={
            side: _pretrained_images(model, side)
            for side, model in by_side.items()
            if model.modality == "image"
        },
        prompts={} if text is None else _named_prompts(text),
        normalizes=first.normalize,
        similarity_function=first.similarity,
        description={
            "files": {name: digest_of(content) for name, content in first.files.items()},
            "compute_dtype": compute_dtype,
        },
    )


def _tower_of(model: PretrainedModel, compute_dtype: str) -> TowerSpec:
    def make(rngs: nnx.Rngs) -> PretrainedEncoder:
        return PretrainedEncoder(
            model, normalize=model.normalize, compute_dtype=compute_dtype, rngs=rngs
        )

    return TowerSpec(make)


def _pretrained_images(model: PretrainedModel, side: str) -> ImageSide:
    assert model.images is not None  # an encoder of images has them
    data = DataSettings()
    images = data.images._replace(size=model.images.size, resize=model.images.resize)
    return image_side(data._replace(images=images), side, model.path)


def _tokenizer_of(pretrained: PretrainedModel) -> Tokenizer:
    """Load the tokenizer of a model, and check that its ids are those that the model reads."""
    path = pretrained.path / pretrained.encoder_folder / "tokenizer.json"
    tokenizer = load_pretrained_tokenizer(path)
    num_ids = max(tokenizer.get_vocab().values(), default=-1) + 1
    if num_ids > pretrained.vocabulary_size:
        # Looking up an id past the end of the table would return the last row.
        raise ValueError(
            f"{path} has ids up to {num_ids - 1}, but the model's token table has "
            f"{pretrained.vocabulary_size} rows; restore the tokenizer that belongs to the model"
        )
    required = FAMILIES[pretrained.family].required_token(pretrained.config)
    if required is not None and required not in tokenizer.encode("a").ids:
        raise ValueError(
            f"{path} does not end a text with token {required}, whose state the model takes as the "
            "text's embedding (eos_token_id in config.json); restore the tokenizer that belongs to "
            "the model"
        )
    return tokenizer


def _named_prompts(pretrained: PretrainedModel) -> dict[str, str]:
    config = parse_json(pretrained.files, "config_sentence_transformers.json")
    return {name: text for name, text in (config.get("prompts") or {}).items() if text is not None}


def _pretrained_rule(pretrained: PretrainedModel, side: str) -> TextRule:
    return TextRule(
        max_tokens=UNLIMITED if pretrained.max_tokens is None else pretrained.max_tokens,
        special_tokens=pretrained.special_tokens,
        prompt=pretrained.prompts[side],
        exclude_prompt=not pretrained.pooling.include_prompt,
        skip_unknown=pretrained.skip_unknown,
    )
