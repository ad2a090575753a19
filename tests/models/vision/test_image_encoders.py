"""The image encoders that train from scratch: common properties, then each encoder's own."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxcl.models import (
    ENCODERS,
    ConvNetEncoder,
    ResNetEncoder,
    Towers,
    ViTEncoder,
    make_towers,
)
from jaxcl.models.vision.resnet import StandardisedConv
from jaxcl.models.vision.vit import sincos_positions
from tests.helpers import relative_error

convnet = functools.partial(ConvNetEncoder, 8, dim=6, widths=(4, 8), hidden_dim=12)
resnet = functools.partial(ResNetEncoder, 8, dim=6, stages=(1, 1), width=8, stem="small")
vit = functools.partial(
    ViTEncoder, 8, dim=6, patch_size=4, hidden_dim=16, num_layers=2, num_heads=2, mlp_dim=24
)
MODELS = {
    "convnet": convnet,
    "resnet": functools.partial(resnet, head=(10, 7)),
    "resnet, large stem": functools.partial(resnet, stem="large", stages=(1,), bottleneck=False),
    "vit": vit,
    "vit, sincos, cls": functools.partial(vit, positions="sincos", pooling="cls", head=(10,)),
    "vit, attention": functools.partial(
        vit, pooling="attention", compute_dtype="bfloat16", dropout=0.2
    ),
}
WIDTHS = {"convnet": 12, "resnet": 64, "resnet, large stem": 8}  # of features; 16 for the others
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)


class Model(NamedTuple):
    """An encoder with random parameters, also where new encoders have zeros."""

    towers: Towers
    params: dict
    encode: Callable


@functools.cache
def model_of(name):
    towers = make_towers(lambda rngs: MODELS[name](rngs=rngs))
    leaves, tree = jax.tree.flatten(jax.jit(towers.init)(jax.random.key(0)))
    rng = np.random.default_rng(1)
    leaves = [leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    return Model(towers, jax.tree.unflatten(tree, leaves), jax.jit(towers.encode, static_argnums=1))


def embed(name, image, rngs=None):
    model = model_of(name)
    return model.encode(model.params, "query", {"image": jnp.asarray(image)}, rngs)


every_model = pytest.mark.parametrize("name", MODELS)


def test_every_image_encoder_is_here():
    functions = {getattr(make, "func", make) for make in MODELS.values()}
    assert functions == {ENCODERS[name].function for name in ("convnet", "resnet", "vit")}


@every_model
def test_embeddings_are_unit_vectors_in_float32(name):
    vectors = embed(name, PIXELS)
    assert vectors.shape == (3, 6)
    assert vectors.dtype == jnp.float32
    np.testing.assert_allclose(jnp.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)
    assert relative_error(vectors[1], vectors[0]) > 1e-2  # different images


@every_model
def test_integers_and_floats_have_the_same_embeddings(name):
    floats = PIXELS.astype(np.float32) / 255
    assert relative_error(embed(name, floats), embed(name, PIXELS)) < 1e-5


@every_model
def test_rows_do_not_see_each_other(name):
    others = PIXELS.copy()
    others[[0, 2]] = 255 - others[[0, 2]]
    found, wanted = embed(name, others), embed(name, PIXELS)
    assert relative_error(found[1], wanted[1]) < 1e-5
    assert relative_error(found[0], wanted[0]) > 1e-2


@every_model
def test_every_parameter_has_a_gradient(name):
    model = model_of(name)
    weights = jax.random.normal(jax.random.key(2), (3, 6))

    def total(params):
        vectors = model.towers.encode(params, "query", {"image": jnp.asarray(PIXELS)})
        return (vectors * weights).sum()

    gradients = jax.jit(jax.grad(total))(model.params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", ["convnet", "vit"])
def test_images_of_another_size_are_resized(name):
    """A constant image stays constant, so its embedding does not depend on its size."""
    colour = np.array([200, 30, 90], np.uint8)
    small, large = (np.broadcast_to(colour, (1, size, size, 3)) for size in (8, 13))
    assert relative_error(embed(name, large), embed(name, small)) < 1e-5
    options = {"image_size": 8, "mean": (0.2, 0.3, 0.4), "std": (0.1, 0.2, 0.3)}
    make = MODELS[name]  # reads 8 pixels, whatever is loaded
    towers = make_towers(lambda rngs: make.func(99, **make.keywords, **options, rngs=rngs))
    normalised = (PIXELS / 255 - options["mean"]) / options["std"] * 0.5 + 0.5
    found = towers.encode(model_of(name).params, "query", {"image": jnp.asarray(PIXELS)})
    wanted = embed(name, normalised.astype(np.float32))
    assert relative_error(found, wanted) < 1e-4


def test_dropout_needs_keys_and_follows_them():
    name, keys = "vit, attention", jax.random.split(jax.random.key(1), 3)
    dropped = embed(name, PIXELS, keys)
    order = np.array([2, 0, 1])
    assert relative_error(embed(name, PIXELS[order], keys[order]), dropped[order]) < 1e-5
    assert relative_error(dropped, embed(name, PIXELS)) > 1e-2


def test_the_kernels_of_a_convolution_are_standardised():
    conv = StandardisedConv(3, 5, 3, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    hidden = jax.random.normal(jax.random.key(0), (2, 7, 7, 3))
    wanted = conv(hidden)
    conv.kernel[...] = 7 * conv.kernel[...] + 3
    assert relative_error(conv(hidden), wanted) < 1e-4  # up to the epsilon
    impulse = jnp.zeros((1, 7, 7, 3)).at[0, 3, 3, 1].set(1)
    responses = np.stack([conv(jnp.roll(impulse, channel, 3)) for channel in range(3)])
    filters = responses.reshape(-1, 5)
    np.testing.assert_allclose(filters.sum(0), 0, atol=1e-4)
    np.testing.assert_allclose((filters**2).sum(0), 27, rtol=1e-3)  # 3 · 3 · 3 weights


def test_a_new_residual_block_is_the_identity():
    model = resnet(rngs=nnx.Rngs(0), stages=(2,))
    hidden = jax.random.uniform(jax.random.key(0), (1, 4, 4, 32))
    np.testing.assert_array_equal(model.blocks[1](hidden), hidden)


@pytest.mark.parametrize(
    ("options", "blocks", "parameters"),
    [
        ({"stages": (3, 4, 6, 3)}, 16, 23.5e6),  # ResNet-50 without its classifier
        ({"stages": (2, 2, 2, 2), "bottleneck": False}, 8, 11.2e6),  # ResNet-18
    ],
)
def test_standard_sizes_have_the_parameters_of_the_paper_s(options, blocks, parameters):
    model = nnx.eval_shape(lambda: ResNetEncoder(224, dim=8, **options, rngs=nnx.Rngs(0)))
    assert len(model.blocks) == blocks
    _, params = nnx.split(model, nnx.Param)
    backbone = [
        leaf.size
        for path, leaf in nnx.to_pure_dict(params).items()
        if path != "head"
        for leaf in jax.tree.leaves(leaf)
    ]
    np.testing.assert_allclose(sum(backbone), parameters, rtol=0.005)


def test_a_vit_without_positions_would_not_see_the_order_of_patches():
    """Only positions tell patches apart: without them, the mean is the same in any order."""
    swapped = np.concatenate([PIXELS[:, 4:], PIXELS[:, :4]], 1)
    assert relative_error(embed("vit", swapped), embed("vit", PIXELS)) > 1e-2
    model = model_of("vit")
    params = {"both": model.params["both"] | {"position_table": jnp.zeros((4, 16))}}
    found, wanted = (
        model.encode(params, "query", {"image": jnp.asarray(image)}, None)
        for image in (swapped, PIXELS)
    )
    assert relative_error(found, wanted) < 1e-5


def test_sines_and_cosines_by_hand():
    table = sincos_positions(3, 8)  # frequencies 1 and 1/10,000
    row, column = 2, 1
    wanted = [
        *(np.sin(column), np.sin(column / 10_000), np.cos(column), np.cos(column / 10_000)),
        *(np.sin(row), np.sin(row / 10_000), np.cos(row), np.cos(row / 10_000)),
    ]
    np.testing.assert_allclose(table[3 * row + column], wanted, rtol=1e-6)


def test_one_loop_over_the_layers_is_the_layers_one_after_the_other():
    params = model_of("vit").params["both"]
    blocks = params["blocks"]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(blocks[n] for n in sorted(blocks)))
    looped = make_towers(lambda rngs: vit(scan_layers=True, remat=True, rngs=rngs))
    encode = jax.jit(looped.encode, static_argnums=1)
    found = encode({"both": params | {"blocks": stacked}}, "query", {"image": PIXELS})
    assert relative_error(found, embed("vit", PIXELS)) < 1e-5


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (vit, {"patch_size": 3}, "images of 8 pixels do not divide into patches of patch_size=3"),
        (vit, {"num_heads": 3}, "hidden_dim=16 does not divide over 3 heads"),
        (vit, {"pooling": "max"}, "pooling='max' is unknown; use one of mean, cls, attention"),
        (vit, {"positions": "rotary"}, "positions='rotary' is unknown; use one of learned, sincos"),
        (vit, {"attention": "cudnn", "compute_dtype": "float32"}, "attention='cudnn' with"),
        (vit, {"positions": "sincos", "hidden_dim": 6}, "hidden_dim=6 with positions='sincos'"),
        (resnet, {"stem": "tall"}, "stem='tall' is unknown; use one of large, small"),
        (resnet, {"stages": (0,)}, "stages=0; set it to at least 1"),
        (resnet, {"stages": ()}, r"stages=\(\) has no block; give at least one"),
        (convnet, {"widths": ()}, r"widths=\(\) has no convolution; give at least one"),
        (convnet, {"head": (0,)}, "head=0; set it to at least 1"),
        (convnet, {"std": (0.5, 0.5, 0.0)}, "std=0.0; set it above 0"),
        (convnet, {"compute_dtype": "int8"}, "compute_dtype='int8' is not a floating-point type"),
    ],
)
def test_a_wrong_option_is_an_error(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("name", ["convnet", "resnet", "vit"])
def test_texts_are_an_error(name):
    model = model_of(name)
    message = f"{ENCODERS[name].function.__name__} reads images, but this side has tokens"
    with pytest.raises(ValueError, match=message):
        model.towers.encode(model.params, "query", {"tokens": jnp.ones((2, 3), int)})


@every_model
def test_features_are_below_the_projection_head(name):
    model = model_of(name)
    features = jax.jit(model.towers.features, static_argnums=1)
    found = features(model.params, "query", {"image": PIXELS})
    assert found.shape == (3, WIDTHS.get(name, 16))
    np.testing.assert_allclose(jnp.linalg.norm(found, axis=1), 1.0, rtol=1e-5)
    head = jax.tree.map(lambda leaf: leaf + 1, model.params["both"]["head"])
    params = {"both": model.params["both"] | {"head": head}}
    np.testing.assert_array_equal(features(params, "query", {"image": PIXELS}), found)
    other = model.encode(params, "query", {"image": jnp.asarray(PIXELS)}, None)
    assert relative_error(other, embed(name, PIXELS)) > 1e-2
