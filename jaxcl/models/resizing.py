"""The weights of pixels in resized images, for fixed and for traced ranges."""

from typing import Any, TypeAlias

import numpy as np

from jaxcl.typing import Array, Float, Scalar

__all__ = ["keys_cubic", "resize_weights"]

_Number: TypeAlias = int | float | Scalar
_Matrix: TypeAlias = Float[np.ndarray, "*s"] | Float[Array, "*s"]


def resize_weights(
    length: int, start: _Number, extent: _Number, size: int, *, cubic: bool, module: Any = np
) -> Any:
    r"""The matrix that resizes a range of one axis of an image, as Pillow does.

    Output pixel $i$ lies at $c_i = (i + 1/2)\, r - 1/2$ in the range, with the ratio $r$ of the
    lengths, and has the weights $w_{ij} \propto k((j - c_i) / \max(r, 1))$. The kernel $k$ is a
    triangle, or Keys' cubic function with $a = -1/2$. Pixels outside of the range have no weight.

    Args:
      length: number of pixels of the axis.
      start: the first pixel of the range.
      extent: number of pixels of the range.
      size: number of pixels of the result.
      cubic: whether the kernel is cubic.
      module: `numpy`, or `jax.numpy` for a traced range.

    Returns:
      The weights `[size, length]`.

    Reference:
      Keys, "Cubic Convolution Interpolation for Digital Image Processing", 1981.
    """
    ratio = extent / size
    # Relative to the range, since float32 would be coarser further away from 0.
    centre = (module.arange(size) + 0.5) * ratio - 0.5
    pixel = module.arange(length) - start
    # The kernel is widened only to shrink an image, where it averages.
    distance = (pixel - centre[:, None]) / module.maximum(ratio, 1)
    if cubic:
        weights = keys_cubic(distance, -0.5, module=module)
    else:
        weights = module.maximum(0, 1 - module.abs(distance))
    weights = module.where((pixel >= 0) & (pixel < extent), weights, 0)
    return weights / weights.sum(1, keepdims=True)


def keys_cubic(distance: _Matrix, a: float, *, module: Any = np) -> Any:
    """Keys' cubic kernel with the parameter `a`: -0.5 in Pillow, -0.75 in PyTorch."""
    x = module.abs(distance)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return module.where(x < 1, near, module.where(x < 2, far, 0))
