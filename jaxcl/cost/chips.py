"""Peak rates and memory of accelerators, from their data sheets."""

from typing import NamedTuple

__all__ = ["CHIPS", "Chip", "chip_of"]

_GIB = 2**30


class Chip(NamedTuple):
    """The peak rates of a chip.

    Attributes:
      flops: bfloat16 operations per second, without sparsity.
      memory: size of the main memory, in bytes.
      memory_rate: bytes per second to and from main memory.
      link_rate: bytes per second received from other chips. TPUs receive over the two links of a
        ring along one axis of the slice. Collectives over several axes may use more links (4 of
        v5e and v6e, 6 of v4 and v5p), and axes without wraparound have half the rate.
    """

    flops: float
    memory: float
    memory_rate: float
    link_rate: float


CHIPS = {
    "v4": Chip(275e12, 32 * _GIB, 1_228e9, 100e9),
    "v5e": Chip(197e12, 16 * _GIB, 819e9, 100e9),
    "v5p": Chip(459e12, 95 * _GIB, 2_765e9, 200e9),
    "v6e": Chip(918e12, 32 * _GIB, 1_640e9, 200e9),
    "A100": Chip(312e12, 80 * _GIB, 2_039e9, 300e9),
    "H100": Chip(989e12, 80 * _GIB, 3_350e9, 450e9),
    "H200": Chip(989e12, 141 * _GIB, 4_800e9, 450e9),
}
"""Chips by name. TPUs: Google, "TPU architecture", 2025; GPUs: NVIDIA's SXM data sheets."""

_TPU_KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`, or `None` if it is not in `CHIPS`.

    Example:
      >>> chip_of("NVIDIA H200").memory_rate
      4800000000000.0
    """
    if device_kind in _TPU_KINDS:
        return CHIPS[_TPU_KINDS[device_kind]]
    words = device_kind.replace("-", " ").split()
    if {"PCIe", "NVL"} & set(words):  # these are slower than the SXM modules of the same name
        return None
    return next((chip for name, chip in CHIPS.items() if name in words), None)
