"""How does fine-tuning with jaxcl compare with sentence-transformers on the same batches?

    python -m jaxcl.bench finetune --model FOLDER --pairs 640 --torch-python PYTHON

Both train in turn on the batches of `configs/finetune.py`, with the same learning rates, weight
decay, clipping and temperature. Both embed the held-out pairs, and one function ranks them. The
encoder's pretraining data are unknown, and may include the public code of the held-out pairs.
"""

import json
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxcl.assignment import uniform_rows
from jaxcl.bench.benchmark_parser import add_training_flags, benchmark_parser
from jaxcl.data.prepare import open_sources
from jaxcl.data.sources import PairSource
from jaxcl.evaluation.retrieval import METRICS, evaluate_retrieval
from jaxcl.host.progress import say
from jaxcl.host.user_folders import shared_folder
from jaxcl.metrics import paired_difference
from jaxcl.run.embedding_model import EmbeddingModel
from jaxcl.run.load_model import load
from jaxcl.settings.changed import changed_config
from jaxcl.settings.config_files import load_config
from jaxcl.settings.derived import learning_rate_of
from jaxcl.settings.read import read_settings
from jaxcl.settings.sections import Settings
from jaxcl.train import train
from jaxcl.typing import SIDES, Float

__all__ = [
    "Trained",
    "as_record",
    "embed",
    "held_out_texts",
    "main",
    "measure",
    "torch_spec",
    "train_in_torch",
    "train_jaxcl",
]

_PROGRAM = Path(__file__).with_name("finetune_torch.py")
_HELD_OUT = ("validation", "test")
Vectors = Mapping[str, Float[np.ndarray, "_ d"]]


class Trained(NamedTuple):
    """The embeddings of the held-out texts after training, and the CPU seconds of training."""

    vectors: Vectors
    cpu_seconds: float


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Measure one number of pairs."""
    parser = benchmark_parser("finetune", __doc__)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="the pretrained encoder")
    parser.add_argument("--pairs", type=int, default=640, help="training pairs, each seen once")
    parser.add_argument("--batch", type=int, default=64, help="pairs per batch")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--max-pairs", type=int, help="pairs of the data set to use (default: all)")
    add_training_flags(parser)
    return measure(**vars(parser.parse(argv)))


def measure(
    *,
    model: str,
    pairs: int,
    batch: int,
    learning_rate: float,
    max_pairs: int | None,
    seeds: int,
    torch_python: str | None,
) -> dict[str, Any]:
    """Train with each seed, and rank all keys of a split for each held-out query.

    Args:
      model: the folder of the pretrained encoder.
      pairs: the number of training pairs, rounded down to whole batches.
      batch: pairs per batch.
      learning_rate: the peak learning rate.
      max_pairs: the number of pairs of the data set to use; `None` for all.
      seeds: the number of seeds, from 0.
      torch_python: an interpreter with sentence-transformers; `None` measures jaxcl only.
    """
    steps = pairs // batch
    config = changed_config(
        load_config("finetune"),
        {
            "model.pretrained": str(Path(model).resolve()),
            "steps": steps,
            "global_batch_size": batch,
            "grad_cache.chunk_size": min(batch, 64),
            "optimizer.learning_rate": learning_rate,
            "optimizer.warmup_steps": steps // 10,
            "data.code_pairs.max_pairs": max_pairs,
        },
    )
    settings = read_settings(config)
    sources = open_sources(settings.data, data_dir=shared_folder(settings.run.data_dir))
    texts = held_out_texts(sources)
    results: dict[str, list[Trained]] = {"frozen": [Trained(embed(load(model), texts), 0.0)]}
    for seed in range(seeds):
        own = changed_config(config, {"seed": seed})
        say(f"jaxcl, seed {seed}")
        results.setdefault("jaxcl", []).append(train_jaxcl(own, texts))
        if torch_python is not None:
            say(f"sentence-transformers, seed {seed}")
            spec = torch_spec(read_settings(own), sources["train"], texts)
            trained = train_in_torch(torch_python, spec)
            results.setdefault("sentence-transformers", []).append(trained)
    return as_record(results, {"pairs": steps * batch, "batch": batch, "rate": learning_rate})


def held_out_texts(sources: Mapping[str, PairSource]) -> dict[str, list[str]]:
    """The texts of each held-out split and side, by `"SPLIT/SIDE"`."""
    records = {split: sources[split].read(np.arange(len(sources[split]))) for split in _HELD_OUT}
    return {
        f"{split}/{side}": [record[side] for record in records[split]]
        for split in _HELD_OUT
        for side in SIDES
    }


def embed(model: EmbeddingModel, texts: Mapping[str, Sequence[str]]) -> Vectors:
    """Embed the texts under each `"NAME/SIDE"` as texts of that side."""
    return {
        name: model.encode(several, side=name.rpartition("/")[2]) for name, several in texts.items()
    }


def train_jaxcl(
    config: ConfigDict, texts: Mapping[str, Sequence[str]], workdir: Path | None = None
) -> Trained:
    """Train as `python -m jaxcl.train` does, but without the final evaluation, and embed texts.

    Args:
      config: the run's config.
      texts: the texts to embed after training, by `"SPLIT/SIDE"`.
      workdir: where to keep the run; `None` for a temporary folder.
    """
    config = changed_config(config, {})
    config.data.splits = ConfigDict({"train": "train"})
    with tempfile.TemporaryDirectory() as folder:
        workdir = workdir or Path(folder) / "run"
        start = time.process_time()
        train(config, workdir)
        seconds = time.process_time() - start
        return Trained(embed(load(workdir), texts), seconds)


def torch_spec(
    settings: Settings, source: PairSource, texts: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """The specification for `finetune_torch.py`, with the batches and learning rates of the run."""
    learning_rate = learning_rate_of(settings.optimizer, settings.parts, steps=settings.steps)
    batches = []
    for step in range(settings.steps):
        rows = uniform_rows(
            step,
            num_rows=len(source),
            batch_size=settings.global_batch_size,
            seed=settings.seed,
        )
        records = source.read(rows)
        batches.append({side: [record[side] for record in records] for side in SIDES})
    return {
        "model": settings.model.pretrained,
        "seed": settings.seed,
        "max_tokens": settings.data.max_tokens.key,  # SentenceTransformer has one limit
        "temperature": settings.loss.temperature.initial,
        "weight_decay": settings.optimizer.weight_decay,
        "clip_norm": settings.optimizer.clip_norm,
        "learning_rates": [float(learning_rate(step)) for step in range(settings.steps)],
        "batches": batches,
        "texts": dict(texts),
    }


def train_in_torch(python: str, spec: dict[str, Any]) -> Trained:
    """Train with sentence-transformers in an interpreter that has it."""
    with tempfile.TemporaryDirectory() as folder:
        output, file = Path(folder) / "vectors.npz", Path(folder) / "spec.json"
        file.write_text(json.dumps(spec | {"output": str(output)}))
        run = subprocess.run(
            [python, str(_PROGRAM), str(file)], stdout=subprocess.PIPE, text=True, check=False
        )
        if run.returncode:
            raise RuntimeError(
                f"the PyTorch process of {python} exited with code {run.returncode}; "
                "--torch-python needs an interpreter with sentence-transformers"
            )
        with np.load(output) as vectors:
            embedded = {name: vectors[name] for name in spec["texts"]}
    return Trained(embedded, json.loads(run.stdout.splitlines()[-1])["CPU seconds"])


def as_record(results: Mapping[str, Sequence[Trained]], shapes: dict[str, Any]) -> dict[str, Any]:
    """The record that `jaxcl.bench` prints: MRR@10, and jaxcl less each alternative."""
    values = {
        (name, split): [_reciprocal_ranks(one.vectors, split) for one in trained]
        for name, trained in results.items()
        for split in _HELD_OUT
    }
    facts: dict[str, Any] = {}
    for name, trained in results.items():
        if name != "frozen":
            seconds = [round(one.cpu_seconds) for one in trained]
            facts[f"CPU seconds of training, {name}"] = ", ".join(map(str, seconds))
    for (name, split), ranks in values.items():
        facts[f"rows of {split}"] = len(ranks[0])
        for other in results:
            if name != "jaxcl" or other == "jaxcl":
                continue
            base = values[other, split]
            difference, error = paired_difference(np.mean(ranks, axis=0), np.mean(base, axis=0))
            facts[f"{split}: jaxcl less {other}"] = f"{difference:+.4f} ± {error:.4f}"
    rounds = {
        f"{name}, {split}": [float(one.mean()) for one in v] for (name, split), v in values.items()
    }
    return {"shapes": shapes, "unit": "MRR@10", "rounds": rounds, "facts": facts}


def _reciprocal_ranks(vectors: Vectors, split: str) -> Float[np.ndarray, " n"]:
    queries, keys = (vectors[f"{split}/{side}"] for side in SIDES)
    ranked = evaluate_retrieval(None, None, queries, keys, methods=("dense",))
    return METRICS["mrr@10"](ranked["dense"].ranks)
