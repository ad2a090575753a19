"""How many of the tokens that a step computes are padding, with one width and with several?

    python -m jaxcl.bench lengths [--rows 20000] [--devices 1 8] [--data questions code]

`code` is the code search of `configs/code_search_transformer.py`. `questions` is a generated file
of short questions and long passages, whose lengths are log-normal: medians of 10 and 100 words,
with a tenth of the passages longer than 280. Only lengths are counted; nothing is trained.

By default, a side has several widths only if they save enough to pay for the second pass of
gradient caching. In this benchmark, both sides always have several widths.
"""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcl.bench.benchmark_parser import benchmark_parser
from jaxcl.data.prepare import prepare_data
from jaxcl.host.user_folders import shared_folder
from jaxcl.run.text_widths import choose_text_widths
from jaxcl.settings.config_files import load_config
from jaxcl.settings.read import read_settings
from jaxcl.typing import SIDES

__all__ = ["main", "measure"]

_SYLLABLES = [consonant + vowel for consonant in "bdfglmnprstv" for vowel in "aeiou"]
_WORDS = [first + second for first in _SYLLABLES for second in _SYLLABLES[:10]]

_ROWS = 20_000
_WIDTHS = 12  # the most that a run on accelerators chooses by default


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Count the padding in both data sets, or in one."""
    parser = benchmark_parser("lengths", __doc__)
    parser.add_argument("--rows", type=int, default=_ROWS, help="rows of the generated file")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--data", nargs="+", choices=[*_CONFIGS], default=[*_CONFIGS])
    arguments = parser.parse(argv)
    return measure(arguments.data, num_rows=arguments.rows, devices=arguments.devices)


def measure(
    data: Sequence[str],
    *,
    num_rows: int = _ROWS,
    devices: Sequence[int] = (1, 8),
    changes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Count the padding in random batches of some data sets.

    Args:
      data: names of the data sets.
      num_rows: rows of the generated file.
      devices: numbers of devices over which a batch is sharded.
      changes: fields of the configs that differ.

    Returns:
      The record that `jaxcl.bench` prints, in shares of the computed tokens.
    """
    rounds: dict[str, list[float]] = {}
    facts: dict[str, Any] = {}
    sizes: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="jaxcl-bench-") as folder:
        for name in data:
            config = _CONFIGS[name](Path(folder), num_rows)
            config.update_from_flattened_dict(dict(changes or {}))
            default = read_settings(config)
            config.grad_cache.length_buckets = _WIDTHS
            settings = read_settings(config)
            workdir = Path(folder) / f"run-{name}"
            workdir.mkdir()
            data_dir = shared_folder(settings.run.data_dir)
            table = prepare_data(settings.data, data_dir=data_dir, workdir=workdir).tables["train"]
            sizes[f"{name}, batch"] = settings.global_batch_size
            sizes[f"{name}, rows"] = table.num_rows
            for count in devices:
                widths = choose_text_widths(settings, table, num_devices=count, platform="gpu")
                rounds[f"{name}: one width"] = [widths.padding_before(*SIDES)]
                rounds[f"{name}: several, {count} devices"] = [widths.padding(*SIDES)]
                sides = choose_text_widths(
                    default, table, num_devices=count, platform="gpu"
                ).buckets
                facts[f"{name}: several by default, {count} devices"] = ", ".join(sides) or "none"
                for side, buckets in widths.buckets.items():
                    facts[f"{name}: widths of each {side}"] = " ".join(map(str, buckets.widths))
                    share = widths.padding(side)
                    facts[f"{name}: padding of each {side}, {count} devices"] = share
    return {"shapes": sizes, "unit": "share", "rounds": rounds, "facts": facts}


def _code_search(folder: Path, num_rows: int) -> Any:
    return load_config("code_search_transformer")


def _questions(folder: Path, num_rows: int) -> Any:
    rng = np.random.default_rng(0)
    path = folder / "questions.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(num_rows):
            query, key = (_text(rng, *shape) for shape in ((10.0, 0.4), (100.0, 0.8)))
            file.write(json.dumps({"query": query, "key": key}) + "\n")
    config = load_config("pairs")
    config.data.name = str(path)
    config.data.max_tokens = {"query": 64, "key": 512}
    config.data.vocabulary_size = 2_000
    config.data.distinct_tokens = False
    config.augmentation.name = None
    config.model.name = "transformer"
    config.model.options.max_tokens = 512
    config.global_batch_size = 1_024
    config.run.data_dir = str(folder)
    return config


def _text(rng: np.random.Generator, median: float, spread: float) -> str:
    """A log-normal number of words of a small vocabulary."""
    count = max(1, round(median * np.exp(spread * rng.normal())))
    return " ".join(rng.choice(_WORDS, count))


_CONFIGS: Mapping[str, Callable[[Path, int], Any]] = {
    "questions": _questions,
    "code": _code_search,
}
