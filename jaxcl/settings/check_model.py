"""The checks of the encoders, the lengths of texts, and the augmentation."""

from collections.abc import Mapping
from typing import Any

from jaxcl.models.layers import DEFAULT_MAX_TOKENS
from jaxcl.models.lora import BASE_DTYPES, Lora
from jaxcl.models.towers import Headed
from jaxcl.settings.sections import Settings
from jaxcl.typing import SIDES

__all__ = ["check_model"]


def check_model(settings: Settings) -> None:
    """Raise a `ValueError` for incompatible settings of encoders, texts and augmentations."""
    _check_widths(settings)
    model = settings.model
    if model.shared and model.key.name is not None:
        raise ValueError(
            f"model.key.name={model.key.name!r} is an encoder for the keys alone; set model.shared "
            "to False, or leave it None"
        )
    if model.key.name is None and _given(model.key.options):
        raise ValueError("model.key describes an encoder without a name; set model.key.name")
    for field, tower in (("model", model), ("model.key", model.key)):
        part = settings.parts.encoders.get(field)
        if tower.pretrained is not None and part is not None and part.load is None:
            raise ValueError(
                f"{field}.pretrained={tower.pretrained!r}, but the encoder {tower.name!r} cannot "
                "be loaded from a file; to fine-tune a pretrained model, set "
                f"{field}.name='pretrained' (configs/pairs.py:finetune does), or name an encoder "
                "that declares `load`"
            )
    for field, value in (
        ("model.pretrained", model.pretrained),
        ("model.key.pretrained", model.key.pretrained),
        ("data.tokenizer", settings.data.tokenizer),
    ):
        if settings.init_from is not None and value is not None:
            raise ValueError(
                f"{field}={value!r}, but init_from={settings.init_from!r} brings its own weights "
                "and tokenizer; leave one of the two None"
            )
    if model.shared and len(set(settings.data.modality)) > 1:
        raise ValueError(
            f"data.modality={settings.data.modality._asdict()} has two modalities, which one "
            "encoder cannot read; set model.shared to False, and model.key.name"
        )
    _check_lora(model.lora)
    _check_augmentation(settings)
    _check_projection_head(settings)


def _check_projection_head(settings: Settings) -> None:
    if settings.evaluation.projection_head:
        return
    for section, part in settings.parts.encoders.items():
        encoder = part.function
        if isinstance(encoder, type) and not issubclass(encoder, Headed):
            raise ValueError(
                f"evaluation.projection_head=False, but {section} has no projection head "
                f"({encoder.__name__}); leave it True"
            )


def _check_lora(lora: Lora) -> None:
    if lora.rank is not None and not lora.targets:
        raise ValueError("model.lora.targets is empty; name linear layers, or leave it unset")
    if lora.base_dtype is not None and lora.base_dtype not in BASE_DTYPES:
        raise ValueError(
            f"model.lora.base_dtype={lora.base_dtype!r} is unknown; use one of "
            f"{', '.join(BASE_DTYPES)}"
        )


def _check_augmentation(settings: Settings) -> None:
    augmentation = settings.augmentation
    if not augmentation.sides or set(augmentation.sides) - set(SIDES):
        raise ValueError(
            f"augmentation.sides={augmentation.sides}; name one or both of {', '.join(SIDES)}"
        )
    mask_id = augmentation.options.get("mask_id")
    if mask_id is not None and mask_id >= settings.data.vocabulary_size:
        raise ValueError(
            f"augmentation.options.mask_id={mask_id} is not a token; the vocabulary has "
            f"data.vocabulary_size={settings.data.vocabulary_size}"
        )


def _given(options: Mapping[str, Any]) -> bool:
    return any(value is not None for value in options.values())


def _check_widths(settings: Settings) -> None:
    model = settings.model
    key = ("model", model) if model.key.name is None else ("model.key", model.key)
    for side, (field, tower) in {"query": ("model", model), "key": key}.items():
        part = settings.parts.encoders.get(field)
        declared: Any = () if part is None or part.options is None else part.options
        default = DEFAULT_MAX_TOKENS if "max_tokens" in getattr(declared, "_fields", ()) else None
        longest = tower.options.get("max_tokens", default)
        width = getattr(settings.data.max_tokens, side)
        _check_pretrained_width(settings, side, field, width)
        if longest is not None and width > longest:
            raise ValueError(
                f"data.max_tokens.{side}={width}, but {field}.options.max_tokens={longest} is the "
                f"longest text that the encoder reads; set it to at least {width}"
            )


def _check_pretrained_width(settings: Settings, side: str, section: str, width: int) -> None:
    model = settings.parts.pretrained.get(section)
    if model is not None and model.max_tokens is not None and width > model.max_tokens:
        raise ValueError(
            f"data.max_tokens.{side}={width}, but the model of {section}.pretrained reads at most "
            f"{model.max_tokens} tokens; set data.max_tokens.{side} to {model.max_tokens} or less"
        )
