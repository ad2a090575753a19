"""Operations on images against torchvision's and Pillow's results, which a script recorded."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.models.image_operations import (
    CropBox,
    Jitter,
    as_float_image,
    colour_jitter,
    flipped,
    gaussian_blur,
    grayscale,
    random_crop_box,
    random_jitter,
    resized_crop,
    shifted_hue,
    solarised,
    with_brightness,
    with_contrast,
    with_saturation,
)
from tests.models.image_values.make_values import (
    BLURS,
    BOXES,
    CROP_SCALE,
    FACTORS,
    JITTER,
    SHIFTS,
)

VALUES = np.load(Path(__file__).parent / "image_values" / "values.npz")
ORDERS = list(itertools.permutations(range(4)))
INTERPOLATIONS = ("bilinear", "bicubic")
OPERATIONS = {
    **{f"brightness/{one}": lambda image, one=one: with_brightness(image, one) for one in FACTORS},
    **{f"contrast/{one}": lambda image, one=one: with_contrast(image, one) for one in FACTORS},
    **{f"saturation/{one}": lambda image, one=one: with_saturation(image, one) for one in FACTORS},
    **{f"hue/{one}": lambda image, one=one: shifted_hue(image, one) for one in SHIFTS},
    **{
        f"blur/{sigma}/{radius}": lambda image, sigma=sigma, radius=radius: gaussian_blur(
            image, sigma=sigma, radius=radius
        )
        for sigma, radius in BLURS
    },
    "grayscale": grayscale,
    "solarised": solarised,
}


def image(dtype=np.float64):
    return jnp.asarray(VALUES["image"] / 255, dtype)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_equals_torchvision_s(name, x64):
    np.testing.assert_allclose(OPERATIONS[name](image()), VALUES[name], atol=1e-6)


def test_operations_in_float32_are_close_and_stay_float32():
    for name, operation in OPERATIONS.items():
        result = operation(image(np.float32))
        assert result.dtype == jnp.float32, name
        np.testing.assert_allclose(result, VALUES[name], atol=3e-6, err_msg=name)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("name", BOXES)
def test_a_resized_crop_equals_torchvision_s_and_pillow_s(name, interpolation, x64):
    *box, size = BOXES[name]
    found = resized_crop(image(), CropBox(*box), size=size, interpolation=interpolation)
    np.testing.assert_allclose(found, VALUES[f"crop/{name}/{interpolation}"], atol=1e-6)
    if interpolation == "bilinear":  # Pillow clips and rounds bicubic values after each axis
        levels = np.round(255 * np.asarray(found))
        assert np.abs(levels - 255 * VALUES[f"pillow/{name}"]).max() < 1.01


def test_the_box_and_the_flip_may_be_traced():
    boxes = [CropBox(*map(jnp.float32, box)) for *box, size in BOXES.values()]
    together = CropBox(*(jnp.stack(values) for values in zip(*boxes, strict=True)))
    flips = jnp.array([False, True, False, True, True])
    crop = jax.jit(
        jax.vmap(lambda box, flip: resized_crop(image(np.float32), box, size=7, flip=flip))
    )
    for result, box, flip in zip(crop(together, flips), boxes, flips, strict=True):
        wanted = resized_crop(image(np.float32), box, size=7)
        np.testing.assert_allclose(result, flipped(wanted) if flip else wanted, atol=3e-5)
        assert np.abs(result - (wanted if flip else flipped(wanted))).max() > 0.05


def test_a_crop_of_the_whole_image_at_its_size_is_the_image():
    found = resized_crop(image(np.float32), CropBox(0, 0, 21, 27), size=(21, 27))
    np.testing.assert_array_equal(found, image(np.float32))


def test_pixels_outside_of_the_box_have_no_weight():
    box = CropBox(3, 5, 16, 14)
    inside = np.zeros((21, 27, 1), bool)
    inside[3:19, 5:19] = True
    other = jnp.where(inside, image(np.float32), 1 - image(np.float32))
    found, wanted = (resized_crop(one, box, size=6) for one in (other, image(np.float32)))
    np.testing.assert_array_equal(found, wanted)


def test_colour_jitter_equals_torchvision_s_in_every_order(x64):
    jitter = jax.jit(lambda order: colour_jitter(image(), Jitter(*JITTER.values(), order)))
    results = {order: jitter(jnp.array(order)) for order in ORDERS}
    for order, result in results.items():
        name = "jitter/" + "".join(map(str, order))
        np.testing.assert_allclose(result, VALUES[name], atol=1e-6, err_msg=name)
    first = results[0, 1, 2, 3]
    assert np.abs(results[3, 2, 1, 0] - first).max() > 0.05  # the order matters


def test_every_order_and_every_factor_is_equally_likely():
    draw = jax.vmap(lambda key: random_jitter(key, 0.4, 1.5, 0.2, 0.1))
    draws = jax.jit(draw)(jax.random.split(jax.random.key(0), 24_000))
    orders = [tuple(order) for order in np.asarray(draws.order).tolist()]
    counts = np.array([orders.count(order) for order in ORDERS])
    assert counts.sum() == 24_000
    assert np.abs(counts - 1_000).max() < 5 * 31  # the standard deviation is √(24,000 · 1/24 · …)
    for values, low, high in (
        (draws.brightness, 0.6, 1.4),
        (draws.contrast, 0.0, 2.5),  # no negative factors
        (draws.saturation, 0.8, 1.2),
        (draws.hue, -0.1, 0.1),
    ):
        shares = (np.sort(np.asarray(values)) - low) / (high - low)
        assert shares[0] >= -1e-6
        assert shares[-1] <= 1 + 1e-6
        assert np.abs(shares - np.arange(24_000) / 24_000).max() < 0.015  # Kolmogorov's distance


def test_crop_boxes_have_torchvision_s_distribution():
    draw = jax.jit(jax.vmap(lambda key: random_crop_box(key, 96, 128, scale=CROP_SCALE)))
    boxes = np.stack(draw(jax.random.split(jax.random.key(0), 50_000)), 1)
    top, left, height, width = boxes.T
    assert min(top.min(), left.min()) == 0
    assert (top + height).max() == 96
    assert (left + width).max() == 128
    np.testing.assert_array_equal(boxes, boxes.round())
    mean, std = VALUES["boxes/mean"], VALUES["boxes/std"]
    errors = std * np.sqrt(1 / 50_000 + 1 / 100_000)
    assert (np.abs(boxes.mean(0) - mean) < 5 * errors).all(), (boxes.mean(0), mean)
    np.testing.assert_allclose(boxes.std(0), std, rtol=0.02)


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(20, 90, (0, 31, 20, 27)), (90, 20, (31, 0, 27, 20)), (30, 30, (0, 0, 30, 30))],
)
def test_a_box_that_never_fits_is_central(height, width, box):
    """The whole area fits only if the image has the drawn aspect ratio."""
    found = random_crop_box(jax.random.key(0), height, width, scale=(1.0, 1.0))
    assert tuple(map(float, found)) == box


def test_integers_become_floats_once():
    found = as_float_image(jnp.array([[[0, 51, 255]]], jnp.uint8))
    np.testing.assert_allclose(found, [[[0, 0.2, 1]]], rtol=1e-6)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(as_float_image(found), found)


def test_a_wrong_argument_is_an_error():
    with pytest.raises(ValueError, match="interpolation='area' is unknown; use one of bilinear"):
        resized_crop(image(np.float32), CropBox(0, 0, 4, 4), size=2, interpolation="area")
    with pytest.raises(ValueError, match="radius=21 of the blur in an image of 21 by 27 pixels"):
        gaussian_blur(image(np.float32), sigma=1.0, radius=21)
