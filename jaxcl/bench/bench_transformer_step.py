"""Where does a transformer's training step spend its CPU time, compared with PyTorch?

    python -m jaxcl.bench transformer_step [--torch-python PATH] [--rounds N] [--json FILE]

It measures the parts of a step of a BERT with random parameters: the encoder of one side, its
attention, the three products of a linear layer, and everything around them. Parts are forward and
backward, except where the name says otherwise. In each round, every part runs in jaxcl and then in
PyTorch. CPU seconds count all threads. PyTorch's encoder has dropout on attention weights, as in
pretraining; jaxcl's encoder does not.
"""

import functools
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxcl.bench.benchmark_parser import benchmark_parser
from jaxcl.bench.torch_twin import torch_process
from jaxcl.host.progress import say
from jaxcl.losses import infonce_loss
from jaxcl.models.attention import attend
from jaxcl.models.layers import linear_layer, row_dropout, unit_vectors
from jaxcl.models.pretrained.activations import ACTIVATIONS
from jaxcl.models.pretrained.blocks import Architecture, Transformer
from jaxcl.typing import Array, PyTree

__all__ = ["main", "measure"]

_TORCH = Path(__file__).with_name("transformer_step_torch.py")


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Measure the parts of a step of MiniLM's size."""
    parser = benchmark_parser("transformer_step", __doc__)
    parser.add_argument("--torch-python", metavar="PYTHON", help="an interpreter with transformers")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=128, help="texts of one side")
    parser.add_argument("--tokens", type=int, default=64, help="tokens per text")
    parser.add_argument("--hidden", type=int, default=384, help="width of the hidden states")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=30_522)
    return measure(**vars(parser.parse(argv)))


def measure(*, torch_python: str | None, rounds: int, **sizes: int) -> dict[str, Any]:
    """Measure all parts in turn.

    Args:
      torch_python: the interpreter of PyTorch; `None` measures jaxcl alone.
      rounds: the number of measurements, after one warm-up call.
      **sizes: the sizes that `main` reads.

    Returns:
      The record that `jaxcl.bench` prints, in CPU milliseconds.
    """
    programs = {name: _compiled(*part) for name, part in _parts(**sizes).items()}
    measured: dict[str, list[float]] = {}
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="jaxcl-bench-") as folder:
        spec = Path(folder) / "spec.json"
        spec.write_text(json.dumps(sizes))
        if torch_python is None:
            measured = _measured(programs, {"jaxcl": functools.partial(_seconds, programs)}, rounds)
        else:
            with torch_process(torch_python, _TORCH, spec) as (ask, versions):
                facts |= versions
                ways: dict[str, Callable[[str], float]] = {
                    "jaxcl": functools.partial(_seconds, programs),
                    "PyTorch": lambda name: ask(name, 1)["seconds"],
                }
                measured = _measured(programs, ways, rounds)
    operations = 2 * sizes["rows"] * sizes["tokens"] * 4 * sizes["hidden"] ** 2
    for name, milliseconds in measured.items():
        if name.startswith("product"):
            facts[f"GFLOP per CPU second, {name}"] = operations / min(milliseconds) / 1e6
    return {"shapes": sizes, "unit": "CPU ms", "rounds": measured, "facts": facts}


def _measured(
    programs: Mapping[str, Any], ways: Mapping[str, Callable[[str], float]], rounds: int
) -> dict[str, list[float]]:
    measured: dict[str, list[float]] = {f"{name}, {way}": [] for name in programs for way in ways}
    for number in range(1 + rounds):
        say(f"round {number} of {rounds}")
        for name in programs:
            for way, seconds in ways.items():
                milliseconds = 1e3 * seconds(name)
                if number:
                    measured[f"{name}, {way}"].append(milliseconds)
    return measured


def _seconds(programs: Mapping[str, Callable[[], PyTree]], name: str) -> float:
    start = time.process_time()
    jax.block_until_ready(programs[name]())
    return time.process_time() - start


def _compiled(function: Callable, arguments: tuple) -> Callable[[], PyTree]:
    return functools.partial(jax.jit(function).lower(*arguments).compile(), *arguments)


def _parts(
    *, rows: int, tokens: int, hidden: int, layers: int, heads: int, vocabulary: int
) -> dict[str, tuple[Callable, tuple]]:
    """Name -> a function and its arguments; PyTorch's parts have the same names."""
    architecture = Architecture(
        vocabulary, hidden, layers, heads, 4 * hidden, "gelu", 1e-12, 0.1, tokens, token_types=2
    )
    graph, params = nnx.split(Transformer(architecture, rngs=nnx.Rngs(0)))
    key = jax.random.key(0)
    keys = jax.random.split(key, rows)
    mask = jnp.ones((rows, tokens), bool)
    ids = jax.random.randint(key, (rows, tokens), 0, vocabulary)
    sides = tuple(_normal(number, rows, tokens, hidden) for number in range(3))
    vectors = _normal(4, rows, hidden), _normal(5, rows, hidden)
    norm, norm_params = nnx.split(nnx.merge(graph, params).norm)

    def encode(params: PyTree, mask: Array, keys: Array) -> Array:
        return nnx.merge(graph, params)(ids, mask, keys)

    def normalised(params: PyTree, states: Array) -> Array:
        return nnx.merge(norm, params)(states)

    def dropped(states: Array, keys: Array) -> Array:
        return row_dropout(states, keys, rate=0.1, layer=1)

    def attention(sides: tuple[Array, ...], mask: Array) -> Array:
        queries, keys, values = (side.reshape(rows, tokens, heads, -1) for side in sides)
        return attend(queries, keys, values, None, mask[:, None, None])

    def attention_to_all(sides: tuple[Array, ...]) -> Array:
        return attention(sides, jnp.ones((rows, tokens), bool))

    def loss(sides: tuple[Array, Array]) -> Array:
        return infonce_loss(*map(unit_vectors, sides), temperature=0.05)

    large = _normal(3, rows, tokens, 4 * hidden)
    return {
        "encoder, forward": (encode, (params, mask, keys)),
        "encoder": (_gradient(encode), (params, mask, keys)),
        "attention with a mask, forward": (attention, (sides, mask)),
        "attention with a mask": (_gradient(attention), (sides, mask)),
        "attention without, forward": (attention_to_all, (sides,)),
        "attention without": (_gradient(attention_to_all), (sides,)),
        **_products(sides[0], large),
        "GELU": (_gradient(ACTIVATIONS["gelu"]), (large,)),
        "layer norm": (_gradient(normalised), (norm_params, sides[0])),
        "dropout": (_gradient(dropped), (sides[0], keys)),
        "loss": (_gradient(loss), (vectors,)),
        "clipping and AdamW": _update(params),
    }


def _normal(number: int, *shape: int) -> Array:
    return jax.random.normal(jax.random.fold_in(jax.random.key(0), number), shape)


def _products(states: Array, large: Array) -> dict[str, tuple[Callable, tuple]]:
    """The three products of a linear layer, as a step computes them."""
    hidden, wide = states.shape[-1], large.shape[-1]
    flat, gradient = states.reshape(-1, hidden), large.reshape(-1, wide)
    layer, params = nnx.split(linear_layer(hidden, wide, rngs=nnx.Rngs(0)))

    def linear(params: PyTree, inputs: Array) -> Array:
        return nnx.merge(layer, params)(inputs.reshape(states.shape)).reshape(gradient.shape)

    def pulled(argument: int) -> Callable:
        def pull(params: PyTree, inputs: Array, gradient: Array) -> PyTree:
            return jax.vjp(linear, params, inputs)[1](gradient)[argument]

        return pull

    return {
        "product x W": (linear, (params, flat)),
        "product g Wᵀ": (pulled(1), (params, flat, gradient)),
        "product xᵀ g": (pulled(0), (params, flat, gradient)),
    }


def _update(params: PyTree) -> tuple[Callable, tuple]:
    """Clipping and AdamW; the parameters also serve as their gradient."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5))

    def update(params: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    return update, (params, optimizer.init(params))


def _gradient(function: Callable) -> Callable:
    """The gradient of half the sum of squares of a function's results, for its first argument."""
    return jax.grad(lambda first, *others: (function(first, *others) ** 2).sum() / 2)
