"""How much do planted duplicates harm an embedder, with and without masks of equal texts?

    python -m jaxcl.bench duplicates --workdir DIR [--share 0.05] [--copies N] [--steps N]
        [--seeds N] [--json FILE]

DIR is the workdir of a training run; the benchmark uses its data and its config, with a queue. A
share of the training rows is copied `--copies` times, so that a row's own text becomes its
negative: rarely in the batch, nearly always in the queue. Models are trained with and without
copies, masked by row and by text. They are evaluated on the copied rows' queries among the keys of
all training texts, and on the held-out queries among the held-out keys.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxcl.assignment import uniform_rows
from jaxcl.bench.benchmark_parser import benchmark_parser
from jaxcl.data.loader import training_batches
from jaxcl.data.table import Table
from jaxcl.data.token_table import TokenTable
from jaxcl.evaluation.retrieval import evaluate_retrieval
from jaxcl.host.command_flags import user_path
from jaxcl.host.progress import progress_bar
from jaxcl.metrics import mrr_metric
from jaxcl.run.opened import OpenedRun, open_run
from jaxcl.run.training import Training, build_training
from jaxcl.run.workdir import read_config
from jaxcl.settings.read import read_settings
from jaxcl.settings.sections import Settings
from jaxcl.typing import SIDES, PyTree

__all__ = ["main", "measure", "with_copies"]


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Measure one share of copied rows."""
    parser = benchmark_parser("duplicates", __doc__)
    parser.add_argument("--workdir", type=user_path, required=True)
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    return measure(**vars(parser.parse(argv)))


def measure(workdir: Path, *, share: float, copies: int, steps: int, seeds: int) -> dict[str, Any]:
    """Train under all four conditions with several seeds.

    Args:
      workdir: the folder of a run.
      share: the share of rows that are copied.
      copies: the number of copies of each such row.
      steps: the number of training steps.
      seeds: the number of seeds, from 0.

    Returns:
      The record that `jaxcl.bench` prints: MRR@10 of each seed.
    """
    run = open_run(workdir)
    sources = run.sources()
    tables = {split: run.table(split, sources[split]) for split in ("train", "validation")}
    clean = tables["train"]
    if not isinstance(clean, TokenTable):
        raise ValueError(f"{workdir} was not trained on texts; this benchmark copies texts")
    copied = np.random.default_rng(0).permutation(clean.num_rows)[: int(share * clean.num_rows)]
    planted = with_copies(clean, np.repeat(copied, copies))
    conditions = {
        "no copies, masked by row": (clean, "row"),
        "no copies, masked by text": (clean, "text"),
        "copies, masked by row": (planted, "row"),
        "copies, masked by text": (planted, "text"),
    }
    values: dict[str, list[float]] = {}
    for seed in range(seeds):
        for name, (table, mask) in conditions.items():
            program = build_training(_settings(run, mask=mask, steps=steps, seed=seed))
            params = _trained(program, table, f"{name}, seed {seed}")
            for asked, (pool, rows) in {
                "copied rows": (clean, copied),
                "held out": (tables["validation"], None),
            }.items():
                value = _mrr(program, params, pool, rows)
                values.setdefault(f"{asked}: {name}", []).append(value)
    facts = {}
    for asked in ("copied rows", "held out"):
        means = {name: float(np.mean(values[f"{asked}: {name}"])) for name in conditions}
        for mask in ("row", "text"):
            facts[f"lost, {asked}, masked by {mask}"] = (
                means[f"no copies, masked by {mask}"] - means[f"copies, masked by {mask}"]
            )
    return {
        "shapes": {"rows": clean.num_rows, "copied": len(copied), "copies": copies}
        | {"steps": steps, "seeds": seeds},
        "unit": "MRR@10",
        "rounds": values,
        "facts": facts,
    }


def with_copies(table: TokenTable, rows: np.ndarray) -> TokenTable:
    """A table with copies of some rows appended, which have the text ids of the originals."""
    order = np.concatenate([np.arange(table.num_rows), rows])
    tokens, offsets = {}, {}
    for side in SIDES:
        starts = table.offsets[side][order]
        lengths = table.offsets[side][order + 1] - starts
        offsets[side] = np.append(0, np.cumsum(lengths))
        within = np.arange(offsets[side][-1]) - np.repeat(offsets[side][:-1], lengths)
        tokens[side] = np.asarray(table.tokens[side])[np.repeat(starts, lengths) + within]
    group, text = table.group[order], table.text[order]
    return table._replace(tokens=tokens, offsets=offsets, group=group, text=text)


def _settings(run: OpenedRun, *, mask: str, steps: int, seed: int) -> Settings:
    """The run's settings with a queue, masked by a column."""
    config = ConfigDict(read_config(run.workdir))
    config.steps, config.seed = steps, seed
    config.loss.masks = (mask,)
    config.optimizer.warmup_steps = max(1, steps // 10)
    config.negatives.bank.kind = "queue"
    config.negatives.tiers.update(full_bank=True, of_batch=False)
    return read_settings(config)


def _trained(program: Training, table: Table, what: str) -> PyTree:
    settings = program.settings
    rows_fn = functools.partial(
        uniform_rows,
        num_rows=table.num_rows,
        batch_size=settings.global_batch_size,
        seed=settings.seed,
    )
    state = program.init(table.num_rows, table.labels(np.arange(table.num_rows))["group"])
    batches = training_batches(table, rows_fn, program.mesh, first_step=0, last_step=settings.steps)
    with progress_bar(what, settings.steps) as advance:
        for batch in batches:
            state, metrics = program.train_step(state, batch)
            metrics.loss.block_until_ready()
            advance(1)
    return state.params["towers"]


def _mrr(program: Training, params: PyTree, pool: Table, rows: np.ndarray | None) -> float:
    """MRR@10 of the queries of some or all rows, among the keys of the pool's distinct texts."""
    texts = pool.labels(np.arange(pool.num_rows))["text"]
    _, first, text = np.unique(texts, return_index=True, return_inverse=True)
    rows = np.arange(pool.num_rows) if rows is None else rows
    queries = program.embed(params, "query", lambda one: pool.side("query", rows[one]), len(rows))
    keys = program.embed(params, "key", lambda one: pool.side("key", first[one]), len(first))
    results = evaluate_retrieval(None, None, queries, keys, relevant=text[rows], methods=("dense",))
    return float(mrr_metric(results["dense"].ranks).mean())
