"""Adapters: the frozen model at first, then its kernels plus a scaled product, in every encoder."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxcl.models import StaticEncoder, make_towers
from jaxcl.models.lora import (
    Lora,
    LoraLinear,
    add_adapters,
    cast_base,
    frozen_base,
    has_adapters,
    merge_adapters,
    with_base,
    without_adapters,
)
from jaxcl.models.pretrained.description import Dense
from jaxcl.models.pretrained.encoder import PretrainedEncoder
from jaxcl.models.trainable import merge, parameter_paths, split
from tests.helpers import bits, relative_error, relative_errors, some_slow
from tests.models.pretrained.reference_models import TRANSFORMERS, describe, read_config
from tests.models.test_encoders import TOKENS, decoder, transformer

LORA = Lora(rank=3, alpha=2.0)
INPUTS = {"tokens": jnp.asarray(TOKENS), "length": jnp.array([4, 7, 1])}


def pretrained(name):
    return functools.partial(PretrainedEncoder, describe(read_config(name)), remat=True)


ENCODERS = {
    "transformer": transformer,
    "one loop, recomputed": functools.partial(transformer, scan_layers=True, remat=True),
    "decoder": decoder,
} | {name: pretrained(name) for name in TRANSFORMERS}
# The other families have no layers that these lack.
BUILT_IN = ("transformer", "one loop, recomputed", "decoder")
DISTINCT = (*BUILT_IN, "bert", "modernbert", "gemma3", "qwen3")
each_encoder = pytest.mark.parametrize("name", some_slow(ENCODERS, DISTINCT))


def towers_with(name, lora=None, **options):
    """Towers with adapters, and the same without them."""
    make = functools.partial(ENCODERS[name], **options)
    lora = LORA if lora is None else lora
    return (
        make_towers(lambda rngs: add_adapters(make(rngs=rngs), lora, rngs=rngs)),
        make_towers(lambda rngs: make(rngs=rngs)),
    )


def random_parameters(towers):
    """Random parameters in float64, the adapters too."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, jnp.float64),
        jax.eval_shape(towers.init, jax.random.key(0)),
    )


def layers_of(params, path=""):
    """Path -> the parameters of each layer with an adapter."""
    if "lora_a" in params:
        return {path: params}
    parts = [(name, part) for name, part in params.items() if isinstance(part, dict)]
    return {
        key: layer
        for name, part in parts
        for key, layer in layers_of(part, f"{path}/{name}").items()
    }


@pytest.mark.parametrize(
    ("name", "compute_dtype"),
    [
        *((name, "float32") for name in DISTINCT),
        *((name, "bfloat16") for name in BUILT_IN),
        *(
            pytest.param(name, dtype, marks=pytest.mark.slow)
            for name in ENCODERS
            for dtype in ("float32", "bfloat16")
            if name not in (DISTINCT if dtype == "float32" else BUILT_IN)
        ),
    ],
)
def test_the_first_step_has_the_frozen_model_s_embeddings_bitwise(name, compute_dtype):
    towers, base = towers_with(name, compute_dtype=compute_dtype)
    params, plain = towers.init(jax.random.key(1)), base.init(jax.random.key(1))
    assert jax.tree.map(bits, without_adapters(params)) == jax.tree.map(bits, plain)
    rngs = jax.random.split(jax.random.key(2), len(TOKENS))
    for keys in (None, rngs):
        ours = jax.jit(towers.encode, static_argnums=1)(params, "query", INPUTS, keys)
        theirs = jax.jit(base.encode, static_argnums=1)(plain, "query", INPUTS, keys)
        assert bits(ours) == bits(theirs)
    (first, *_) = layers_of(params).values()
    first["lora_b"] = first["lora_b"] + jnp.linspace(0.0, 1.0, first["lora_b"].shape[-1])
    moved = jax.jit(towers.encode, static_argnums=1)(params, "query", INPUTS)
    assert relative_error(moved, ours) > 1e-3


@each_encoder
def test_all_projections_of_the_blocks_have_adapters_by_default(name):
    towers, base = towers_with(name)
    params = jax.eval_shape(towers.init, jax.random.key(0))["both"]
    plain = parameter_paths(jax.eval_shape(base.init, jax.random.key(0))["both"])
    kernels = [path for path in plain if path.endswith("/kernel") and "blocks/" in path]
    layers = {
        f"{path}/kernel".removeprefix("/"): layer for path, layer in layers_of(params).items()
    }
    assert sorted(layers) == kernels
    assert has_adapters(params)
    assert not has_adapters(without_adapters(params))
    for layer in layers.values():
        *stack, inputs, outputs = layer["kernel"].shape
        assert layer["lora_a"].shape == (*stack, inputs, LORA.rank)
        assert layer["lora_b"].shape == (*stack, LORA.rank, outputs)
        assert {layer["lora_a"].dtype, layer["lora_b"].dtype} == {jnp.dtype("float32")}


def test_a_layer_adds_the_scaled_product_of_its_adapter(x64):
    linear = nnx.Linear(5, 4, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    layer = LoraLinear(linear, rank=2, alpha=3.0, rngs=nnx.Rngs(1))
    rng = np.random.default_rng(0)
    inputs, a, b = (rng.normal(size=shape) for shape in ((6, 3, 5), (5, 2), (2, 4)))
    layer.lora_a, layer.lora_b = nnx.Param(jnp.asarray(a)), nnx.Param(jnp.asarray(b))
    kernel, bias = np.asarray(linear.kernel[...]), np.asarray(linear.bias[...])
    wanted = inputs @ kernel + bias + 3.0 / 2 * (inputs @ a) @ b
    assert relative_error(layer(jnp.asarray(inputs)), wanted) < 1e-14
    assert relative_error(linear(jnp.asarray(inputs)), wanted) > 0.1


def test_the_first_matrix_is_uniform_and_differs_between_layers():
    towers, _ = towers_with("decoder")
    params = towers.init(jax.random.key(0))["both"]
    for layer in layers_of(params).values():
        a, bound = np.asarray(layer["lora_a"]), layer["kernel"].shape[-2] ** -0.5
        assert np.abs(a).max() <= bound
        assert a.std() == pytest.approx(bound / np.sqrt(3), rel=0.25)
        assert bits(a[0]) != bits(a[1])
        assert not layer["lora_b"].any()
    firsts = [bits(layer["lora_a"]) for layer in layers_of(params).values()]
    assert len(set(firsts)) == len(firsts)


@each_encoder
def test_the_merged_encoder_without_adapters_gives_the_same_embeddings(name, x64):
    towers, base = towers_with(name, compute_dtype="float64")
    params = random_parameters(towers)
    live = towers.encode(params, "key", INPUTS)
    merged = merge_adapters(params, LORA)
    assert parameter_paths(merged) == parameter_paths(jax.eval_shape(base.init, jax.random.key(0)))
    assert relative_error(base.encode(merged, "key", INPUTS), live) < 1e-12
    assert relative_error(base.encode(without_adapters(params), "key", INPUTS), live) > 1e-2
    wrong = merge_adapters(params, LORA._replace(alpha=LORA.alpha * 1.01))
    assert relative_error(base.encode(wrong, "key", INPUTS), live) > 1e-6


def transposed(matrix):
    return np.swapaxes(np.asarray(matrix), -1, -2)


def total_of(towers, weights):
    """A loss of the embeddings with a gradient in all directions."""

    def total(params):
        return (weights * towers.encode(params, "query", INPUTS)).sum()

    return total


@each_encoder
def test_the_gradients_are_those_of_the_merged_kernel_by_the_chain_rule(name, x64):
    r"""With K = W + s A B: the gradient of A is s (dK) Bᵀ, and that of B is s Aᵀ (dK)."""
    towers, base = towers_with(name, compute_dtype="float64")
    params = random_parameters(towers)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(3, 1)))
    weights = weights * jnp.arange(1.0, 1 + towers.encode(params, "query", INPUTS).shape[1])
    ours = layers_of(jax.grad(total_of(towers, weights))(params))
    dense = jax.grad(total_of(base, weights))(
        jax.tree.map(jnp.asarray, merge_adapters(params, LORA))
    )
    scale = LORA.alpha / LORA.rank
    for path, layer in layers_of(params).items():
        node = dense
        for part in path.strip("/").split("/"):
            node = node[int(part) if part.isdigit() else part]
        kernel = np.asarray(node["kernel"])
        wanted = {
            "lora_a": scale * kernel @ transposed(layer["lora_b"]),
            "lora_b": scale * transposed(layer["lora_a"]) @ kernel,
        }
        errors = relative_errors({one: ours[path][one] for one in wanted}, wanted)
        assert max(errors.values()) < 1e-10, (path, errors)


def products(function, *arguments) -> set[tuple[int, ...]]:
    """The shapes of all matrix products in a compiled program, up to transposition."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    shapes = re.findall(r"= \(?\w+\[([\d,]+)\]\S* (?:dot\(|custom-call\(.*matmul)", text)
    return {tuple(sorted(map(int, shape.split(",")))) for shape in shapes}


@pytest.mark.parametrize("name", some_slow((*BUILT_IN, "bert", "modernbert"), BUILT_IN))
def test_no_product_of_a_kernel_s_shape_is_computed(name):
    """Neither the gradient of a frozen kernel nor the product of an adapter's two matrices."""
    towers, base = towers_with(name)
    params = towers.init(jax.random.key(0))
    frozen = frozen_base(LORA, parameter_paths({"towers": params}))
    # Blocks in one loop have one product for all layers, or one for each.
    kernels = [
        {tuple(sorted(shape)), tuple(sorted(shape[-2:]))}
        for shape in (layer["kernel"].shape for layer in layers_of(params).values())
    ]

    def computed(*program):
        shapes = products(*program)
        return [bool(shapes & of_kernel) for of_kernel in kernels]

    weights = jnp.arange(1.0, 1 + towers.encode(params, "query", INPUTS).shape[1])
    total = total_of(towers, weights)

    def of_trained(trained, held):
        return total(merge(trained, held)["towers"])

    def of_merged(trained, held):
        params = merge(trained, held)["towers"]
        merged = traced_merge(params)
        return total_of(base, weights)(merged)

    def traced_merge(params):
        if not isinstance(params, dict):
            return params
        parts = {name: traced_merge(part) for name, part in without_adapters(params).items()}
        parts |= {n: traced_merge(p) for n, p in params.items() if isinstance(p, dict)}
        if "lora_a" in params:
            parts["kernel"] = params["kernel"] + params["lora_a"] @ params["lora_b"]
        return parts

    trained, held = split({"towers": params}, frozen)
    assert not any(computed(jax.grad(of_trained), trained, held))
    assert any(computed(of_merged, trained, held))
    trained, held = split({"towers": params}, ())
    assert all(computed(jax.grad(of_trained), trained, held))


def test_a_pattern_without_a_layer_lists_the_layers():
    listed = (
        "blocks/[*]/output, blocks/[*]/projections, blocks/[*]/narrow|"
        "blocks/[*]/narrow, blocks/[*]/output, blocks/[*]/projections, blocks/[*]/widen, projection"
    )
    for pattern in ("*/query", "blocks", "token_table", "*/kernel"):
        with pytest.raises(
            ValueError, match=rf"matches no linear layer of the encoder.*({listed})"
        ):
            towers_with("transformer", Lora(rank=2, targets=("*output", pattern)))
    static = functools.partial(StaticEncoder, 20, dim=6)
    with pytest.raises(
        ValueError, match=r"model\.lora\.rank is set, but the encoder has no linear"
    ):
        add_adapters(static(rngs=nnx.Rngs(0)), LORA, rngs=nnx.Rngs(0))
    projected = static(hidden_dim=8, rngs=nnx.Rngs(0))
    default = r"'[*]blocks/[*]', its default, .* name some of its layers: projection$"
    with pytest.raises(ValueError, match=default):
        add_adapters(projected, LORA, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="rank=None"):
        add_adapters(transformer(rngs=nnx.Rngs(0)), Lora(), rngs=nnx.Rngs(0))


def test_targets_choose_layers_also_in_lists_outside_of_the_blocks():
    config = read_config("bert")
    model = describe(config, dense=(Dense("2_Dense", config["hidden_size"], 12),))
    lora = Lora(rank=2, targets=("*/attention/query", "dense/*"))
    encoder = add_adapters(PretrainedEncoder(model, rngs=nnx.Rngs(0)), lora, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(encoder, nnx.Param))
    layers = layers_of(params)
    assert set(layers) == {
        "/dense/0",
        *(f"/encoder/blocks/{n}/attention/query" for n in params["encoder"]["blocks"]),
    }


def test_a_decoder_whose_blocks_have_different_adapters_is_an_error():
    towers, _ = towers_with("qwen3", Lora(rank=2, targets=("*blocks/0/attention/query",)))
    params = towers.init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"have different parameters; give all blocks the same"):
        towers.encode(params, "query", INPUTS)


def test_a_fused_kernel_has_one_adapter_for_queries_keys_and_values():
    """One A that they share, and columns of B for each."""
    towers, _ = towers_with("modernbert")
    layers = layers_of(jax.eval_shape(towers.init, jax.random.key(0)))
    fused = [layer for path, layer in layers.items() if path.endswith("attention/projections")]
    assert fused
    for layer in fused:
        width, joint = layer["kernel"].shape
        assert joint == 3 * width
        assert layer["lora_a"].shape == (width, LORA.rank)
        assert layer["lora_b"].shape == (LORA.rank, 3 * width)


PATHS = [
    "log_temperature",
    "towers/both/dense/0/kernel",
    "towers/both/blocks/0/output/kernel",
    "towers/both/blocks/0/output/lora_a",
    "towers/both/blocks/0/output/lora_b",
]


def test_all_parameters_of_the_encoders_are_frozen_except_adapters_and_chosen_ones():
    assert frozen_base(Lora(), PATHS) == set()
    assert frozen_base(LORA, PATHS) == {PATHS[1], PATHS[2]}
    assert frozen_base(LORA._replace(also_train=("*/dense/*",)), PATHS) == {PATHS[2]}
    for pattern in ("*/densee/*", "log_temperature", "*/lora_a"):
        with pytest.raises(ValueError, match=r"model\.lora\.also_train has '"):
            frozen_base(LORA._replace(also_train=(pattern,)), PATHS)


def test_the_base_type_is_that_of_frozen_kernels_and_token_tables_alone():
    towers, _ = towers_with("bert")
    params = {"towers": towers.init(jax.random.key(0))}
    frozen = frozen_base(LORA, parameter_paths(params))
    cast = cast_base(params, frozen, "bfloat16")
    narrow = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(cast)
        if leaf.dtype == jnp.bfloat16
    }
    assert narrow == {path for path in frozen if path.endswith(("/kernel", "/token_table"))}
    assert jax.tree.map(bits, cast_base(params, frozen, None)) == jax.tree.map(bits, params)


def test_merging_leaves_other_leaves_and_zero_adapters_unchanged():
    towers, _ = towers_with("transformer")
    params = towers.init(jax.random.key(0))
    merged = merge_adapters(params, LORA)
    assert jax.tree.map(bits, merged) == jax.tree.map(bits, without_adapters(params))
    narrow = {"kernel": jnp.ones((2, 2), jnp.bfloat16), "bias": jnp.ones(2, jnp.bfloat16)}
    adapter = {"lora_a": jnp.full((2, 3), 2.0**-6), "lora_b": jnp.full((3, 2), 2.0**-6)}
    layer = merge_adapters(narrow | adapter, LORA)
    assert layer["bias"].dtype == jnp.bfloat16
    assert layer["kernel"].dtype == np.float32  # bfloat16 could not hold the sum
    assert layer["kernel"].tolist() == [[1 + 2 / 3 * 3 * 2.0**-12] * 2] * 2


def test_the_base_of_a_file_leaves_the_adapters():
    towers, base = towers_with("transformer")
    params, loaded = towers.init(jax.random.key(0)), base.init(jax.random.key(5))
    joined = with_base(params, loaded)
    assert jax.tree.map(bits, without_adapters(joined)) == jax.tree.map(bits, loaded)
    for path, layer in layers_of(joined).items():
        assert bits(layer["lora_a"]) == bits(layers_of(params)[path]["lora_a"])
    assert with_base({"both": params}, {}) == {"both": params}
