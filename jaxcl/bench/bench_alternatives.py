"""How much time and memory do the loss, search and a step take, compared with alternatives?

    python -m jaxcl.bench alternatives --part loss|nearest|step|texts --torch-python PATH
        [--rounds N] [--json FILE]

- *loss*: the symmetric InfoNCE loss with the gradients of both sides, compared with cross entropy
  in PyTorch, over the whole matrix and chunk by chunk, and with the cached loss of
  sentence-transformers.
- *nearest*: the nearest rows of each row of a table, compared with the flat index of faiss.
- *step*: one update of a pretrained model on texts without padding, compared with
  sentence-transformers (`--model FOLDER`).
- *texts*: the same update on the pairs of code search, without and with gradient caching, and with
  length buckets; sentence-transformers pads each side to its longest text.

Every program runs in a separate process. Each round measures all processes one after the other, and
their results must agree. The memory is the peak, less what the process held after its imports and
preparation. The OpenBLAS in faiss may not know the CPU, and then uses slow kernels; on a CPU with
AVX-512, OPENBLAS_CORETYPE=SKYLAKEX chooses the fast kernels.
"""

import contextlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcl.bench.alternatives_jaxcl import step_settings
from jaxcl.bench.benchmark_parser import benchmark_parser
from jaxcl.bench.torch_twin import Ask, torch_process
from jaxcl.data.modalities import modality_of
from jaxcl.data.prepare import prepare_data
from jaxcl.data.table import table_batch
from jaxcl.host.progress import say
from jaxcl.host.user_folders import shared_folder
from jaxcl.run.initial import keep_pretrained_files
from jaxcl.run.text_widths import choose_text_widths
from jaxcl.typing import SIDES

__all__ = ["PARTS", "main", "measure"]

_JAXCL = "jaxcl"
_PROGRAMS = {
    True: Path(__file__).with_name("alternatives_jaxcl.py"),
    False: Path(__file__).with_name("alternatives_torch.py"),
}
PARTS: Mapping[str, Sequence[str]] = {
    "loss": ("PyTorch, dense", "PyTorch, chunks", "sentence-transformers, cached loss"),
    "nearest": ("faiss, flat",),
    "step": ("sentence-transformers",),
    "texts": (
        "jaxcl, cached",
        "jaxcl, length buckets",
        "sentence-transformers",
        "sentence-transformers, cached",
    ),
}
"""Part -> the programs that jaxcl is compared with."""
_TOLERANCES = {"loss": 1e-4, "nearest": 1e-6, "step": 1e-3, "texts": 1e-3}
_UPDATES = ("step", "texts")
_CHUNK = 32  # rows of a chunk of gradient caching
"""By part: the relative difference that two programs may have in float32."""


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Measure one part."""
    parser = benchmark_parser("alternatives", __doc__)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument(
        "--torch-python",
        required=True,
        metavar="PYTHON",
        help="an interpreter with torch and sentence-transformers, or faiss",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8_192, help="pairs of the loss")
    parser.add_argument("--dim", type=int, default=256, help="width of the embeddings")
    parser.add_argument("--rows", type=int, default=20_000, help="rows of the table to search")
    parser.add_argument("--count", type=int, default=32, help="nearest rows per row")
    parser.add_argument("--model", metavar="FOLDER", help="the pretrained model of a step")
    parser.add_argument("--step-batch", type=int, default=128, help="pairs of an update")
    parser.add_argument("--tokens", type=int, default=64, help="tokens per text of a step")
    arguments = vars(parser.parse(argv))
    if arguments["part"] in _UPDATES and arguments["model"] is None:
        raise ValueError(
            f"--part={arguments['part']} needs --model, the folder of a pretrained encoder"
        )
    return measure(**arguments)


def measure(*, part: str, torch_python: str, rounds: int, **sizes: Any) -> dict[str, Any]:
    """Measure jaxcl and its alternatives in turn.

    Args:
      part: a key of `PARTS`.
      torch_python: the interpreter of the alternatives.
      rounds: number of measurements of each program, after one warm-up call.
      **sizes: the sizes that `main` reads.

    Returns:
      The record that `jaxcl.bench` prints, in CPU seconds.

    Raises:
      RuntimeError: if two programs do not compute the same results.
    """
    prepare: Mapping[str, Callable] = {
        "loss": _loss,
        "nearest": _nearest,
        "step": _step,
        "texts": _texts,
    }
    spec, arrays = prepare[part](sizes)
    spec |= {"part": part}
    facts: dict[str, Any] = {}
    if part in _UPDATES:  # dropout draws different bits in each program, so check without it first
        checked, _ = _measured(spec | {"dropout": False}, arrays, torch_python, rounds=0)
        facts["relative difference without dropout"] = _largest_difference(
            checked, _TOLERANCES[part]
        )
    answers, versions = _measured(spec, arrays, torch_python, rounds=rounds)
    if part not in _UPDATES:
        facts["relative difference"] = _largest_difference(answers, _TOLERANCES[part])
    for name, of_program in answers.items():
        counted = of_program[1:]
        facts[f"wall seconds, {name}"] = statistics.median(one["seconds"] for one in counted)
        facts[f"peak MB, {name}"] = max(one["MB"] for one in of_program)
    variables = [f"{k}={v}" for k, v in os.environ.items() if k.startswith("OPENBLAS_")]
    facts["BLAS variables"] = ", ".join(variables) or "none"
    shapes = {name: value for name, value in spec.items() if isinstance(value, int | float)}
    seconds = {n: [one["CPU seconds"] for one in several[1:]] for n, several in answers.items()}
    return {"shapes": shapes, "unit": "CPU s", "rounds": seconds, "facts": {**facts, **versions}}


def _loss(sizes: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    arrays = {
        side: _unit_rows(seed, sizes["batch"], sizes["dim"])
        for seed, side in enumerate(("queries", "keys"))
    }
    return {"batch": sizes["batch"], "dim": sizes["dim"], "temperature": 0.05}, arrays


def _nearest(sizes: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    spec = {name: sizes[name] for name in ("rows", "dim", "count")}
    return spec, {"table": _unit_rows(0, sizes["rows"], sizes["dim"])}


def _step(sizes: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    spec = _update(sizes) | {"max_tokens": dict.fromkeys(SIDES, sizes["tokens"])}
    data = step_settings(spec).data
    rng = np.random.default_rng(0)
    arrays = {
        f"inputs/{side}/{name}": array
        for side in SIDES
        for name, array in modality_of(data, side)
        .random_inputs(data, side, rng, spec["batch"])
        .items()
    }
    return spec, arrays


def _texts(sizes: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Random rows of code search, and the widths that suit them."""
    spec = _update(sizes) | {"max_tokens": {"query": 64, "key": 128}}
    settings = step_settings(spec | {"chunk": _CHUNK, "length_buckets": None})
    data_dir = shared_folder(settings.run.data_dir)
    with tempfile.TemporaryDirectory(prefix="jaxcl-bench-") as folder:
        keep_pretrained_files(settings, Path(folder))  # such as the tokenizer
        data = prepare_data(settings.data, data_dir=data_dir, workdir=Path(folder))
        table = data.tables["train"]
        # The choice for accelerators: on CPUs, a run has at most three widths by default.
        widths = choose_text_widths(settings, table, num_devices=1, platform="gpu")
        rows = np.random.default_rng(0).choice(table.num_rows, spec["batch"], replace=False)
        batch = table_batch(table, rows)
    spec |= {"buckets": widths.buckets, "padding, one width": widths.padding_before(*SIDES)}
    spec["padding, length buckets"] = widths.padding(*SIDES)
    arrays = {
        f"inputs/{side}/{name}": array for side in SIDES for name, array in batch[side].items()
    }
    return spec, arrays


def _update(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of one update."""
    return {
        "model": str(Path(sizes["model"]).resolve()),
        "batch": sizes["step_batch"],
        "temperature": 0.05,
        "learning_rate": 1e-5,
        "weight_decay": 0.01,
        "clip_norm": 1.0,
        "dropout": True,
        "chunk": _CHUNK,
    }


def _measured(
    spec: Mapping[str, Any], arrays: Mapping[str, np.ndarray], python: str, *, rounds: int
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """The answers of each program, one per round after a warm-up call, and versions."""
    facts: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxcl-bench-")))
        named: dict[str, Any] = dict(arrays)
        np.savez(folder / "arrays.npz", **named)
        programs: dict[str, Ask] = {}
        for number, way in enumerate((_JAXCL, *PARTS[spec["part"]])):
            is_jaxcl = way.startswith(_JAXCL)
            file = folder / f"spec{number}.json"
            file.write_text(json.dumps({**spec, "way": way, "arrays": str(folder / "arrays.npz")}))
            programs[way], versions = stack.enter_context(
                torch_process(
                    sys.executable if is_jaxcl else python,
                    _PROGRAMS[is_jaxcl],
                    file,
                    huge_pages=is_jaxcl,
                )
            )
            facts |= versions
        answers: dict[str, list[dict[str, Any]]] = {way: [] for way in programs}
        for number in range(1 + rounds):
            say(f"round {number} of {rounds}")
            for way, ask in programs.items():
                answers[way].append(ask("run", 1))
    return answers, facts


def _largest_difference(
    answers: Mapping[str, Sequence[Mapping[str, Any]]], tolerance: float
) -> float:
    """The largest relative difference from jaxcl's numbers in the first call."""
    first = {way: np.array(of_program[0]["values"]) for way, of_program in answers.items()}
    expected = first.pop(_JAXCL)
    differences = {way: float(np.max(abs(v / expected - 1))) for way, v in first.items()}
    if not max(differences.values()) < tolerance:
        raise RuntimeError(f"jaxcl computes {expected}, and the others {first}")
    return max(differences.values())


def _unit_rows(seed: int, num_rows: int, dim: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(num_rows, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
