import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxcl.models.layers import images_of
from jaxcl.models.resizing import resize_weights
from jaxcl.models.vision.entry import PixelRule, _axis_weights, enter
from tests.helpers import relative_error

PLAIN = PixelRule(0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def picture(size, seed=0):
    """A smooth picture with noise, as integers."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    waves = np.stack([np.sin(9 * x + 4 * y), np.cos(7 * y), np.sin(5 * x * y)], axis=-1)
    return np.clip(128 + 90 * waves + rng.normal(scale=12, size=waves.shape), 0, 255).astype(
        np.uint8
    )


@pytest.mark.parametrize("cubic", [False, True])
@pytest.mark.parametrize(("length", "size"), [(40, 24), (24, 40), (33, 8), (8, 9), (7, 1)])
def test_resized_images_match_pillow(length, size, cubic):
    image = picture(length)
    found = enter(jnp.asarray(image)[None], PLAIN._replace(size=size, cubic=cubic))[0]
    kernel = Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR
    wanted = np.asarray(Image.fromarray(image).resize((size, size), kernel), int)
    assert np.abs(np.round(255 * np.asarray(found)) - wanted).max() <= 1


def test_the_centre_is_cropped_without_resizing():
    image = picture(256)
    rule = PLAIN._replace(size=224, kept=224 / 256)
    found = enter(jnp.asarray(image)[None], rule)[0]
    np.testing.assert_allclose(255 * found, image[16:240, 16:240], atol=1e-4)


def test_an_image_of_the_size_is_only_normalised():
    assert _axis_weights(24, PixelRule(24)) is None
    image = picture(24)
    rule = PixelRule(24, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5))
    wanted = (image / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.25, 0.5]
    assert relative_error(enter(jnp.asarray(image)[None], rule)[0], wanted) < 1e-6
    floats = jnp.asarray(image / 255, jnp.float32)[None]
    assert relative_error(enter(floats, rule)[0], wanted) < 1e-6


def test_inputs_without_images_name_the_encoder():
    with pytest.raises(ValueError, match="Vit reads images, but this side has tokens, length"):
        images_of({"tokens": 0, "length": 0}, "Vit")


@pytest.mark.parametrize("cubic", [False, True])
@pytest.mark.parametrize("size", [5, 11, 24])
def test_traced_ranges_have_the_weights_of_fixed_ones(cubic, size):
    fixed = resize_weights(16, 3, 11, size, cubic=cubic)
    traced = jax.jit(
        lambda start, extent: resize_weights(16, start, extent, size, cubic=cubic, module=jnp)
    )(jnp.float32(3), jnp.float32(11))
    np.testing.assert_allclose(traced, fixed, atol=1e-5)
    np.testing.assert_allclose(fixed.sum(1), 1)
    if size == 11:  # the range itself
        np.testing.assert_allclose(fixed, np.eye(11, 16, 3), atol=1e-12)
