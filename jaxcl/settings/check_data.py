"""The checks of the data settings."""

from jaxcl.settings.data_sections import DataSet, DataSettings, FileSettings, ImageSettings
from jaxcl.settings.file_kinds import BUILT_IN
from jaxcl.typing import SIDES

__all__ = ["check_data"]

_BAD_ROWS = ("error", "skip")
_FIRST = "first"
_RESIZES = ("crop", "stretch")
_BAD_IMAGES = ("error", "skip")


def check_data(data: DataSettings) -> None:
    """Raise a `ValueError` for incompatible settings of data sets."""
    if data.negatives is not None and data.negatives_per_row:
        raise ValueError(
            f"data.negatives_per_row={data.negatives_per_row} counts texts that rows bring, and "
            f"data.negatives={data.negatives} gives each row other negatives; leave one None"
        )
    _check_files("data.files", data.files)
    _check_images(data.images)
    for name, data_set in data.concatenated.items():
        _check_concatenated(f"data.concatenated.{name}", name, data_set, data)


def _check_files(where: str, files: FileSettings) -> None:
    if files.bad_rows not in _BAD_ROWS:
        raise ValueError(
            f"{where}.bad_rows={files.bad_rows!r} is unknown; use {' or '.join(_BAD_ROWS)}"
        )
    if files.label_field is not None and files.min_label is None:
        raise ValueError(
            f"{where}.label_field={files.label_field!r} is read with {where}.min_label, the least "
            "label of the rows to train on; set it"
        )


def _check_images(images: ImageSettings) -> None:
    for field, known in (("resize", _RESIZES), ("bad", _BAD_IMAGES)):
        if (value := getattr(images, field)) not in known:
            raise ValueError(f"data.images.{field}={value!r} is unknown; use {' or '.join(known)}")


def _check_concatenated(where: str, name: str, data_set: DataSet, data: DataSettings) -> None:
    if name == _FIRST:
        raise ValueError(f"{where}: {_FIRST!r} is what data.name is called; choose another name")
    if not data_set.name or not data_set.splits:
        raise ValueError(
            f"{where} needs a name, of a data set or its folder, and splits, role -> split, such "
            "as {'train': 'train'}"
        )
    _check_files(f"{where}.files", data_set.files)
    if data_set.name in BUILT_IN:
        raise ValueError(
            f"{where}.name={data_set.name!r} is made for data.name alone; give the folder of "
            "prepared ones, as some run's data.json names it"
        )
    if (data_set.group_field is None) != (data.group_field is None):
        raise ValueError(
            f"{where}.group_field={data_set.group_field!r}, but data.group_field="
            f"{data.group_field!r}: rows without a group would all be of one; give both one, "
            "or neither"
        )
    if (data_set.score_field is None) != (data.score_field is None):
        raise ValueError(
            f"{where}.score_field={data_set.score_field!r}, but data.score_field="
            f"{data.score_field!r}: a loss that reads scores needs one for every row; give both "
            "one, or neither"
        )
    for side in SIDES:
        _check_prompt(f"{where}.prompts.{side}", getattr(data_set.prompts, side), data, side)
    for role in data_set.splits:
        if role not in data.splits:
            raise ValueError(
                f"{where}.splits has {role!r}; data.splits has {', '.join(data.splits)}, which "
                "rows can follow"
            )
        missing = set(data.metadata_fields) - set(data_set.metadata_fields)
        if role != "train" and missing:
            raise ValueError(
                f"{where}.metadata_fields lacks {sorted(missing)}, which the evaluation of "
                f"{role!r} may read; give them, or leave {role!r} out of its splits"
            )


def _check_prompt(setting: str, prompt: str | None, data: DataSettings, side: str) -> None:
    modality = getattr(data.modality, side)
    if prompt is not None and modality != "text":
        raise ValueError(
            f"{setting}={prompt!r} has no effect: data.modality.{side}={modality!r}, and only "
            "texts have prompts; leave it out"
        )
    if prompt in SIDES:
        raise ValueError(
            f"{setting}={prompt!r} is the name of the run's own prompt; write the prompt out, "
            f"such as {prompt + ': '!r}"
        )
