"""Is the gradient of the configured step right on this mesh?

    python -m jaxcl.check_grad --config configs/code_search.py [--config.run.mesh=… …]

Compares the loss, exchange, masks and gradient cache of a config on the present mesh with the dense
loss on one device, for every parameter, on a tiny copy of its model and a batch of random tokens,
without dropout. A reduction that is wrong shows as a ratio: the number of devices, or its inverse.
"""

import sys
from typing import NamedTuple

import jax
import numpy as np
import optax
from absl import app, flags, logging
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags
from rich.console import Console
from rich.table import Table

from jaxcl.data.row_guides import guide_dim
from jaxcl.host.progress import say
from jaxcl.ops.mesh import make_mesh, put_batch
from jaxcl.settings.build import build_towers, run_mesh
from jaxcl.settings.build_loss import batch_needs, build_loss, build_memory
from jaxcl.step.train_step import TemperatureBounds, init_state, state_sharding
from jaxcl.typing import SIDES, Batch, NumpyInt, PyTree

__all__ = ["GradientCheck", "compare_gradients"]

_LARGEST_ERROR = 1e-3  # float32, summed in another order
_VOCABULARY = 64
_ROWS_PER_DEVICE = 4
_NEGATIVES = 3


class GradientCheck(NamedTuple):
    """One parameter's gradient on the mesh beside that of one device.

    Attributes:
      parameter: its path.
      ratio: by what the mesh's gradient is too large, along the other: 1 is right.
      error: the norm of the difference over that of one device's gradient.
    """

    parameter: str
    ratio: float
    error: float

    @property
    def agrees(self) -> bool:
        """Whether the two are one, to float32's rounding."""
        return self.error < _LARGEST_ERROR


def main(argv: list[str]) -> None:
    """Prints the comparison, and fails where a parameter disagrees."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)
    try:
        comparisons = compare_gradients(flags.FLAGS.config)
    except ValueError as error:
        say(f"error: {error}")
        sys.exit(1)
    table = Table("parameter", "ratio", "relative error", "")
    for found in comparisons:
        verdict = "" if found.agrees else "wrong"
        table.add_row(found.parameter, f"{found.ratio:.6f}", f"{found.error:.1e}", verdict)
    Console().print(table)
    if run_mesh(flags.FLAGS.config).size == 1:
        say(
            "one device: nothing was summed over devices. "
            "XLA_FLAGS=--xla_force_host_platform_device_count=8 makes eight of a CPU"
        )
    if not all(comparison.agrees for comparison in comparisons):
        sys.exit(1)


def compare_gradients(config: ConfigDict) -> list[GradientCheck]:
    """Compares every parameter's gradient, the temperature's included.

    Args:
      config: as the files of `configs/` return it; what counts is its loss, exchange, gradient
        cache and mesh.

    Raises:
      ValueError: for a config that cannot run here.
    """
    mesh = run_mesh(config)
    tiny = _tiny(config)
    towers = build_towers(tiny.model, vocabulary_size=_VOCABULARY)
    num_rows = _ROWS_PER_DEVICE * mesh.size
    batch = _random_batch(tiny, num_rows)
    state = init_state(
        jax.random.key(0),
        towers.init,
        optax.identity(),
        temperature=TemperatureBounds(**config.loss.temperature),
        bias=config.loss.get("bias"),
        memory=build_memory(tiny, num_rows, batch["group"]),
    )
    one = make_mesh({"data": 1}, devices=jax.devices()[:1])
    # One batch first, so that what is remembered has a part in the gradient.
    first = jax.jit(build_loss(_dense(tiny), towers, one))
    placed = put_batch(batch, one)
    state = state._replace(memory=first(state.params, state.memory, placed, None)[1])

    def gradient(config: ConfigDict, mesh: Mesh) -> PyTree:
        loss = jax.jit(jax.grad(build_loss(config, towers, mesh), has_aux=True))
        placed = jax.device_put(state, state_sharding(mesh, state))
        return loss(placed.params, placed.memory, put_batch(batch, mesh), None)[0]

    found, wanted = gradient(tiny, mesh), gradient(_dense(tiny), one)
    return [
        _compared(jax.tree_util.keystr(path, simple=True, separator="/"), ours, theirs)
        for (path, ours), theirs in zip(
            jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True
        )
    ]


def _compared(parameter: str, ours: jax.Array, theirs: jax.Array) -> GradientCheck:
    found, wanted = (np.asarray(gradient, np.float64) for gradient in (ours, theirs))
    squares = (wanted * wanted).sum()
    if squares == 0:  # as that of a weight that this batch never reads
        return GradientCheck(parameter, float("nan") if found.any() else 1.0, float(found.any()))
    error = np.linalg.norm(found - wanted) / np.sqrt(squares)
    return GradientCheck(parameter, float((found * wanted).sum() / squares), float(error))


def _tiny(config: ConfigDict) -> ConfigDict:
    """The same with a small model that drops nothing, and chunks of 2 rows if it has chunks."""
    tiny = config.copy_and_resolve_references()
    small = {"hidden_dim": 16, "num_layers": 2, "num_heads": 2, "mlp_dim": 32}
    with tiny.unlocked():
        tiny.model.dim = max((16, *tiny.loss.get("matryoshka_dims", ())))
        for name in tiny.model.options:
            if "dropout" in name:
                tiny.model.options[name] = 0.0
            elif name == "compute_dtype":
                tiny.model.options[name] = "float32"
            elif tiny.model.options[name] is not None and name in small:
                tiny.model.options[name] = small[name]
        if "negatives" in tiny:
            tiny.negatives.proportions = "rows"  # of the groups that the batch below has
        tiny.data.max_tokens = ConfigDict(dict.fromkeys(SIDES, 8))
        if any(value is not None for value in dict(tiny.get("grad_cache", {})).values()):
            tiny.grad_cache = ConfigDict({"chunk_size": 2})
    return tiny


def _dense(config: ConfigDict) -> ConfigDict:
    dense = config.copy_and_resolve_references()
    with dense.unlocked():
        dense.loss.update({"exchange": "gather", "implementation": "reference"})
        dense.grad_cache = ConfigDict()
    return dense


def _random_batch(config: ConfigDict, num_rows: int) -> Batch:
    rng = np.random.default_rng(0)
    rows = np.arange(num_rows, dtype=np.int32)
    sides = {
        side: {"tokens": rng.integers(1, _VOCABULARY, (num_rows, width)).astype(np.int32)}
        for side, width in config.data.max_tokens.items()
    }
    batch = {**sides, **_labels(rows)}
    needs = batch_needs(config)
    if "negatives" in needs:
        width = config.data.max_tokens["key"]
        tokens = rng.integers(1, _VOCABULARY, (num_rows, _NEGATIVES, width)).astype(np.int32)
        others = rng.integers(0, num_rows, (num_rows, _NEGATIVES)).astype(np.int32)
        valid = rng.random(others.shape) < 0.8
        batch["negatives"] = {"inputs": {"tokens": tokens}, "valid": valid, **_labels(others)}
    if "teacher_scores" in needs:
        scores = rng.normal(size=(num_rows, 1 + _NEGATIVES))
        batch["teacher_scores"] = scores.astype(np.float32)
    if "guides" in needs:
        guides = rng.normal(size=(2, num_rows, guide_dim(config.data.guides))).astype(np.float32)
        batch["guides"] = dict(zip(SIDES, guides, strict=True))
        if "negatives" in batch:
            batch["negatives"]["guides"] = guides[1][batch["negatives"]["row"]]
    return batch


def _labels(rows: NumpyInt) -> Batch:
    return {"row": rows, "text": rows // 2, "group": rows // 4}


if __name__ == "__main__":
    # Here and not above, since jaxcl.train has a flag of the same name.
    config_flags.DEFINE_config_file("config", None, "A file of configs/.")
    flags.mark_flag_as_required("config")
    app.run(main)
