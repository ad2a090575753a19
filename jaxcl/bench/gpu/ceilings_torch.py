"""PyTorch's ceilings on this device: a large bf16 product, and a copy of device memory.

python ceilings_torch.py SPEC.json
"""

from typing import Any

import torch
from common_torch import DEVICE, checked, machine, run, time_calls
from recorder import Recorder


def measure_all(recorder: Recorder, spec: dict[str, Any]) -> None:
    """Describe the device, and measure both ceilings."""
    recorder.write(event="machine", **machine())
    recorder.measure("bf16 product", lambda: _product(spec))
    recorder.measure("device copy", lambda: _copy(spec))


def _product(spec: dict[str, Any]) -> dict[str, Any]:
    size = spec["sizes"]["product_size"]
    torch.manual_seed(spec["seed"])
    squares = [torch.randn(size, size, device=DEVICE).bfloat16() for _ in range(4)]
    inputs = [*zip(squares[:2], squares[2:], strict=True)]
    rows = min(size, 256)
    wanted = inputs[0][0][:rows].float() @ inputs[0][1].float()
    product = torch.matmul(*inputs[0])[:rows]
    errors = checked({"product": product}, {"product": wanted}, tolerance=2e-2)
    timed = time_calls(torch.matmul, inputs, spec["sizes"])
    return {"flops": 2.0 * size**3, "bytes": 6.0 * size**2, "errors": errors, **timed}


def _copy(spec: dict[str, Any]) -> dict[str, Any]:
    size = spec["sizes"]["copy_mebibytes"] * 2**20 // 4
    torch.manual_seed(spec["seed"])
    inputs = [(torch.randn(size, device=DEVICE),) for _ in range(2)]
    target = torch.empty_like(inputs[0][0])
    copies = {"copy": target.copy_(inputs[0][0])[:4_096]}
    errors = checked(copies, {"copy": inputs[0][0][:4_096]}, tolerance=0.0)
    timed = time_calls(target.copy_, inputs, spec["sizes"])
    return {"bytes": 8.0 * size, "errors": errors, **timed}


if __name__ == "__main__":
    run(measure_all)
