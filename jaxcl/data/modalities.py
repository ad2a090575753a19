"""The registry of modalities, and the modality of texts.

`config.data.modality.query` and `.key` name one of `MODALITIES`. Code outside this folder and the
models sees only trees of arrays.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from jaxcl.data.images.image_modality import Image
from jaxcl.data.modality import Modality, Reader, Split
from jaxcl.data.row_prompts import prompt_of, row_prompts
from jaxcl.data.source_fields import read_fields
from jaxcl.data.sources import PairSource
from jaxcl.data.table import Table, join_sides
from jaxcl.data.text_rule import TextRule, TextTokenizer, as_inputs, input_spec
from jaxcl.data.token_table import build_token_table
from jaxcl.data.tokenizer import (
    check_texts,
    load_pretrained_tokenizer,
    load_tokenizer,
    tokenizer_fingerprint,
    train_tokenizer,
)
from jaxcl.host.files import write_whole
from jaxcl.host.paths import AnyPath, as_path
from jaxcl.host.progress import progress_bar
from jaxcl.settings.data_sections import DataSettings
from jaxcl.settings.derived import data_sets_of
from jaxcl.typing import PADDING_ID, SIDES, Array, Int, PyTree

__all__ = [
    "MODALITIES",
    "Image",
    "Modality",
    "Reader",
    "Split",
    "Text",
    "build_readers",
    "check_inputs",
    "input_fingerprints",
    "modality_of",
    "open_tables",
    "text_rule",
    "usable_rows",
]

_CHUNK_ROWS = 4096


class Text:
    """Texts as token ids. An encoder's first argument is the size of the vocabulary."""

    files: tuple[str, ...] = ("tokenizer.json",)

    def usable(self, data: DataSettings, source: PairSource, split: Split) -> PairSource:
        """All rows; `prepare` and `open_table` raise an error for rows that are not texts."""
        return source

    def prepare(
        self, data: DataSettings, train: PairSource, sides: tuple[str, ...], workdir: AnyPath
    ) -> None:
        """Write the run's tokenizer: a copy of `data.tokenizer`, or one trained on these rows."""
        path = _tokenizer_file(workdir)
        if not path.exists():
            if data.tokenizer is not None:
                tokenizer = _tokenizer_of_settings(data)
            elif data.special_tokens is not None:
                raise ValueError(
                    f"data.special_tokens={data.special_tokens} needs a pretrained tokenizer, "
                    "but this run trains its own; set data.tokenizer, or set "
                    "data.special_tokens to None"
                )
            else:
                with progress_bar("reading texts for the tokenizer", len(train)) as advance:
                    texts = _texts(train, sides, advance)
                    tokenizer = train_tokenizer(texts, vocabulary_size=data.vocabulary_size)
            write_whole(path, tokenizer.to_str())
        num_ids = max(self.tokenizer(data, workdir).get_vocab().values()) + 1
        if num_ids > data.vocabulary_size:
            raise ValueError(
                f"the tokenizer's ids go up to {num_ids - 1}, but "
                f"data.vocabulary_size={data.vocabulary_size}; set it to at least {num_ids}"
            )

    def open_table(
        self, data: DataSettings, source: PairSource, split: Split, workdir: AnyPath
    ) -> Table:
        """The split's token ids, computed once and cached in the shared folder."""
        with progress_bar(f"tokenizing {split.role}", len(source)) as advance:
            return build_token_table(
                source,
                self.tokenizer(data, workdir),
                rules={side: text_rule(data, side) for side in SIDES},
                sides=split.sides,
                prompts=row_prompts(data, split.role, source),
                directory=split.data_dir / "tokens",
                advance=advance,
            )

    def tokenizer(self, data: DataSettings, workdir: AnyPath) -> Tokenizer:
        """The run's tokenizer."""
        return _load(data, _tokenizer_file(workdir))

    def reader(self, data: DataSettings, side: str, workdir: AnyPath) -> Reader:
        """A function from texts to the inputs that `spec` describes, padded to the side's width."""
        rule = text_rule(data, side)
        text = TextTokenizer(self.tokenizer(data, workdir), rule)
        return lambda values: text.inputs(text.tokenize(values), rule.max_tokens)

    def fingerprint(self, workdir: AnyPath) -> str:
        """A hash of the tokenizer."""
        return tokenizer_fingerprint(load_pretrained_tokenizer(_tokenizer_file(workdir)))

    def changed(self, workdir: AnyPath) -> str:
        """A message that asks to restore the run's tokenizer."""
        return (
            f"{_tokenizer_file(workdir).name} in {workdir} has changed since the run was trained; "
            "restore it from a copy"
        )

    def encoder_argument(self, data: DataSettings, side: str) -> int:
        """The size of the vocabulary."""
        return data.vocabulary_size

    def spec(self, data: DataSettings, side: str) -> PyTree:
        """`{"tokens": int32[t]}`, and an int32 for each of `TextRule.numbers`."""
        return input_spec(_training_rule(data, side))

    def random_inputs(
        self, data: DataSettings, side: str, rng: np.random.Generator, num_rows: int
    ) -> PyTree:
        """Random tokens, none of them padding."""
        rule = _training_rule(data, side)
        lengths = np.full(num_rows, rule.max_tokens)
        ids = rng.integers(1, data.vocabulary_size, (num_rows, rule.max_tokens)).ravel()
        return as_inputs(ids, lengths, rule, width=rule.max_tokens, prompt_length=1)

    def length(self, data: DataSettings, side: str) -> int:
        """The width of a side's batches, in tokens."""
        return getattr(data.max_tokens, side)

    def count(self, inputs: PyTree) -> Int[Array, ""]:
        """The number of tokens."""
        if "length" in inputs:
            return jnp.sum(inputs["length"])
        return jnp.count_nonzero(inputs["tokens"] != PADDING_ID)


MODALITIES: Mapping[str, Modality] = {"text": Text(), "image": Image()}
"""The modalities by name, as in `config.data.modality.query` and `.key`."""


def modality_of(data: DataSettings, side: str) -> Modality:
    """The modality of a side.

    Raises:
      ValueError: for an unknown name.
    """
    name = getattr(data.modality, side)
    if name not in MODALITIES:
        raise ValueError(
            f"data.modality.{side}={name!r} is unknown; use one of {', '.join(MODALITIES)}"
        )
    return MODALITIES[name]


def build_readers(data: DataSettings, workdir: AnyPath) -> dict[str, Reader]:
    """The readers of both sides of a run, by side."""
    return {side: modality_of(data, side).reader(data, side, workdir) for side in SIDES}


def input_fingerprints(data: DataSettings, workdir: AnyPath) -> dict[str, str]:
    """The fingerprints of the workdir's files that inputs depend on, such as the tokenizer."""
    modalities = {getattr(data.modality, side): modality_of(data, side) for side in SIDES}
    return {f"inputs.{name}": kind.fingerprint(workdir) for name, kind in modalities.items()}


def check_inputs(data: DataSettings, workdir: AnyPath, recorded: Mapping[str, str]) -> None:
    """Compare the files in a workdir that inputs depend on with their recorded fingerprints.

    Args:
      data: the run's settings.
      workdir: the run's own folder.
      recorded: the fingerprints that the run recorded at an earlier start. Files that have no
        recorded fingerprint, as in runs of earlier versions, are not compared.

    Raises:
      ValueError: if a file has changed.
    """
    for name, fingerprint in input_fingerprints(data, workdir).items():
        if recorded.get(name, fingerprint) != fingerprint:
            change = MODALITIES[name.removeprefix("inputs.")].changed(workdir)
            raise ValueError(f"{change}, or train again in another --workdir")


def open_tables(
    data: DataSettings,
    sources: Mapping[str, PairSource],
    *,
    data_dir: Path,
    workdir: AnyPath,
    recorded: Mapping[str, str] | None = None,
) -> dict[str, Table]:
    """Prepare the modalities, and open the table of each split, by role.

    Args:
      data: the run's settings.
      sources: role -> the split's rows. The files that inputs depend on are prepared from
        `"train"`; without that role they must exist.
      data_dir: the folder that runs share.
      workdir: the run's own folder.
      recorded: as in `check_inputs`.

    Raises:
      ValueError: if a file that inputs depend on has changed since it was recorded.
    """
    sides_of = _sides_of(data)
    if "train" in sources:
        for sides in sides_of.values():
            modality_of(data, sides[0]).prepare(data, sources["train"], sides, workdir)
    check_inputs(data, workdir, recorded or {})
    tables = {}
    for role, source in sources.items():
        by_side: dict[str, Table] = {}
        for sides in sides_of.values():
            split = Split(role, sides, data_dir)
            table = modality_of(data, sides[0]).open_table(data, source, split, workdir)
            by_side |= dict.fromkeys(sides, table)
        tables[role] = join_sides(by_side)
    return tables


def usable_rows(data: DataSettings, source: PairSource, role: str, *, data_dir: Path) -> PairSource:
    """The rows of a data set whose values the modalities of both sides can read.

    Args:
      data: the run's settings.
      source: the rows of one data set.
      role: the split's role, such as `"train"`.
      data_dir: the folder that runs share.

    Raises:
      ValueError: if a value cannot be read, and the settings do not allow its row to be skipped.
    """
    for sides in _sides_of(data).values():
        modality = modality_of(data, sides[0])
        source = modality.usable(data, source, Split(role, sides, data_dir))
    return source


def text_rule(data: DataSettings, side: str) -> TextRule:
    """The rule by which the texts of a side become tokens, with the run's prompt."""
    return TextRule(
        max_tokens=getattr(data.max_tokens, side),
        add_cls=data.add_cls,
        distinct=data.distinct_tokens,
        special_tokens=data.special_tokens,
        prompt=getattr(data.prompts, side) or "",
        exclude_prompt=bool(data.exclude_prompt),
        skip_unknown=bool(data.skip_unknown),
    )


def _sides_of(data: DataSettings) -> dict[str, tuple[str, ...]]:
    """The sides of each modality, by the modality's name."""
    sides_of: dict[str, tuple[str, ...]] = {}
    for side in SIDES:
        name = getattr(data.modality, side)
        sides_of[name] = (*sides_of.get(name, ()), side)
    return sides_of


def _training_rule(data: DataSettings, side: str) -> TextRule:
    """The rule that describes a batch. It has a prompt if any training row has one."""
    data_sets = data_sets_of(data, "train").values()
    prompts = [prompt_of(data, data_set.prompts, side) for data_set in data_sets]
    return text_rule(data, side)._replace(prompt=next(filter(None, prompts), ""))


def _load(data: DataSettings, path: AnyPath) -> Tokenizer:
    if data.special_tokens is None:
        return load_tokenizer(path)
    return load_pretrained_tokenizer(path)


def _tokenizer_of_settings(data: DataSettings) -> Tokenizer:
    try:
        return _load(data, as_path(str(data.tokenizer)))
    except ValueError as error:
        raise ValueError(f"data.tokenizer={error}") from error


def _tokenizer_file(workdir: AnyPath) -> AnyPath:
    (name,) = Text.files
    return workdir / name


def _texts(
    source: PairSource, sides: Sequence[str], advance: Callable[[int], None]
) -> Iterator[str]:
    for first in range(0, len(source), _CHUNK_ROWS):
        rows = np.arange(first, min(first + _CHUNK_ROWS, len(source)))
        records = read_fields(source, rows, sides)
        for side in sides:
            check_texts([record[side] for record in records], what=f"{side} of row", first=first)
        yield from (record[side] for record in records for side in sides)
        advance(len(rows))
