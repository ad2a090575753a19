"""Short runs of the trainer: one for each feature that a state or a metric can depend on.

A run is named `runs/NAME`. Its result holds the metrics of each step, the final evaluation, and
every array of the last checkpoint, as an unordered collection, so that neither the names nor the
order of parameters matter.
"""

import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.goldens.adapter import ROOT, prepare_data_set, read_run, train_command
from tests.goldens.pairs import read_pairs

__all__ = ["CASES", "prepare", "record"]

TIMEOUT_SECONDS = 600

CODE_SEARCH, PLAIN = "configs/code_search.py", "configs/code_search.py:plain"
TRANSFORMER = "configs/code_search_transformer.py:smoke"
DECODER = "configs/large_encoders.py:mistral_7b"
IMAGES = ("data.name=glyphs",)  # which the first run prepares in the folder of the data
OPTIONS = "tests/goldens/options_config.py"  # its variants set options of losses

SMALL = (
    *("steps=24", "global_batch_size=64", "data.vocabulary_size=500", "model.dim=16"),
    *("optimizer.warmup_steps=2", "evaluation.methods=('dense',)"),
    *("run.log_every=1", "run.evaluate_every=12", "run.checkpoint_every=24"),
)
"""The settings of every run; 24 steps are 3 epochs and a part of the fourth."""

SOURCED = ("assignment.name=sourced",)
BY_TOPIC = ("assignment.sourced.by=topic", "data.topics={files}/topics.npz")
UNIFORM = ("assignment.name=uniform",)
GCBS = ("assignment.name=gcbs", "assignment.gcbs.refresh_every=10")
QUEUE = ("negatives.bank.kind=queue", "negatives.bank.slots=200")
INSTANCE = ("negatives.bank.kind=instance",)
WHOLE = ("negatives.tiers.full_bank=True",)
FROM_BANK = (*GCBS, *INSTANCE, "assignment.gcbs.embeddings=bank")
MARGIN = ("loss.relative_margin=0.05",)
MINED = (*INSTANCE, "negatives.mined.refresh_every=9", "negatives.mined.rank_range=(2, 20)")
MOMENTUM = ("negatives.momentum_encoder.initial=0.9",)
SYNTHETIC = ("mixed=6", "mixed_with_query=4", "perturbed=4", "hardest=8")
ALL_TIERS = (
    *("negatives.tiers.uniform=64", "negatives.tiers.stratified=32", "negatives.tiers.nearest=4"),
    *(f"negatives.tiers.{setting}" for setting in SYNTHETIC),
)
TWO_TIERS = ("negatives.tiers.stratified=32", "negatives.tiers.nearest=4")
TEXT_AND_GROUP = ("loss.masks=('text', 'group')",)
BLOCKS = (
    *("assignment.gcbs.block_size=16", "assignment.gcbs.keep_apart=('text', 'group')"),
    *("assignment.gcbs.random_initial=0.8", "assignment.gcbs.random_final=0.2"),
    *("assignment.gcbs.refresh_epochs=1.5", "assignment.gcbs.graph=clustered"),
)
SCANNED = ("model.options.scan_layers=True", "model.options.remat=True")
SHORT_TEXTS = ("data.max_tokens.query=16", "data.max_tokens.key=24")
DECODER_SIZES = (
    *("model.options.hidden_dim=32", "model.options.num_layers=2", "model.options.mlp_dim=48"),
    *("model.options.num_heads=4", "model.options.num_key_heads=2", "run.mesh.fsdp=1"),
    *("optimizer.learning_rate=1e-3", *SHORT_TEXTS),
    *("data.query_field=query", "data.key_field=key", "grad_cache.chunk_size=16"),
    *("data.splits.train=train", "data.splits.validation=validation"),
)


class Case(NamedTuple):
    """A run.

    Attributes:
      config: the config file, with a variant.
      settings: changed settings, in addition to `SMALL`.
      devices: the number of devices of each process.
      processes: the number of processes.
    """

    config: str
    settings: tuple[str, ...] = ()
    devices: int = 1
    processes: int = 1


def _tier(*budgets: str, bank: str = "dtype=float32") -> Case:
    tiers = (f"negatives.tiers.{budget}" for budget in budgets)
    return Case(PLAIN, (*INSTANCE, *tiers, f"negatives.bank.{bank}"))


RUNS = {
    "default": Case(
        CODE_SEARCH,
        (
            *("evaluation.methods=('bm25', 'dense', 'hybrid')", "data.metadata_fields=('name',)"),
            *UNIFORM,  # the default when the modules were moved
        ),
    ),
    "two-towers": Case(PLAIN, ("model.shared=False", "optimizer.weight_decay=0.01")),
    "masks-and-margin": Case(PLAIN, (*TEXT_AND_GROUP, *MARGIN)),
    "gcbs-light-encode": Case(PLAIN, GCBS),
    "gcbs-full-encode": Case(PLAIN, (*GCBS, "assignment.gcbs.preset=full")),
    "gcbs-light-bank": Case(PLAIN, FROM_BANK),
    "gcbs-full-bank": Case(PLAIN, (*FROM_BANK, "assignment.gcbs.preset=full")),
    "gcbs-blocks": Case(PLAIN, ("assignment.name=gcbs", *BLOCKS)),
    "gcbs-rcm": Case(PLAIN, (*GCBS, "assignment.gcbs.method=rcm")),
    "sourced-mixed": Case(PLAIN, (*SOURCED, "assignment.sourced.temperature=2.0")),
    "sourced-one-topic": Case(
        PLAIN,
        (*SOURCED, "assignment.sourced.mix=single", *BY_TOPIC),
    ),
    "queue": Case(PLAIN, (*QUEUE, *WHOLE)),
    "tier-whole": _tier("full_bank=True", bank="dtype=bfloat16"),
    "tier-uniform": _tier("uniform=64"),
    "tier-stratified": _tier("stratified=40", bank="momentum=0.8"),
    "tier-nearest": _tier("nearest=5"),
    "tier-synthetic": _tier(*SYNTHETIC),
    "tiers-together": Case(PLAIN, (*INSTANCE, *ALL_TIERS, *TEXT_AND_GROUP, *MARGIN)),
    "synthetic-with-gradient": Case(
        CODE_SEARCH, (*UNIFORM, "negatives.tiers.gradient=True", "negatives.tiers.hardest=8")
    ),
    "mined": Case(PLAIN, (*MINED, *TEXT_AND_GROUP)),
    "momentum-guide": Case(
        PLAIN, (*INSTANCE, *ALL_TIERS, *MOMENTUM, *MARGIN, "negatives.guide=momentum")
    ),
    "data-guide": Case(
        PLAIN,
        (*QUEUE, *WHOLE, *MARGIN, "negatives.guide=data", "data.guides={files}/guides.npz"),
    ),
    "running-estimate": Case(PLAIN, ("loss.name=running_estimate",)),
    "running-estimate-options": Case(f"{OPTIONS}:running_estimate"),
    "distillation": Case(
        PLAIN,
        ("loss.name=distillation", "data.negatives={files}/negatives.npz"),
    ),
    "supervised": Case(PLAIN, ("loss.name=supervised", "optimizer.name=lion")),
    "sigmoid": Case(PLAIN, ("loss.name=sigmoid", "loss.bias=-5.0")),
    "decoupled": Case(
        PLAIN, ("loss.name=decoupled", "optimizer.name=sgd", "optimizer.learning_rate=0.1")
    ),
    "hard": Case(f"{OPTIONS}:hard"),
    "joint": Case(f"{OPTIONS}:joint"),
    "matryoshka": Case(PLAIN, ("loss.matryoshka_dims=(4, 16)",)),
    "gradient-cache": Case(PLAIN, ("grad_cache.chunk_size=10",)),
    "transformer": Case(
        TRANSFORMER, ("data.add_cls=True", "model.options.pooling=cls", *SHORT_TEXTS)
    ),
    "transformer-cached": Case(
        TRANSFORMER, ("grad_cache.chunk_tokens=400", *SHORT_TEXTS, *SCANNED)
    ),
    "decoder": Case(DECODER, DECODER_SIZES),
    "simclr": Case("configs/simclr.py:smoke", IMAGES),
    "moco": Case("configs/moco.py:smoke", IMAGES),
    "image-text": Case("configs/image_text.py:smoke", IMAGES),
    "image-text-siglip": Case("configs/image_text.py:smoke_siglip", IMAGES, devices=2),
    "8-devices": Case(CODE_SEARCH, UNIFORM, devices=8),
    "8-devices-ring": Case(PLAIN, (*QUEUE, *WHOLE, "loss.exchange=ring"), devices=8),
    "8-devices-remembering": Case(
        PLAIN,
        (*GCBS, *MINED, *MOMENTUM, *TEXT_AND_GROUP, *MARGIN, *TWO_TIERS),
        devices=8,
    ),
    "8-devices-sharded": Case(
        TRANSFORMER, ("run.mesh.fsdp=4", "grad_cache.chunk_size=4", *SHORT_TEXTS), devices=8
    ),
    "2-processes": Case(PLAIN, (*MINED, *TEXT_AND_GROUP), devices=2, processes=2),
}

CASES: Mapping[str, Case] = {f"runs/{name}": case for name, case in RUNS.items()}


def prepare(directory: Path) -> None:
    """Write the data set, and the files of negatives, guides and topics that runs read."""
    prepare_data_set(directory / "sets")
    num_rows = sum(pair.split == "train" for pair in read_pairs())
    rng = np.random.default_rng(0)
    rows = rng.integers(0, num_rows, (num_rows, 3))
    rows[::5, 2] = -1  # some rows have fewer negatives
    scores = rng.normal(0, 2, (num_rows, 4)).astype(np.float32)
    np.savez(directory / "negatives.npz", rows=rows, teacher_scores=scores)
    sides = {side: rng.normal(size=(num_rows, 12)).astype(np.float32) for side in ("query", "key")}
    np.savez(directory / "guides.npz", **sides)
    np.savez(directory / "topics.npz", topic=rng.integers(0, 5, num_rows))


def record(name: str, directory: Path) -> dict[str, Any]:
    """Run a case, and return its metrics and digests.

    Args:
      name: a name in `CASES`.
      directory: the folder that `prepare` wrote, also for token tables.

    Raises:
      RuntimeError: if the run fails, with the last lines that it printed.
    """
    with tempfile.TemporaryDirectory(prefix="golden-run-") as place:
        workdir = Path(place) / "run"
        _train(CASES[name], directory, workdir)
        return read_run(workdir)


def _train(case: Case, directory: Path, workdir: Path) -> None:
    settings = [setting.format(files=directory) for setting in (*SMALL, *case.settings)]
    command = train_command(case.config, settings, data_dir=directory, workdir=workdir)
    started = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for environment in _environments(case)
    ]
    try:
        outputs = [process.communicate(timeout=TIMEOUT_SECONDS)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    if any(process.returncode for process in started):
        raise RuntimeError("\n".join(output[-2_000:] for output in outputs))


def _environments(case: Case) -> Iterator[dict[str, str]]:
    """The environment of each process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = os.environ["XLA_FLAGS"].split()
    flags = [flag for flag in flags if "device_count" not in flag]
    flags.append(f"--xla_force_host_platform_device_count={case.devices}")
    for number in range(case.processes):
        # Without GLIBC_TUNABLES, the trainer would restart itself.
        environment = os.environ | {"XLA_FLAGS": " ".join(flags), "GLIBC_TUNABLES": ""}
        if case.processes > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(case.processes),
                "JAX_PROCESS_ID": str(number),
            }
        yield environment
