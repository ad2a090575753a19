"""Model FLOPs utilization: the share of the devices' peak rate that a run's model uses."""

import math
from collections.abc import Collection, Sequence
from typing import Any

import jax

from jaxcl.cost.chips import chip_of
from jaxcl.cost.program_cost import matrix_flops
from jaxcl.data.modalities import modality_of
from jaxcl.models.towers import Towers
from jaxcl.models.trainable import merge, split
from jaxcl.settings.sections import Settings
from jaxcl.typing import SIDES, PyTree, Scalar

__all__ = ["model_flops", "peak_flops"]


def model_flops(settings: Settings, towers: Towers, *, frozen: Collection[str] = ()) -> float:
    """Count the floating-point operations that the model needs in one step.

    These are the matrix products and convolutions of encoding both sides, and the scores of all
    queries against all keys, counted three times: once for the forward pass and twice for the
    backward pass. The count leaves out recomputation, negatives other than in-batch negatives, a
    momentum encoder, and the gradients that need not be computed because parameters are frozen.

    Args:
      settings: the settings of the run.
      towers: the model.
      frozen: the paths of the parameters that are not trained (`jaxcl.models.trainable`).

    Reference:
      Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", 2022, appendix B.
    """
    params = jax.eval_shape(towers.init, jax.random.key(0))
    size = settings.global_batch_size

    def inputs_of(side: str) -> PyTree:
        spec = modality_of(settings.data, side).spec(settings.data, side)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype), spec
        )

    def of_side(side: str) -> float:
        encode = jax.make_jaxpr(lambda params, inputs: towers.encode(params, side, inputs))
        return matrix_flops(encode(params, inputs_of(side)))

    def of_gradient(side: str, frozen: Collection[str]) -> float:
        trained, held = split({"towers": params}, frozen)

        def total(trained: PyTree, held: PyTree, inputs: PyTree) -> Scalar:
            return towers.encode(merge(trained, held)["towers"], side, inputs).sum()

        return matrix_flops(jax.make_jaxpr(jax.grad(total))(trained, held, inputs_of(side)))

    saved = 0.0
    if frozen:
        saved = sum(of_gradient(side, ()) - of_gradient(side, frozen) for side in SIDES)
    return 3 * (sum(map(of_side, SIDES)) + 2.0 * size**2 * settings.model.dim) - saved


def peak_flops(devices: Sequence[Any]) -> float | None:
    """The sum of the devices' peak rates in bfloat16, in FLOP/s; `None` if any rate is unknown."""
    chips = [chip_of(device.device_kind) for device in devices]
    return math.fsum(chip.flops for chip in chips if chip) if all(chips) else None
