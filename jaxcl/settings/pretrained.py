"""Read the pretrained encoders that a config names, and derive settings from them."""

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from flax import nnx

from jaxcl.host.files import is_remote, read_json_object
from jaxcl.host.paths import AnyPath
from jaxcl.losses import LOSSES
from jaxcl.models import DEFAULT_ENCODER, EncoderPart
from jaxcl.models.pretrained.containment import join
from jaxcl.models.pretrained.description import PretrainedModel
from jaxcl.models.pretrained.encoder import PretrainedEncoder, PretrainedOptions
from jaxcl.models.pretrained.families import FAMILIES
from jaxcl.models.pretrained.folder import TENSOR_LIST, read_pretrained
from jaxcl.models.pretrained.hub import local_or_hub
from jaxcl.models.pretrained.preprocessing import with_image_size
from jaxcl.models.pretrained.weights import load_parameters
from jaxcl.settings.data_sections import DataSettings
from jaxcl.settings.derived import origin_of, tower_sections
from jaxcl.settings.parts import Trust
from jaxcl.settings.section_reader import read_section
from jaxcl.settings.sections import ModelSettings, Settings
from jaxcl.typing import SIDES

__all__ = ["COPIES", "PRETRAINED", "encoder_part", "is_copy", "tokenizer_of", "with_pretrained"]

PRETRAINED = "pretrained"
"""The `config.model.name` of an encoder that the files of a pretrained model describe."""

COPIES: Mapping[str, str] = {"model": "pretrained", "model.key": "pretrained-key"}
"""Section of an encoder -> the folder in the workdir with its copy of the pretrained model."""


_SHARED_OPTIONS = ("dropout", "remat", "compute_dtype")
"""The options of `model.options` that a second tower from the same folder also takes."""

_TEXT_RULES = ("prompts", "special_tokens", "exclude_prompt", "skip_unknown")
"""The fields of `data` that a run with `init_from` inherits if it leaves them unset."""


def encoder_part(model: PretrainedModel) -> EncoderPart:
    """The encoder of a pretrained model; it returns unit vectors, as the losses require."""

    def make(_: Any, *, dim: int, rngs: nnx.Rngs, **options: Any) -> nnx.Module:
        return PretrainedEncoder(model, normalize=True, rngs=rngs, **options)

    return EncoderPart(
        make,
        PretrainedOptions,
        lambda _, abstract: load_parameters(model, abstract),
        any_width=FAMILIES[model.family].any_width,
    )


def is_copy(folder: AnyPath) -> bool:
    """Whether a folder is a run's copy of a pretrained model, without the weights."""
    return (folder / TENSOR_LIST).exists()


def tokenizer_of(model: PretrainedModel) -> bytes:
    """The content of a model's `tokenizer.json`."""
    return model.files[join(model.encoder_folder, "tokenizer.json")]


def with_pretrained(
    settings: Settings, *, changed: Collection[str], trust: Trust, workdir: AnyPath | None
) -> Settings:
    """Add the pretrained models to the settings, and fill in the values that follow from them.

    Args:
      settings: the settings, as in the config.
      changed: dotted names of the fields that the user changed.
      trust: unless it is `None`, nothing outside `workdir` is read.
      workdir: the workdir of a run that has begun. Its copies of the models are read, so the
        original folders may be gone.

    Raises:
      ValueError: for an unreadable model, a setting that contradicts it, or incompatible models.
      OSError: if the folder of a model does not exist.
    """
    if settings.init_from is not None and (trust is None or workdir is not None):
        run = origin_of(settings.init_from)[0] if workdir is None else workdir
        settings = settings._replace(data=_with_text_rules(settings.data, run))
    settings = settings._replace(model=_with_second_tower(settings))
    model, modality = settings.model, settings.data.modality
    if model.shared and model.key.pretrained is not None:
        raise ValueError(
            f"model.key.pretrained={model.key.pretrained!r} sets a separate encoder for keys; "
            "set model.shared=False, or leave model.key.pretrained unset"
        )
    modalities = {"model": modality.query, "model.key": modality.key}
    models = {
        section: read_pretrained(folder, modality=modalities[section])
        for section in (COPIES if not model.shared else ("model",))
        if (folder := _folder(section, settings, trust, workdir)) is not None
    }
    named = dict.fromkeys(models, PRETRAINED)
    key = model.key._replace(name=named.get("model.key", model.key.name))
    name = named.get("model", model.name or DEFAULT_ENCODER)
    settings = settings._replace(model=model._replace(name=name, key=key))
    if not models:
        return settings
    settings = _with_derived(settings, models, changed)
    # The recorded config of a run already has these values.
    return _with_logits(settings, models, changed) if trust is None else settings


def _with_second_tower(settings: Settings) -> ModelSettings:
    """The model settings, with a key tower from the folder of `model.pretrained` if necessary.

    If the sides have different modalities and only `model.pretrained` is set, its folder must hold
    the towers of both sides.
    """
    model, modality = settings.model, settings.data.modality
    own = model.key.name is not None or model.key.pretrained is not None
    if model.shared or own or modality.query == modality.key or model.pretrained is None:
        return model
    inherited = {
        name: value
        for name, value in model.options.items()
        if name in _SHARED_OPTIONS and model.key.options.get(name) is None
    }
    options = {**model.key.options, **inherited}
    key = model.key._replace(name=PRETRAINED, pretrained=model.pretrained, options=options)
    return model._replace(key=key)


def _with_text_rules(data: DataSettings, run: AnyPath) -> DataSettings:
    """Fill in unset prompts and special tokens of the data settings from a run."""
    if not (run / "config.json").exists():
        return data
    recorded = read_json_object(run / "config.json").get("data", {})
    known = {name: recorded[name] for name in _TEXT_RULES if name in recorded}
    other: Any = read_section(DataSettings, known, path="data")
    prompts = {
        side: getattr(other.prompts, side) for side in SIDES if getattr(data.prompts, side) is None
    }
    unset = {name: getattr(other, name) for name in _TEXT_RULES[1:] if getattr(data, name) is None}
    return data._replace(prompts=data.prompts._replace(**prompts), **unset)


def _folder(
    section: str, settings: Settings, trust: Trust, workdir: AnyPath | None
) -> AnyPath | None:
    """The folder of a section's pretrained model; `None` if its encoder is not pretrained."""
    tower: Any = settings.model if section == "model" else settings.model.key
    if tower.name not in (None, PRETRAINED):
        return None
    folder = None
    if workdir is not None and (tower.pretrained or settings.init_from):
        folder = _copy_in(workdir, section)
    if folder is None and trust is None:
        if tower.pretrained is not None:
            folder = local_or_hub(tower.pretrained)
        elif settings.init_from is not None:
            folder = _copy_in(origin_of(settings.init_from)[0], section)
    if folder is None and tower.name == PRETRAINED:
        raise ValueError(_missing(section, trust, workdir))
    return folder


def _copy_in(workdir: AnyPath, section: str) -> AnyPath | None:
    folder = workdir / COPIES[section]
    if not is_remote(folder) and folder.is_symlink():
        raise ValueError(
            f"{folder} is a link, which may lead out of the workdir; put a copy of the folder there"
        )
    return folder if folder.is_dir() else None


def _missing(section: str, trust: Trust, workdir: AnyPath | None) -> str:
    if trust is not None:
        return (
            f"{workdir} has no folder {COPIES[section]} with the run's copy of its pretrained "
            "model; restore it from a copy"
        )
    return (
        f"{section}.name={PRETRAINED!r} needs a pretrained model; give its folder with "
        f"--config.{section}.pretrained=FOLDER"
    )


def _with_derived(
    settings: Settings, models: Mapping[str, PretrainedModel], changed: Collection[str]
) -> Settings:
    _check_agreement(models, settings.data)
    section, first = next(iter(models.items()))
    _check_own(settings, "model.dim", first.dim, changed, section)
    settings = settings._replace(
        model=settings.model._replace(dim=first.dim),
        parts=settings.parts._replace(pretrained=models),
    )
    texts = {name: model for name, model in models.items() if model.modality == "text"}
    images = {name: model for name, model in models.items() if model.modality == "image"}
    if texts:
        settings = _with_texts(settings, texts, changed)
    return _with_images(settings, images, changed) if images else settings


def _with_texts(
    settings: Settings, models: Mapping[str, PretrainedModel], changed: Collection[str]
) -> Settings:
    """The settings with the vocabulary, the special tokens and the prompts of text encoders."""
    data = settings.data
    section, first = next(iter(models.items()))
    size = min(model.vocabulary_size for model in models.values())
    wanted = {
        "data.vocabulary_size": size,
        "data.tokenizer": None,
        "data.add_cls": False,
        "data.distinct_tokens": False,
    }
    for field, value in wanted.items():
        _check_own(settings, field, value, changed, section)
    sections = tower_sections(settings.model)
    prompts = {
        side: models[one].prompts.get(side, "")
        for side in SIDES
        if (one := sections.get(side, "model")) in models and getattr(data.prompts, side) is None
    }
    derived: dict[str, Any] = {
        "special_tokens": first.special_tokens,
        "skip_unknown": first.skip_unknown,
        "exclude_prompt": not first.pooling.include_prompt,
    }
    unset = {name: value for name, value in derived.items() if getattr(data, name) is None}
    for name, model in models.items():
        required = FAMILIES[model.family].required_token(model.config)
        if required is not None and data.special_tokens is not None:
            _check_own(settings, "data.special_tokens", True, changed, name)
    data = data._replace(vocabulary_size=size, prompts=data.prompts._replace(**prompts), **unset)
    return settings._replace(data=data)


def _with_images(
    settings: Settings, models: Mapping[str, PretrainedModel], changed: Collection[str]
) -> Settings:
    """The settings with the size and the shape of images that the encoders were trained with."""
    section, first = next(iter(models.items()))
    tower: Any = settings.model if section == "model" else settings.model.key
    rule, image_size = first.images, tower.options.get("image_size")
    assert rule is not None  # every image encoder has a rule
    if image_size is not None:
        rule = with_image_size(rule, image_size)
    _check_own(settings, "data.images.resize", rule.resize, changed, section)
    images = settings.data.images._replace(resize=rule.resize)
    default = images._field_defaults["size"]
    if images.size == default and "data.images.size" not in changed:
        images = images._replace(size=rule.size)
    return settings._replace(data=settings.data._replace(images=images))


def _with_logits(
    settings: Settings, models: Mapping[str, PretrainedModel], changed: Collection[str]
) -> Settings:
    """The settings with the temperature and bias that two towers were trained with.

    Only values that the user left at their defaults are replaced.
    """
    loss, (first, *others) = settings.loss, models.values()
    both = bool(others) and others[0].modality != first.modality
    if not both or not first.logits or others[0].logits != first.logits:
        return settings
    temperature = loss.temperature
    unset = not any(field.startswith("loss.temperature") for field in changed)
    if unset and temperature == type(temperature)() and "logit_scale" in first.logits:
        initial = min(math.exp(-first.logits["logit_scale"]), temperature.maximum)
        temperature = temperature._replace(
            initial=initial, minimum=min(initial, temperature.minimum)
        )
    part, bias = LOSSES.get(loss.name), loss.bias
    learned = part is not None and part.has_bias and loss.options.get("bias") is None
    if bias is None and learned:
        bias = first.logits.get("logit_bias")
    return settings._replace(loss=loss._replace(temperature=temperature, bias=bias))


def _check_own(
    settings: Settings, field: str, wanted: Any, changed: Collection[str], section: str
) -> None:
    """Raise a `ValueError` if the user set a field to a value that differs from the model's."""
    *parents, name = field.split(".")
    values: Any = settings
    for parent in parents:
        values = getattr(values, parent)
    value, default = getattr(values, name), values._field_defaults[name]
    if value != wanted and (value != default or field in changed):
        raise ValueError(
            f"{field}={value!r}, but the model of {section}.pretrained needs {wanted!r}; set it to "
            f"{wanted!r}, or leave it unset"
        )


def _check_agreement(models: Mapping[str, PretrainedModel], data: DataSettings) -> None:
    """Raise a `ValueError` if the encoders of the two sides are incompatible."""
    query, key = ([*models.values()] * 2)[:2]
    if query.dim != key.dim:
        raise ValueError(
            f"model.pretrained has embeddings of width {query.dim}, but model.key.pretrained "
            f"of width {key.dim}; choose two models of the same width"
        )
    if query.modality != key.modality or query.modality == "image":
        return
    if _token_rule(query) != _token_rule(key):
        raise ValueError(
            "model.pretrained and model.key.pretrained have different tokenizers, but a run has "
            "only one; choose two models with the same tokenizer"
        )
    included = query.pooling.include_prompt, key.pooling.include_prompt
    if data.exclude_prompt is None and included[0] != included[1]:
        raise ValueError(
            "the pooling configs of model.pretrained and model.key.pretrained differ in "
            "include_prompt; set data.exclude_prompt"
        )


def _token_rule(model: PretrainedModel) -> tuple[Any, ...]:
    """Everything that determines a text's tokens, except the file's padding and truncation."""
    content = json.loads(tokenizer_of(model))
    tokenizer = {name: content[name] for name in content.keys() - {"padding", "truncation"}}
    return tokenizer, model.special_tokens, model.skip_unknown
