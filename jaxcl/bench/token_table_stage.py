"""Runs one stage of the benchmark `token_table`, and prints its measurements as JSON.

JAXCL_GENERATED_ROWS=1000000 python -m jaxcl.bench.token_table_stage build FOLDER
"""

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tokenizers import Tokenizer, models, pre_tokenizers

from jaxcl.assignment import uniform_rows
from jaxcl.data.loader import training_batches
from jaxcl.data.row_ranges import RowRange
from jaxcl.data.sources import checked_rows
from jaxcl.data.splits import open_splits
from jaxcl.data.text_rule import TextRule
from jaxcl.data.token_table import TokenTable, build_token_table
from jaxcl.data.tokenizer import PADDING, UNKNOWN, load_tokenizer
from jaxcl.host.progress import progress_bar
from jaxcl.ops.mesh import make_mesh
from jaxcl.settings.config_files import load_config
from jaxcl.settings.data_sections import DataSettings
from jaxcl.train import train
from jaxcl.typing import SIDES

__all__ = ["ROWS_VARIABLE", "STAGES", "GeneratedPairs", "open_generated"]

ROWS_VARIABLE = "JAXCL_GENERATED_ROWS"
"""The environment variable with the number of training rows that `open_generated` returns."""

_HELD_OUT_ROWS = 512
_WORDS = 1_000
_BATCH_SIZE = 256
_MAX_TOKENS = 16
_VOCABULARY = 2_000
_TOKENIZER = "tokenizer.json"
_FILE = "pairs.jsonl"


class GeneratedPairs:
    """Pairs of three words each, computed from the row number, so that no row is kept in memory.

    Queries are distinct. Every tenth row has the same key as the row before it.

    Args:
      num_rows: at most a billion.
      seed: determines the words.

    Attributes:
      words: the vocabulary.

    Example:
      >>> GeneratedPairs(3).read([2])
      [{'query': 'aaba aa aa', 'key': 'aa aaba aa'}]
    """

    def __init__(self, num_rows: int, *, seed: int = 0) -> None:
        self._num_rows, self._seed = num_rows, seed
        letters = [chr(ord("a") + (number + seed) % 26) for number in range(26)]
        syllables = [a + b for b in letters[:4] for a in letters[:8]]
        self.words = [a + b for a in syllables for b in ("", *syllables)][:_WORDS]

    @property
    def fingerprint(self) -> str:
        """A string that identifies the rows."""
        return f"generated:{self._num_rows}:{self._seed}"

    @property
    def row_ranges(self) -> tuple[RowRange, ...]:
        """Empty: these rows come from no file."""
        return ()

    def __len__(self) -> int:
        return self._num_rows

    def read(self, rows: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """Return one dict per row number, in the order given."""
        return [
            {"query": self._text(row), "key": self._text(row - (row % 10 == 9), turned=True)}
            for row in checked_rows(rows, num_rows=self._num_rows)
        ]

    def _text(self, number: int, *, turned: bool = False) -> str:
        low, middle, high = number % 1_000, number // 1_000 % 1_000, number // 1_000_000
        words = self.words
        if turned:
            return f"{words[middle]} {words[low]} {words[high]}"
        return f"{words[low]} {words[middle]} {words[high]}"


def open_generated(role: str) -> GeneratedPairs:
    """Open a split, as `data.name=jaxcl.bench.token_table_stage:open_generated` does."""
    if role == "train":
        return GeneratedPairs(int(os.environ[ROWS_VARIABLE]))
    return GeneratedPairs(_HELD_OUT_ROWS, seed=1)


def _word_tokenizer() -> Tokenizer:
    """A fast tokenizer with one token per word."""
    words = (PADDING, UNKNOWN, *GeneratedPairs(1).words)
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def _table(folder: Path) -> TokenTable:
    source, path = open_generated("train"), folder / _TOKENIZER
    if not path.exists():
        folder.mkdir(exist_ok=True)
        path.write_text(_word_tokenizer().to_str())
    tokenizer = load_tokenizer(path)
    with progress_bar("tokenizing", len(source)) as advance:
        return build_token_table(
            source,
            tokenizer,
            rules=dict.fromkeys(SIDES, TextRule(_MAX_TOKENS)),
            directory=folder / "tokens",
            advance=advance,
        )


def _build(folder: Path) -> dict[str, float]:
    table, seconds = _timed(lambda: _table(folder))
    return {"build": seconds, "distinct texts": float(table.text.max()) + 1}


def _open(folder: Path) -> dict[str, float]:
    table, seconds = _timed(lambda: _table(folder))

    def rows_of(step: int) -> np.ndarray:
        return uniform_rows(step, num_rows=table.num_rows, batch_size=_BATCH_SIZE, seed=0)

    batches = training_batches(table, rows_of, make_mesh({"data": -1}), first_step=0, last_step=9)
    _, batch_seconds = _timed(lambda: jax.block_until_ready(next(batches)))
    return {"open": seconds, "first batch": batch_seconds}


def _files(folder: Path) -> dict[str, float]:
    source, path = open_generated("train"), folder / _FILE
    folder.mkdir(exist_ok=True)
    (folder / _TOKENIZER).write_text(_word_tokenizer().to_str())
    with path.open("w") as file, progress_bar("writing rows", len(source)) as advance:
        for first in range(0, len(source), 4_096):
            records = source.read(range(first, min(first + 4_096, len(source))))
            file.writelines(json.dumps(record) + "\n" for record in records)
            advance(len(records))
    data = DataSettings(name=str(path), splits=_splits_of_file(len(source)))
    open_them = functools.partial(open_splits, data, str(path), data_dir=folder)
    _, first_seconds = _timed(open_them)
    return {"files read and split": first_seconds, "files split again": _timed(open_them)[1]}


def _splits_of_file(num_rows: int) -> dict[str, str]:
    percent = min(100 * _HELD_OUT_ROWS / num_rows, 50)
    return {"train": "rest", "validation": f"train[:{percent:.4f}%]"}


def _run_to(folder: Path, *, steps: int) -> float:
    config = load_config("base")
    file = folder / _FILE
    config.data.name = f"{__spec__.name}:open_generated"
    config.data.splits = ConfigDict({"train": "train", "validation": "validation"})
    if file.exists():
        config.data.name = str(file)
        config.data.splits = ConfigDict(_splits_of_file(len(open_generated("train"))))
    config.data.vocabulary_size = _VOCABULARY
    config.data.max_tokens = dict.fromkeys(SIDES, _MAX_TOKENS)
    config.data.tokenizer = str(folder / _TOKENIZER)  # to use the table of `_build`
    config.model.dim, config.steps, config.global_batch_size = 16, steps, _BATCH_SIZE
    config.optimizer.schedule = "warmup_constant"
    config.evaluation.methods = ("dense",)
    config.run.data_dir = str(folder)
    return _timed(lambda: train(config, folder / "run"))[1]


def _start(folder: Path) -> dict[str, float]:
    return {"run of 2 steps": _run_to(folder, steps=2)}


def _resume(folder: Path) -> dict[str, float]:
    return {"resumed for 2 more": _run_to(folder, steps=4)}


STAGES: Mapping[str, Callable[[Path], dict[str, float]]] = {
    "build": _build,
    "open": _open,
    "files": _files,
    "start": _start,
    "resume": _resume,
}
"""Name -> a function of the folder for the table, the file and the run, in this order."""


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def _peak_mebibytes() -> float:
    """This process's peak memory; the peak from `getrusage` would include its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**10


def main(argv: Sequence[str]) -> None:
    """Run one stage, and print its measurements."""
    stage, folder = argv
    jax.block_until_ready(jax.numpy.zeros(8) + 1)
    start = time.process_time()
    figures = STAGES[stage](Path(folder))
    cpu_seconds = time.process_time() - start
    print(json.dumps({"seconds": figures, "cpu": cpu_seconds, "peak": _peak_mebibytes()}))


if __name__ == "__main__":
    main(sys.argv[1:])
