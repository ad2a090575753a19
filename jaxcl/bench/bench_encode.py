"""How many texts per second does `encode` embed, compared with sentence-transformers?

    python -m jaxcl.bench encode --model PATH [--torch-python PATH] [--num-texts N] [--rounds N]

The texts are docstrings and functions of the standard library. In each round, both libraries in
turn tokenize and embed all texts, each with its own batching. sentence-transformers runs in its own
process. Before the first round, both embed all texts once: this compiles jaxcl's programs, and the
embeddings must agree.
"""

import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from jaxcl.bench.benchmark_parser import benchmark_parser
from jaxcl.bench.torch_twin import torch_process
from jaxcl.data.python_functions import installed_roots, parse_functions, scan_files
from jaxcl.run.load_model import load
from jaxcl.typing import SIDES

__all__ = ["main", "measure", "standard_library_texts"]

Seconds: TypeAlias = tuple[float, float]
"""Wall-clock seconds, and CPU seconds of all threads."""

_LARGEST_DIFFERENCE = 1e-5
_PROGRAM = Path(__file__).with_name("encode_torch.py")


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Measure one model."""
    parser = benchmark_parser("encode", __doc__)
    parser.add_argument("--model", required=True, help="a folder that both libraries load")
    parser.add_argument("--side", choices=SIDES, default="query")
    parser.add_argument("--num-texts", type=int, default=5_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--torch-python", help="an interpreter with sentence-transformers")
    parser.add_argument(
        "--torch-batch-size",
        type=int,
        default=32,
        help="the batch size of sentence-transformers (default: 32)",
    )
    arguments = vars(parser.parse(argv))
    num_texts = arguments.pop("num_texts")
    return measure(texts=standard_library_texts(num_texts), **arguments)


def standard_library_texts(count: int) -> list[str]:
    """Docstrings and functions of the standard library, alternating.

    Raises:
      ValueError: if there are fewer than `count` texts.
    """
    files = scan_files(installed_roots()[:1]).files
    functions = parse_functions(files).functions
    texts = [text for one in functions for text in (one.docstring_paragraph, one.source)]
    if len(texts) < count:
        raise ValueError(f"--num-texts={count}; the standard library has {len(texts)}")
    return [texts[int(index)] for index in np.linspace(0, len(texts) - 1, count)]


def measure(
    model: str,
    *,
    texts: Sequence[str],
    side: str,
    rounds: int,
    torch_python: str | None = None,
    torch_batch_size: int = 32,
) -> dict[str, Any]:
    """Time both libraries in turn.

    Args:
      model: a folder that both libraries load.
      texts: the texts to embed.
      side: the side of the texts.
      rounds: the number of timings of each library.
      torch_python: an interpreter with sentence-transformers; `None` measures jaxcl only.
      torch_batch_size: the batch size of sentence-transformers.

    Returns:
      The record that `jaxcl.bench` prints, in texts per second.

    Raises:
      RuntimeError: if the embeddings differ, or sentence-transformers fails.
    """
    opened = load(model)

    def run_jaxcl() -> Seconds:
        start, cpu_start = time.perf_counter(), time.process_time()
        opened.encode(texts, side=side)
        return time.perf_counter() - start, time.process_time() - cpu_start

    facts: dict[str, Any] = {"first pass with compilation, s": run_jaxcl()[0]}
    lengths = [len(row) for row in opened.tokenize(texts, side=side)]
    facts["tokens of a text, mean"] = statistics.fmean(lengths)
    timed: dict[str, Callable[[], Seconds]] = {"jaxcl": run_jaxcl}
    with contextlib.ExitStack() as stack:
        if torch_python is not None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxcl-bench-")))
            vectors = folder / "vectors.npy"
            spec = {"model": model, "side": side, "texts": texts, "threads": os.cpu_count()}
            spec |= {"batch_size": torch_batch_size, "vectors": str(vectors)}
            (folder / "spec.json").write_text(json.dumps(spec))
            ask, versions = stack.enter_context(
                torch_process(torch_python, _PROGRAM, folder / "spec.json")
            )
            ask("save", len(texts))
            facts |= versions | _agreement(opened.encode(texts, side=side), np.load(vectors))
            timed["sentence-transformers"] = lambda: _seconds(ask("run", len(texts)))
        spent: dict[str, list[Seconds]] = {name: [] for name in timed}
        for number in range(rounds):
            for name in list(timed)[:: 1 if number % 2 == 0 else -1]:
                spent[name].append(timed[name]())
    for name, rounds_of in spent.items():
        cpu = statistics.median(cpu for _, cpu in rounds_of)
        facts[f"CPU ms a text, {name}"] = 1e3 * cpu / len(texts)
    rates = {name: [len(texts) / wall for wall, _ in of] for name, of in spent.items()}
    return {
        "shapes": {"model": Path(model).name, "texts": len(texts), "dim": opened.dim, "side": side},
        "unit": "texts/s",
        "rounds": rates,
        "facts": facts,
    }


def _seconds(answer: Mapping[str, float]) -> Seconds:
    return answer["seconds"], answer["cpu_seconds"]


def _agreement(vectors: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    difference = float(np.abs(vectors - expected).max())
    if not difference <= _LARGEST_DIFFERENCE:
        raise RuntimeError(
            f"the embeddings differ by up to {difference:.1e}; these are different models"
        )
    return {"largest difference of a number": difference}
