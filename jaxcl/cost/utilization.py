"""Model FLOPs utilization: the share of the devices' peak rate that a run's model uses."""

import math
from collections.abc import Sequence
from typing import Any

import jax

from jaxcl.cost.chips import chip_of
from jaxcl.cost.program_cost import matrix_flops
from jaxcl.data.modalities import modality_of
from jaxcl.models.towers import Towers
from jaxcl.settings.sections import Settings
from jaxcl.typing import SIDES

__all__ = ["model_flops", "peak_flops"]


def model_flops(settings: Settings, towers: Towers) -> float:
    """Count the floating-point operations that the model needs in one step.

    These are the matrix products of encoding both sides and of scoring all queries against all
    keys, counted three times: once forward, and twice backward. Recomputation, negatives in
    addition to in-batch negatives, and a momentum encoder do not count.

    Reference:
      Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", 2022, appendix B.
    """
    params = jax.eval_shape(towers.init, jax.random.key(0))
    size = settings.global_batch_size

    def of_side(side: str) -> float:
        spec = modality_of(settings.data, side).spec(settings.data, side)
        inputs = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype), spec
        )
        encode = jax.make_jaxpr(lambda params, inputs: towers.encode(params, side, inputs))
        return matrix_flops(encode(params, inputs))

    return 3 * (sum(map(of_side, SIDES)) + 2.0 * size**2 * settings.model.dim)


def peak_flops(devices: Sequence[Any]) -> float | None:
    """The sum of the devices' peak rates in bfloat16, in FLOP/s; `None` if one is unknown."""
    chips = [chip_of(device.device_kind) for device in devices]
    return math.fsum(chip.flops for chip in chips if chip) if all(chips) else None
