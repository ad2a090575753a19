"""What share of the devices' arithmetic a run's model takes."""

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
    """Products and sums of one step that the model itself asks for.

    The matrix products of both sides' encoding and of the scores of all queries with all keys,
    three times: forward, and backward to both factors. What is computed again to spare memory,
    negatives beside the batch and a momentum encoder do not count.

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
    """What the devices can do in a second in bfloat16, by their maker; `None` where not known."""
    chips = [chip_of(device.device_kind) for device in devices]
    return math.fsum(chip.flops for chip in chips if chip) if all(chips) else None
