"""Write torchvision's results of the operations that `tests/models/test_image_operations.py` tests.

    python tests/models/image_values/make_values.py

It needs torch, torchvision and Pillow; the tests do not. `values.npz` holds a small image, each
result in [0, 1], the means and standard deviations of torchvision's random crop boxes, and the
versions of these packages.
"""

import itertools
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent

BOXES = {  # top, left, height, width, and the size of the result
    "whole": (0, 0, 21, 27, 12),
    "shrunk": (3, 5, 16, 14, 6),
    "enlarged": (4, 2, 6, 9, 17),
    "corner": (13, 19, 8, 8, 8),
    "mixed": (1, 0, 19, 5, 11),
}
BLURS = ((0.1, 1), (0.8, 2), (1.7, 6), (2.0, 11))
FACTORS = (0.3, 1.0, 1.8)
SHIFTS = (-0.5, -0.13, 0.0, 0.2, 0.5)
JITTER = {"brightness": 1.6, "contrast": 0.4, "saturation": 1.7, "hue": -0.15}
CROP_SCALE, NUM_BOXES = (0.08, 1.0), 100_000


def import_torchvision():
    """Import torchvision; without CUDA, the operators that it looks up have to be declared."""
    import torch

    library = torch.library.Library("torchvision", "DEF")
    names = ["nms", "qnms"]
    for name in ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"):
        names += [name, f"_{name}_backward"]
    for name in names:
        try:
            library.define(f"{name}(Tensor x) -> Tensor")
        except RuntimeError:  # torchvision brings its own
            break
    import torchvision

    return torchvision


def small_image() -> np.ndarray:
    """An image with edges, saturated colours, grey and black pixels."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:21, :27]
    waves = [np.sin(x / a + y / b + c) for a, b, c in ((3, 5, 0), (4, -3, 1), (7, 2, 2))]
    image = 128 + 100 * np.stack(waves, -1) + rng.normal(0, 20, (21, 27, 3))
    image[8:12, 10:16] = (255, 0, 0)
    image[12:15, 4:9] = 90
    image[2:4, 20:25] = 0
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def main() -> None:
    import PIL
    import PIL.Image
    import torch

    torchvision = import_torchvision()
    from torchvision.transforms import InterpolationMode, RandomResizedCrop
    from torchvision.transforms import functional as F

    pixels = small_image()
    image = torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float64) / 255
    modes = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}
    values = {}
    for (name, (*box, size)), (kind, mode) in itertools.product(BOXES.items(), modes.items()):
        result = F.resized_crop(image, *box, [size, size], mode, antialias=True)
        values[f"crop/{name}/{kind}"] = result.clip(0, 1)
        top, left, height, width = box
        pillow = PIL.Image.fromarray(pixels).crop((left, top, left + width, top + height))
        resized = pillow.resize((size, size), PIL.Image.Resampling.BILINEAR)
        values[f"pillow/{name}"] = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255
    for factor in FACTORS:
        values[f"brightness/{factor}"] = F.adjust_brightness(image, factor)
        values[f"contrast/{factor}"] = F.adjust_contrast(image, factor)
        values[f"saturation/{factor}"] = F.adjust_saturation(image, factor)
    for shift in SHIFTS:
        values[f"hue/{shift}"] = F.adjust_hue(image, shift)
    adjust = {name: getattr(F, f"adjust_{name}") for name in JITTER}
    for order in itertools.permutations(range(4)):
        result = image
        for number in order:
            name = list(JITTER)[number]
            result = adjust[name](result, JITTER[name])
        values["jitter/" + "".join(map(str, order))] = result
    values["grayscale"] = F.rgb_to_grayscale(image, 3)
    values["solarised"] = F.solarize(image, 128 / 255)
    for sigma, radius in BLURS:
        values[f"blur/{sigma}/{radius}"] = F.gaussian_blur(image, 2 * radius + 1, sigma)
    torch.manual_seed(0)
    empty, ratio = torch.empty(3, 96, 128), [3 / 4, 4 / 3]
    boxes = np.array(
        [RandomResizedCrop.get_params(empty, list(CROP_SCALE), ratio) for _ in range(NUM_BOXES)]
    )
    arrays = {
        name: value.permute(1, 2, 0).numpy().astype(np.float32) for name, value in values.items()
    }
    arrays |= {"image": pixels, "boxes/mean": boxes.mean(0), "boxes/std": boxes.std(0)}
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    versions |= {"torchvision": torchvision.__version__, "Pillow": PIL.__version__}
    arrays["versions"] = np.array([f"{name} {version}" for name, version in versions.items()])
    np.savez_compressed(HERE / "values.npz", **arrays)


if __name__ == "__main__":
    main()
