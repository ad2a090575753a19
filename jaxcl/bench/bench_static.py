"""How good is the static encoder, compared with `StaticEmbedding` of sentence-transformers?

    python -m jaxcl.bench static --torch-python PYTHON [--seeds N] [--torch-learning-rate RATE …]

Both train from random weights on the random batches of `configs/code_search.py:plain`, with the
same tokenizer and width. sentence-transformers uses the same schedule, scaled to each of the given
peak learning rates. One function ranks the held-out pairs.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxcl.bench.bench_finetune import (
    Trained,
    as_record,
    held_out_texts,
    torch_spec,
    train_in_torch,
    train_jaxcl,
)
from jaxcl.bench.benchmark_parser import add_training_flags, benchmark_parser
from jaxcl.data.prepare import open_sources
from jaxcl.host.progress import say
from jaxcl.host.user_folders import shared_folder
from jaxcl.settings.changed import changed_config
from jaxcl.settings.config_files import load_config
from jaxcl.settings.read import read_settings

__all__ = ["main", "measure"]


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Measure the default config."""
    parser = benchmark_parser("static", __doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--max-pairs", type=int, help="pairs of the data set to use (default: all)")
    parser.add_argument(
        "--torch-learning-rate", type=float, nargs="+", default=[2e-3, 2e-2], dest="torch_rates"
    )
    add_training_flags(parser)
    return measure(**vars(parser.parse(argv)))


def measure(
    *,
    seeds: int,
    steps: int,
    max_pairs: int | None,
    torch_rates: Sequence[float],
    torch_python: str | None,
) -> dict[str, Any]:
    """Train with each seed, and rank all keys of a split for each held-out query.

    Args:
      seeds: number of seeds, from 0.
      steps: number of optimizer steps.
      max_pairs: pairs of the data set to use; `None` for all.
      torch_rates: peak learning rates of sentence-transformers.
      torch_python: an interpreter with sentence-transformers; `None` measures jaxcl only.
    """
    config = changed_config(
        load_config("code_search:plain"), {"steps": steps, "data.code_pairs.max_pairs": max_pairs}
    )
    settings = read_settings(config)
    sources = open_sources(settings.data, data_dir=shared_folder(settings.run.data_dir))
    texts = held_out_texts(sources)
    results: dict[str, list[Trained]] = {}
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            own = changed_config(config, {"seed": seed})
            say(f"jaxcl, seed {seed}")
            workdir = Path(folder) / "run"
            results.setdefault("jaxcl", []).append(train_jaxcl(own, texts, workdir))
            for rate in torch_rates:
                if torch_python is None:
                    break
                say(f"sentence-transformers with learning rate {rate}, seed {seed}")
                spec = _static_spec(own, torch_spec(read_settings(own), sources["train"], texts))
                scale = rate / config.optimizer.learning_rate
                spec["learning_rates"] = [scale * one for one in spec["learning_rates"]]
                spec["tokenizer"] = str(workdir / "tokenizer.json")
                trained = train_in_torch(torch_python, spec)
                results.setdefault(f"sentence-transformers, {rate}", []).append(trained)
    return as_record(results, {"steps": steps, "batch": config.global_batch_size})


def _static_spec(config: ConfigDict, spec: Mapping[str, Any]) -> dict[str, Any]:
    return {**spec, "model": None, "dim": config.model.dim}
