"""What helps sentence embeddings: SimCSE, paraphrases, random or assigned batches?

    python -m jaxcl.bench sentences --model FOLDER --pairs pairs.jsonl --texts texts.jsonl \\
        --sts sts-dev.csv [--num-pairs 2048] [--seeds 3] [--torch-python PYTHON]

Fine-tunes a pretrained encoder with the variants `simcse` (on the texts) and `pairs` (on the pairs)
of `configs/sentence_embedding.py`, with random batches and with batches that are assigned during
training (`assignment.name="gcbs"`). With `--torch-python`, sentence-transformers trains in turn on
the same random batches, with the same learning rates. One function evaluates all models on pairs
with scores (Spearman's correlation). Every setting trains on the same number of pairs.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxcl.bench.bench_finetune import Trained, embed, torch_spec, train_in_torch, train_jaxcl
from jaxcl.bench.benchmark_parser import add_training_flags, benchmark_parser
from jaxcl.data.prepare import open_sources
from jaxcl.evaluation.sts import StsSet, open_sts_set
from jaxcl.host.progress import say
from jaxcl.host.user_folders import shared_folder
from jaxcl.run.load_model import load
from jaxcl.settings.changed import changed_config
from jaxcl.settings.config_files import load_config
from jaxcl.settings.read import read_settings
from jaxcl.typing import Float

__all__ = ["main", "measure"]


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Measure one model."""
    parser = benchmark_parser("sentences", __doc__)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="the pretrained encoder")
    parser.add_argument("--pairs", required=True, metavar="FILE", help="pairs of paraphrases")
    parser.add_argument("--texts", required=True, metavar="FILE", help="texts for SimCSE")
    parser.add_argument("--sts", required=True, metavar="FILE", help="pairs with scores")
    parser.add_argument("--num-pairs", type=int, default=2_048, help="training pairs of a run")
    parser.add_argument("--batch", type=int, default=64, help="pairs per batch")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    add_training_flags(parser)
    return measure(**vars(parser.parse(argv)))


def measure(
    *,
    model: str,
    pairs: str,
    texts: str,
    sts: str,
    num_pairs: int,
    batch: int,
    learning_rate: float,
    seeds: int,
    torch_python: str | None,
) -> dict[str, Any]:
    """Train every setting with every seed, and evaluate it.

    Args:
      model: the folder of the pretrained encoder.
      pairs: a file of pairs of paraphrases.
      texts: a file of texts, in a column `text`.
      sts: a file of pairs with scores.
      num_pairs: the number of training pairs of a run, rounded down to whole batches.
      batch: pairs per batch.
      learning_rate: the peak learning rate.
      seeds: the number of seeds, from 0.
      torch_python: an interpreter with sentence-transformers; `None` measures jaxcl only.
    """
    evaluation = open_sts_set(Path(sts))
    held_out = {
        "first/query": [*evaluation.pairs.first],
        "second/query": [*evaluation.pairs.second],
    }
    frozen = Trained(embed(load(model), held_out), 0.0)
    results: dict[str, list[Trained]] = {"frozen": [frozen]}
    for kind, file in (("simcse", texts), ("pairs", pairs)):
        config = _config(kind, model, file, num_pairs // batch, batch, learning_rate)
        for seed in range(seeds):
            for way, changes in (("random", {}), ("assigned", _assigned(config))):
                say(f"{kind}, {way} batches, seed {seed}")
                own = changed_config(config, {"seed": seed, **changes})
                results.setdefault(f"{kind}, {way} batches", []).append(train_jaxcl(own, held_out))
            if torch_python is not None:
                say(f"{kind}, sentence-transformers, seed {seed}")
                settings = read_settings(changed_config(config, {"seed": seed}))
                data_dir = shared_folder(settings.run.data_dir)
                source = open_sources(settings.data, data_dir=data_dir)["train"]
                spec = torch_spec(settings, source, held_out)
                trained = train_in_torch(torch_python, spec)
                results.setdefault(f"{kind}, sentence-transformers", []).append(trained)
    shapes = {"pairs": num_pairs // batch * batch, "batch": batch, "rate": learning_rate}
    return _record(results, evaluation, shapes)


def _config(
    kind: str, model: str, file: str, steps: int, batch: int, learning_rate: float
) -> ConfigDict:
    return changed_config(
        load_config(f"sentence_embedding:{kind}"),
        {
            "model.pretrained": str(Path(model).resolve()),
            "data.name": str(Path(file).resolve()),
            "data.max_tokens": {"query": 64, "key": 64},
            "steps": steps,
            "global_batch_size": batch,
            "grad_cache.chunk_size": 16,
            "optimizer.learning_rate": learning_rate,
            "optimizer.weight_decay": 0.01,
            "optimizer.warmup_steps": steps // 10,
            "loss.options.directions": None,  # both, as in sentence-transformers here
        },
    )


def _assigned(config: ConfigDict) -> Mapping[str, Any]:
    """The settings of batches that are assigned after a quarter of the steps, and twice more."""
    every = max(config.steps // 4, 1)
    return {"assignment.name": "gcbs", "assignment.gcbs.refresh_every": every}


def _record(
    results: Mapping[str, Sequence[Trained]], evaluation: StsSet, shapes: dict[str, Any]
) -> dict[str, Any]:
    """The record that `jaxcl.bench` prints: Spearman's correlation of each seed."""
    similarities = {
        name: [_similarities(one) for one in trained] for name, trained in results.items()
    }
    (frozen,) = similarities["frozen"]
    rounds: dict[str, list[float]] = {}
    facts: dict[str, Any] = {"pairs with scores": len(frozen)}
    for name, several in similarities.items():
        differences = [evaluation.differences(one, frozen)["spearman"] for one in several]
        rounds[name] = [one.value for one in differences]
        if name != "frozen":
            mean = statistics.mean(one.difference for one in differences)
            error = statistics.mean(one.standard_error for one in differences)
            facts[f"{name}, less frozen"] = f"{mean:+.4f} ± {error:.4f} over pairs"
            seconds = ", ".join(f"{one.cpu_seconds:.0f}" for one in results[name])
            facts[f"{name}, CPU seconds of training"] = seconds
    return {"shapes": shapes, "unit": "Spearman", "rounds": rounds, "facts": facts}


def _similarities(trained: Trained) -> Float[np.ndarray, " n"]:
    first, second = (trained.vectors[f"{side}/query"] for side in ("first", "second"))
    return np.einsum("nd,nd->n", first, second, dtype=np.float64).astype(np.float32)
