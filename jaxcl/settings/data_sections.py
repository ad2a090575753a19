"""The settings of `config.data`: the rows of a run, and how they become inputs."""

from collections.abc import Mapping
from typing import Annotated, NamedTuple

from jaxcl.settings.ranges import Seed
from jaxcl.typing import Count, Range, Size

__all__ = [
    "CodePairsSettings",
    "DataSet",
    "DataSettings",
    "FileSettings",
    "ImageSettings",
    "MaxTokens",
    "SideModalities",
    "SidePrompts",
]

Level = Annotated[int, Range(least=0, most=255)]  # of a colour


class CodePairsSettings(NamedTuple):
    """Pairs of docstrings and functions from the installed packages."""

    test_packages: tuple[str, ...] = ("stdlib",)
    validation_fraction: Annotated[float, Range(least=0, below=1)] = 0.1
    split_seed: Seed = 0
    max_pairs: Size | None = None


class MaxTokens(NamedTuple):
    """The longest text of each side, in tokens."""

    query: Size = 32
    key: Size = 128


class FileSettings(NamedTuple):
    """Options for reading files of pairs; unset columns are recognised by common names."""

    negatives_field: str | None = None
    scores_field: str | None = None
    label_field: str | None = None
    min_label: Annotated[float, Range()] | None = None
    split_by: str = "query"
    bad_rows: str = "error"


class SidePrompts(NamedTuple):
    """The prompt that precedes each text of a side; `None` for the pretrained model's prompt."""

    query: str | None = None
    key: str | None = None


class DataSet(NamedTuple):
    """A data set (prepared, or in files): its splits by role, the fields to read, and its prompts.

    A prompt of `None` uses the prompt of the run.
    """

    name: str | None = None
    splits: Mapping[str, str] = {}
    query_field: str = "query"
    key_field: str = "key"
    group_field: str | None = None
    score_field: str | None = None
    metadata_fields: tuple[str, ...] = ()
    files: FileSettings = FileSettings()
    prompts: SidePrompts = SidePrompts()


class SideModalities(NamedTuple):
    """The modality of each side, one of `jaxcl.data.modalities.MODALITIES`."""

    query: str = "text"
    key: str = "text"


class ImageSettings(NamedTuple):
    """The rule for decoding image files to arrays, and what to do with unreadable files."""

    size: Size = 224
    resize: str = "crop"
    background: tuple[Level, Level, Level] = (255, 255, 255)
    bad: str = "error"


class DataSettings(NamedTuple):
    """The rows of a run, and how their texts are tokenized and their images decoded."""

    name: str | None = None
    code_pairs: CodePairsSettings | None = None
    splits: Mapping[str, str] = {"train": "train[:95%]", "validation": "train[95%:]"}
    query_field: str = "query"
    key_field: str = "key"
    concatenated: Mapping[str, DataSet] = {}
    group_field: str | None = None
    score_field: str | None = None
    metadata_fields: tuple[str, ...] = ()
    files: FileSettings = FileSettings()
    negatives: str | None = None
    negatives_per_row: Count | None = None
    guides: str | None = None
    topics: str | None = None
    modality: SideModalities = SideModalities()
    tokenizer: str | None = None
    vocabulary_size: Size = 16_384
    max_tokens: MaxTokens = MaxTokens()
    add_cls: bool = False
    distinct_tokens: bool = False
    special_tokens: bool | None = None
    prompts: SidePrompts = SidePrompts()
    exclude_prompt: bool | None = None
    skip_unknown: bool | None = None
    images: ImageSettings = ImageSettings()

    @property
    def first(self) -> DataSet:
        """The first data set, to which the data sets of `concatenated` are appended."""
        return DataSet(*(getattr(self, field) for field in DataSet._fields))
