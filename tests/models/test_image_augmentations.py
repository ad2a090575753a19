"""Presets of image augmentations: their steps, their rates, and their random keys."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.models.augmentations import AUGMENTATIONS
from jaxcl.models.image_augmentations import clip, moco_v2, random_view, simclr
from jaxcl.models.image_operations import flipped, gaussian_blur, grayscale, solarised
from jaxcl.ops.mesh import make_mesh
from jaxcl.ops.vectors import normalise
from jaxcl.step.encode_rows import keys_of_side, make_encode_rows
from jaxcl.typing import SIDES
from tests.helpers import towers_of
from tests.models.test_augmentations import each_arrangement

PRESETS = {"clip": clip, "moco_v2": moco_v2, "simclr": simclr}
NO_COLOUR = {"jitter_rate": 0.0, "grayscale_rate": 0.0, "blur_rate": 0.0}
NOTHING = NO_COLOUR | {"crop_scale": (1.0, 1.0), "flip_rate": 0.0}
PIXELS = np.random.default_rng(0).integers(0, 256, (30, 30, 3), np.uint8)
IMAGE = jnp.asarray(PIXELS).astype(jnp.float32) / 255


def view(augment, seed=0, image=PIXELS):
    return augment({"image": jnp.asarray(image)}, jax.random.key(seed))["image"]


def views(augment, count, image=PIXELS):
    keys = jax.random.split(jax.random.key(0), count)
    augment = jax.jit(jax.vmap(augment, (None, 0)))
    return np.asarray(augment({"image": jnp.asarray(image)}, keys)["image"])


@pytest.mark.parametrize("name", PRESETS)
def test_a_view_has_floats_of_the_size(name):
    assert AUGMENTATIONS[name].function is PRESETS[name]
    found = view(PRESETS[name](size=17))
    assert found.shape == (17, 17, 3)
    assert found.dtype == jnp.float32
    assert 0 <= found.min() < found.max() <= 1
    np.testing.assert_allclose(view(PRESETS[name](size=17), image=IMAGE), found, atol=1e-5)
    assert view(PRESETS[name]()).shape == PIXELS.shape
    assert np.abs(found - view(PRESETS[name](size=17), seed=1)).max() > 0.05


def test_without_its_steps_a_view_is_the_image():
    np.testing.assert_allclose(view(simclr(**NOTHING)), IMAGE, atol=1e-6)
    no_jitter = NOTHING | {"jitter_rate": 1.0, "jitter_strength": 0.0}
    np.testing.assert_allclose(view(simclr(**no_jitter)), IMAGE, atol=1e-6)
    np.testing.assert_allclose(view(clip(crop_scale=(1.0, 1.0))), IMAGE, atol=1e-6)


def test_each_step_alone_does_what_its_option_says():
    blur = gaussian_blur(IMAGE, sigma=1.3, radius=1)  # a twentieth of 30 pixels, rounded down
    for options, wanted in (
        ({"flip_rate": 1.0}, flipped(IMAGE)),
        ({"grayscale_rate": 1.0}, grayscale(IMAGE)),
        ({"blur_rate": 1.0, "blur_sigma": (1.3, 1.3)}, blur),
        ({"solarise_rate": 1.0}, solarised(IMAGE)),
    ):
        np.testing.assert_allclose(view(simclr(**NOTHING | options)), wanted, atol=1e-6)
        assert np.abs(wanted - IMAGE).max() > 0.1, options


def test_steps_have_an_order():
    """Solarisation inverts the values of the blurred grey image."""
    options = {"grayscale_rate": 1.0, "blur_rate": 1.0, "blur_sigma": (2.0, 2.0)}
    found = view(simclr(**NOTHING | options | {"solarise_rate": 1.0, "flip_rate": 1.0}))
    wanted = solarised(gaussian_blur(grayscale(flipped(IMAGE)), sigma=2.0, radius=1))
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("step", ["flip", "grayscale", "blur", "solarise", "jitter"])
def test_a_step_happens_at_its_rate(step):
    found = views(simclr(**NOTHING | {f"{step}_rate": 0.3}), 2_000)
    changed = np.abs(found - IMAGE).max((1, 2, 3)) > 1e-3
    assert abs(changed.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / 2_000)


def test_crops_have_areas_of_the_range():
    """A corner of the image is inside of few small crops, and of most large ones."""
    marked = np.zeros((30, 30, 3), np.uint8)
    marked[:2, :2] = 255
    shares = [
        (views(clip(crop_scale=scale), 500, marked).max((1, 2, 3)) > 0.2).mean()
        for scale in ((0.04, 0.06), (0.9, 1.0))
    ]
    assert shares[0] < 0.02
    assert shares[1] > 0.15


def test_the_colours_of_moco_are_weaker_than_those_of_simclr():
    grey = np.full((4, 4, 3), 0.5, np.float32)  # of which only the brightness can change
    for preset, amount in ((simclr, 0.8), (moco_v2, 0.4)):
        for strength in (1.0, 0.5):
            options = NOTHING | {"jitter_rate": 1.0, "jitter_strength": strength}
            factors = views(preset(**options), 1_000, grey) / 0.5
            np.testing.assert_allclose(factors.min(), 1 - strength * amount, atol=0.02)
            np.testing.assert_allclose(factors.max(), 1 + strength * amount, atol=0.02)


@functools.cache
def towers():
    """Towers whose embeddings are projected pixels."""
    weights = jax.random.normal(jax.random.key(5), (12 * 12 * 3, 16))

    def encode(params, side, inputs, rngs=None):
        image = inputs["image"]
        return normalise((image - 0.5).reshape(image.shape[0], -1) @ weights)

    return towers_of(encode)._replace(augment={"query": simclr(size=12), "key": moco_v2(size=12)})


@each_arrangement
def test_a_row_s_view_depends_on_its_number_alone(devices, chunk_sizes):
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (16, 14, 14, 3)), jnp.uint8)
    row, order = jnp.arange(16) * 3, jnp.asarray(rng.permutation(16))

    def embedded(devices, chunk_sizes, order):
        mesh = make_mesh({"data": devices}, devices=jax.devices()[:devices])
        encode = jax.jit(make_encode_rows(towers(), mesh, chunk_sizes), static_argnums=1)
        return {
            side: encode(
                {},
                side,
                {"image": images[order]},
                keys_of_side(jax.random.key(2), number, row[order]),
            )
            for number, side in enumerate(SIDES)
        }

    wanted = embedded(1, None, jnp.arange(16))
    found = embedded(devices, chunk_sizes, order)
    for side in SIDES:
        np.testing.assert_allclose(found[side], wanted[side][order], atol=1e-5)
    assert np.abs(wanted["query"] - wanted["key"]).max() > 0.1  # the sides have different views
    assert np.abs(found["query"] - wanted["query"]).max() > 0.1  # the order matters to the test


def test_evaluation_sees_the_image():
    mesh = make_mesh({"data": 1}, devices=jax.devices()[:1])
    encode = make_encode_rows(towers(), mesh, None)
    inputs = {"image": IMAGE[None, :12, :12]}
    keys = keys_of_side(jax.random.key(2), 0, jnp.arange(1))
    plain = towers().encode({}, "query", inputs)
    np.testing.assert_array_equal(encode({}, "query", inputs), plain)
    assert np.abs(np.asarray(encode({}, "query", inputs, keys) - plain)).max() > 0.05


def test_other_inputs_of_a_row_are_left_alone():
    inputs = {"image": jnp.asarray(PIXELS), "label": jnp.int32(3)}
    assert simclr(size=8)(inputs, jax.random.key(0))["label"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_scale": (0.5, 0.2)}, r"crop_scale=\(0.5, 0.2\); give the smaller value first"),
        ({"crop_scale": (0.0, 0.2)}, "crop_scale=0.0; set it above 0, at most 1"),
        ({"blur_sigma": (1.0, 0.0)}, "blur_sigma=0.0; set it above 0"),
        ({"flip_rate": 1.5}, "flip_rate=1.5; set it to at least 0, at most 1"),
        ({"interpolation": "area"}, "interpolation='area' is unknown"),
        ({"size": 0}, "size=0; set it to at least 1"),
    ],
)
def test_a_wrong_option_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        simclr(**options)


def test_texts_are_an_error():
    with pytest.raises(ValueError, match=r"reads images, but this side has tokens; see data.mod"):
        simclr()({"tokens": jnp.ones(3, int)}, jax.random.key(0))


def test_a_wrong_range_of_jitter_is_an_error():
    with pytest.raises(ValueError, match="jitter=-1"):
        random_view((-1.0, 0.0, 0.0, 0.0))


def test_crops_for_captions_have_no_options_of_colours():
    with pytest.raises(TypeError, match="jitter_rate"):
        clip(jitter_rate=1.0)


def test_presets_have_their_own_help():
    assert inspect.getdoc(simclr).startswith("Make random views as in SimCLR")
    assert inspect.getdoc(moco_v2).startswith("Make random views as in MoCo v2")
