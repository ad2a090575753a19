"""Checks the gradient of the configured step on this mesh.

    python -m jaxcl.check_grad --config configs/code_search.py --config.run.mesh.fsdp=2

Computes the gradient of every parameter twice: with the loss, exchange, masks and gradient cache of
the config on the available mesh, and with the dense loss on one device. Both use a tiny copy of the
model, a batch of random inputs and no dropout. A pretrained encoder keeps its size but gets random
weights. If a reduction over devices is wrong, the ratio of the two gradients is usually the number
of devices or its inverse.
"""

import functools
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from jaxcl.data.modalities import modality_of
from jaxcl.data.row_guides import guide_dim
from jaxcl.host.command import UserError, run_command
from jaxcl.host.command_flags import CommandParser
from jaxcl.host.output import check_output
from jaxcl.host.progress import say
from jaxcl.ops.mesh import make_mesh, put_batch
from jaxcl.run.build_loss import batch_needs, build_loss
from jaxcl.run.memory import init_memory
from jaxcl.run.training import build_towers, run_mesh
from jaxcl.settings.command_line import add_config_flags, config_of
from jaxcl.settings.data_sections import MaxTokens
from jaxcl.settings.derived import with_encoder_options
from jaxcl.settings.read import read_settings
from jaxcl.settings.sections import GradCacheSettings, Settings
from jaxcl.step.train_step import TemperatureBounds, init_state, state_sharding
from jaxcl.typing import SIDES, Batch, NumpyInt, PyTree

__all__ = ["GradientCheck", "compare_gradients"]

_LARGEST_ERROR = 1e-3  # for float32 sums in a different order
_ROUNDING = 1e-6  # relative to the norm of the whole gradient
_VOCABULARY = 64
_ROWS_PER_DEVICE = 4
_NEGATIVES = 3


class GradientCheck(NamedTuple):
    """A comparison of one parameter's gradient on the mesh with its gradient on one device.

    Attributes:
      parameter: path of the parameter.
      ratio: projection of the mesh's gradient onto the reference gradient, relative to the
        reference; 1 if the gradient is right, 2 if it is twice too large.
      error: norm of the difference, relative to the norm of the reference gradient.
    """

    parameter: str
    ratio: float
    error: float

    @property
    def agrees(self) -> bool:
        """Whether the two gradients are equal up to float32 rounding."""
        return self.error < _LARGEST_ERROR


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = CommandParser("jaxcl.check_grad", __doc__)
    add_config_flags(parser)
    run_command(parser, _run, argv)


def _run(arguments: Namespace) -> None:
    settings = read_settings(config_of(arguments))
    comparisons = compare_gradients(settings)
    table = Table("parameter", "ratio", "relative error", "")
    for comparison in comparisons:
        cells = f"{comparison.ratio:.6f}", f"{comparison.error:.1e}"
        table.add_row(comparison.parameter, *cells, "" if comparison.agrees else "wrong")
    Console().print(table)
    check_output()
    if run_mesh(settings.run.mesh).size == 1:
        say(
            "there is only one device, so no reduction over devices was checked; "
            "XLA_FLAGS=--xla_force_host_platform_device_count=8 splits a CPU into eight devices"
        )
    wrong = [comparison.parameter for comparison in comparisons if not comparison.agrees]
    if wrong:
        raise UserError(f"the gradient is wrong for {', '.join(wrong)}")


def compare_gradients(settings: Settings) -> list[GradientCheck]:
    """Compare the gradient of every parameter, including the temperature.

    Args:
      settings: the settings of a run; the check uses its loss, exchange, gradient cache and mesh.

    Raises:
      ValueError: if the devices cannot form the mesh.
    """
    mesh = run_mesh(settings.run.mesh)
    tiny = _tiny(settings)
    towers = build_towers(tiny)
    num_rows = _ROWS_PER_DEVICE * mesh.size
    batch = _random_batch(tiny, num_rows)
    state = init_state(
        jax.random.key(0),
        towers.init,
        optax.identity(),
        temperature=TemperatureBounds(*settings.loss.temperature),
        bias=settings.loss.bias,
        memory=init_memory(tiny, num_rows, batch["group"]),
    )
    one = make_mesh({"data": 1}, devices=jax.devices()[:1])
    # Compute one loss first, so that banks and running estimates are filled.
    first_loss = jax.jit(build_loss(_dense(tiny), towers, one))
    placed = put_batch(batch, one)
    state = state._replace(memory=first_loss(state.params, state.memory, placed, None)[1])

    def gradient(settings: Settings, mesh: Mesh) -> PyTree:
        loss = jax.jit(jax.grad(build_loss(settings, towers, mesh), has_aux=True))
        placed = jax.device_put(state, state_sharding(mesh, state))
        return loss(placed.params, placed.memory, put_batch(batch, mesh), None)[0]

    gradients, references = gradient(tiny, mesh), gradient(_dense(tiny), one)
    least_norm = _ROUNDING * float(optax.tree.norm(references))
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(references), strict=True
    )
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return [_compare(name(path), leaf, reference, least_norm) for (path, leaf), reference in pairs]


def _compare(
    parameter: str, gradient: jax.Array, reference: jax.Array, least_norm: float
) -> GradientCheck:
    """Compare two gradients; a reference with a norm up to `least_norm` is zero up to rounding."""
    computed, expected = (np.asarray(array, np.float64) for array in (gradient, reference))
    squared_norm = (expected * expected).sum()
    if squared_norm <= least_norm**2:
        # Either this batch never reads the weight, or it is a key bias of attention, which shifts
        # all scores of a query by the same amount.
        wrong = np.linalg.norm(computed) > 2 * least_norm
        return GradientCheck(parameter, float("nan") if wrong else 1.0, float(wrong))
    error = np.linalg.norm(computed - expected) / np.sqrt(squared_norm)
    return GradientCheck(parameter, float((computed * expected).sum() / squared_norm), float(error))


def _tiny(settings: Settings) -> Settings:
    """The settings with a small float32 model without dropout, and 2 rows per chunk if chunked."""
    small = {"hidden_dim": 16, "num_layers": 2, "num_heads": 2, "mlp_dim": 32}

    def shrink(options: Mapping[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
        shrunk = {name: 0.0 if "dropout" in name else value for name, value in options.items()}
        shrunk |= {name: value for name, value in small.items() if name in options}
        return shrunk | ({"compute_dtype": "float32"} if "compute_dtype" in known else {})

    settings = with_encoder_options(settings, shrink)
    lora = settings.model.lora._replace(base_dtype=None)
    size, tokens, _ = settings.grad_cache
    cached = size is not None or tokens is not None
    dim, vocabulary_size = max((16, *settings.loss.matryoshka_dims)), _VOCABULARY
    if settings.parts.pretrained:  # has the sizes of the pretrained model
        dim, vocabulary_size = settings.model.dim, settings.data.vocabulary_size
    return settings._replace(
        model=settings.model._replace(dim=dim, lora=lora),
        negatives=settings.negatives._replace(proportions="rows"),  # from the batch's groups
        data=settings.data._replace(max_tokens=MaxTokens(8, 8), vocabulary_size=vocabulary_size),
        grad_cache=GradCacheSettings(chunk_size=2) if cached else settings.grad_cache,
    )


def _dense(settings: Settings) -> Settings:
    return settings._replace(
        loss=settings.loss._replace(exchange="gather", implementation="reference"),
        grad_cache=GradCacheSettings(),
    )


def _random_batch(settings: Settings, num_rows: int) -> Batch:
    rng = np.random.default_rng(0)
    rows = np.arange(num_rows, dtype=np.int32)
    modalities = {side: modality_of(settings.data, side) for side in SIDES}
    sides = {
        side: modality.random_inputs(settings.data, side, rng, num_rows)
        for side, modality in modalities.items()
    }
    batch = {**sides, **_labels(rows)}
    needs = batch_needs(settings)
    if "negatives" in needs:
        count = num_rows * _NEGATIVES
        flat = modalities["key"].random_inputs(settings.data, "key", rng, count)
        inputs = jax.tree.map(
            lambda leaf: leaf.reshape(num_rows, _NEGATIVES, *leaf.shape[1:]), flat
        )
        others = rng.integers(0, num_rows, (num_rows, _NEGATIVES)).astype(np.int32)
        valid = rng.random(others.shape) < 0.8
        batch["negatives"] = {"inputs": inputs, "valid": valid, **_labels(others)}
    if "teacher_scores" in needs:
        scores = rng.normal(size=(num_rows, 1 + _NEGATIVES))
        batch["teacher_scores"] = scores.astype(np.float32)
    if "score" in settings.parts.loss.columns.values():
        batch["score"] = rng.integers(0, 5, num_rows).astype(np.float32)
    if settings.data.guides is not None:
        width = guide_dim(settings.data.guides)
        if "guides" in settings.parts.loss.columns.values():  # the width of the smaller model
            width = settings.model.dim
        guides = rng.normal(size=(2, num_rows, width)).astype(np.float32)
        batch["guides"] = dict(zip(SIDES, guides, strict=True))
        if "negatives" in batch:
            batch["negatives"]["guides"] = guides[1][batch["negatives"]["row"]]
    return batch


def _labels(rows: NumpyInt) -> Batch:
    return {"row": rows, "text": rows // 2, "group": rows // 4}


if __name__ == "__main__":
    main()
