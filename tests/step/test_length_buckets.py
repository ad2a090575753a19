"""Texts padded to several widths: the loss and every gradient of the batch padded to one."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxcl.losses import LOSSES
from jaxcl.models import DecoderEncoder, TransformerEncoder, make_towers
from jaxcl.models.attention import attend
from jaxcl.models.augmentations import span_masking, token_dropout
from jaxcl.models.pretrained.description import Pooling
from jaxcl.models.pretrained.encoder import PretrainedEncoder
from jaxcl.models.trainable import merge, parameter_paths, split
from jaxcl.ops.mesh import make_mesh, put_batch
from jaxcl.step.batch_loss import make_loss
from jaxcl.step.length_buckets import (
    Buckets,
    bucketed,
    choose_widths,
    computed_tokens,
    cut_texts,
    longest_first,
    text_lengths,
)
from jaxcl.step.parameter_sharding import FSDP
from jaxcl.step.train_step import (
    TemperatureBounds,
    init_state,
    make_train_step,
    state_sharding,
)
from jaxcl.typing import SIDES
from tests.helpers import relative_error, relative_errors, some_slow
from tests.models.pretrained.reference_models import TRANSFORMERS, describe, read_config

ROWS, LONGEST, VOCABULARY = 16, 20, 60
MASKS = {"ids": "row", "groups": "group"}
CANDIDATES = (4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56)
TEMPERATURE = TemperatureBounds(initial=0.05, minimum=0.01, maximum=1.0)
BUCKETS = Buckets((8, 13, LONGEST), (3, 2, 2))  # chunks of sizes that do not divide the rows
SIZES = {"dim": 8, "max_tokens": LONGEST, "hidden_dim": 12, "num_layers": 2, "mlp_dim": 16}

TOKENS = token_dropout(rate=0.2)
SPANS = span_masking(rate=0.3, mask_id=3)


def built_in(kind, **options):
    options = SIZES | {"num_heads": 2, "compute_dtype": "float64", "dropout": 0.2} | options
    return lambda rngs: kind(VOCABULARY, rngs=rngs, **options)


def pretrained(name):
    model = describe(read_config(name), normalize=True)
    options = {"compute_dtype": "float64", "dropout": 0.2}
    return lambda rngs: PretrainedEncoder(model, rngs=rngs, **options)


ONE_LAYER = "one layer"  # compiles in half the time
ENCODERS = {
    "transformer": built_in(TransformerEncoder),
    "transformer, cls": built_in(TransformerEncoder, pooling="cls", norm_position="post"),
    "transformer, scanned": built_in(TransformerEncoder, scan_layers=True, remat=True),
    "decoder": built_in(DecoderEncoder, num_key_heads=1, remat=True),
    ONE_LAYER: built_in(TransformerEncoder, num_layers=1),
    **{name: pretrained(name) for name in TRANSFORMERS},
}


@pytest.mark.parametrize("devices", some_slow([1, 8], [8]))
@pytest.mark.parametrize("name", some_slow(ENCODERS, ("transformer",)))
def test_several_widths_give_the_loss_and_every_gradient_of_one(name, devices, x64):
    """With dropout and token dropout, in chunks that do not divide the rows."""
    towers = towers_of(name, augment=dict.fromkeys(SIDES, TOKENS))
    found = loss_and_gradients(towers, {"data": devices}, buckets=dict.fromkeys(SIDES, BUCKETS))
    assert worst(found, of_one_width(name, query=TOKENS, key=TOKENS)) < 1e-10


def test_dropout_is_on_in_these_tests(x64):
    without = loss_and_gradients(towers_of(ONE_LAYER), {"data": 1}, key=None)
    assert relative_error(of_one_width(ONE_LAYER)[0], without[0]) > 1e-3


@pytest.mark.parametrize(
    "rows", some_slow([(1, 1, 1), (16, 16, 16), (100, 1, 5), (5, 3, 7)], [(1, 1, 1), (100, 1, 5)])
)
def test_chunks_of_any_size_give_the_same_gradients(rows, x64):
    towers = towers_of(ONE_LAYER, augment={"key": SPANS})
    buckets = {"key": BUCKETS._replace(rows=rows)}  # and queries of one width
    found = loss_and_gradients(towers, {"data": 1}, buckets=buckets)
    assert worst(found, of_one_width(ONE_LAYER, key=SPANS)) < 1e-10


@pytest.mark.parametrize(
    "shape",
    some_slow([{"replica": 2, "data": 4}, {"data": 2, FSDP: 4}], [{"data": 2, FSDP: 4}]),
    ids=str,
)
def test_any_mesh_gives_the_same_gradients(shape, x64):
    buckets = dict.fromkeys(SIDES, BUCKETS)
    found = loss_and_gradients(towers_of(ONE_LAYER), shape, buckets=buckets)
    assert worst(found, of_one_width(ONE_LAYER)) < 1e-10


def test_explicit_negatives_have_the_widths_of_keys(x64):
    towers = towers_of(ONE_LAYER)
    batch = some_batch()
    rng = np.random.default_rng(3)
    batch["negatives"] = {
        "inputs": texts(rng, ROWS * 3, (ROWS, 3)),
        "valid": np.arange(ROWS * 3).reshape(ROWS, 3) % 5 != 0,
        "row": rng.integers(0, 30, (ROWS, 3)).astype(np.int32),
        "group": rng.integers(0, 9, (ROWS, 3)).astype(np.int32),
    }
    wanted = loss_and_gradients(towers, {"data": 1}, batch)
    assert relative_error(wanted[0], of_one_width(ONE_LAYER)[0]) > 0.01
    found = loss_and_gradients(towers, {"data": 8}, batch, buckets={"key": BUCKETS})
    assert worst(found, wanted) < 1e-10


def test_a_width_that_cuts_texts_fails_these_tests(x64):
    """Negative control: 18 tokens hold all but the longest texts."""
    buckets = {"query": BUCKETS._replace(widths=(8, 13, 18))}
    found = loss_and_gradients(towers_of(ONE_LAYER), {"data": 1}, buckets=buckets)
    assert worst(found, of_one_width(ONE_LAYER)) > 1e-3


def test_an_encoder_that_reads_padding_fails_these_tests(x64, monkeypatch):
    """Negative control: attention without its mask."""

    def unmasked(queries, keys, values, bias, seen):
        return attend(queries, keys, values, bias, jnp.ones_like(seen))

    monkeypatch.setattr("jaxcl.models.transformer.attend", unmasked)
    towers = towers_of(ONE_LAYER)
    wanted = loss_and_gradients(towers, {"data": 1})
    buckets = dict.fromkeys(SIDES, BUCKETS)
    assert worst(loss_and_gradients(towers, {"data": 1}, buckets=buckets), wanted) > 1e-3


@pytest.mark.parametrize(
    "shape", [{"data": 1}, pytest.param({"data": 2, FSDP: 4}, marks=pytest.mark.slow)], ids=str
)
def test_frozen_parameters_have_no_gradient_in_the_loop(shape, x64):
    """The gradients of the others do not change."""
    towers, buckets = towers_of(ONE_LAYER), dict.fromkeys(SIDES, BUCKETS)
    mesh = make_mesh(shape, devices=jax.devices()[: int(np.prod(list(shape.values())))])
    of_batch = make_loss(towers, LOSSES["infonce"], mesh, masks=MASKS, buckets=buckets)
    params = double({"towers": towers.init(jax.random.key(0)), "log_temperature": jnp.log(0.05)})
    table = "towers/both/token_table"
    assert table in parameter_paths(params)
    batch = put_batch(some_batch(), mesh)

    def of_trained(frozen):
        trained, held = split(params, frozen)
        return jax.value_and_grad(
            lambda trained: of_batch(merge(trained, held), {}, batch, jax.random.key(1))[0]
        ), trained

    of_table = f"f64[{VOCABULARY},{SIZES['hidden_dim']}]"
    carried, gradients = [], []
    for frozen in ((), (table,)):
        function, trained = of_trained(frozen)
        loops = re.findall(r"((?:\w+:\S+\s+)+)= while\[", str(jax.make_jaxpr(function)(trained)))
        assert loops
        carried.append(sum(loop.count(of_table) for loop in loops))
        gradients.append(jax.jit(function)(trained)[1])
    assert carried[0] > 0
    assert carried[1] == 0
    assert worst(gradients[1], split(gradients[0], (table,))[0]) < 1e-12


@pytest.mark.parametrize("mode", ["mean", "lasttoken"])
@pytest.mark.parametrize(
    "name",
    [
        *("modernbert", "gemma3", "gemma3-bidirectional", "qwen3"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in TRANSFORMERS
            if name not in ("modernbert", "gemma3", "gemma3-bidirectional", "qwen3")
        ),
    ],
)
def test_cut_texts_have_the_embeddings_of_padded_texts(name, mode, x64):
    """For texts longer and shorter than the windows of local attention."""
    model = describe(read_config(name), normalize=True, pooling=Pooling((mode,)))
    encoder = PretrainedEncoder(model, compute_dtype="float64", rngs=nnx.Rngs(0))
    graph, params = nnx.split(encoder)
    encode = jax.jit(nnx.merge(graph, double(params)).__call__)
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, (5, LONGEST)).astype(np.int32)
    length = np.array([1, 2, 7, 12, 13], np.int32)
    padded = encode({"tokens": tokens, "length": length})
    cut = encode(cut_texts({"tokens": tokens, "length": length}, 13))
    assert relative_error(cut, padded) < 1e-12
    too_narrow = encode({"tokens": tokens[:, :12], "length": np.minimum(length, 12)})
    assert relative_error(too_narrow, padded) > 1e-3


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_padding_does_not_change_the_embedding_of_a_text_without_tokens(pooling, x64):
    towers = make_towers(built_in(TransformerEncoder, pooling=pooling))
    params = jax.tree.map(lambda leaf: leaf + 0.1, double(towers.init(jax.random.key(0))))
    narrow, wide = (
        towers.encode(params, "query", {"tokens": jnp.zeros((2, width), jnp.int32)})
        for width in (8, LONGEST)
    )
    assert relative_error(narrow, wide) < 1e-12


def test_the_bits_of_dropout_do_not_depend_on_the_width():
    key = jax.random.key(5)
    wide = jax.random.bernoulli(key, 0.9, (LONGEST, 12))
    assert (jax.random.bernoulli(key, 0.9, (8, 12)) == wide[:8]).all()
    assert not wide.all()
    with jax.threefry_partitionable(False):
        wide = jax.random.bernoulli(key, 0.9, (LONGEST, 12))
        assert (jax.random.bernoulli(key, 0.9, (8, 12)) != wide[:8]).any()


def test_the_train_step_is_compiled_once_for_batches_of_all_lengths():
    mesh, optimizer = make_mesh({"data": 8}), optax.sgd(0.1)
    towers = make_towers(built_in(TransformerEncoder, compute_dtype=None, num_layers=1))
    loss = make_loss(
        towers, LOSSES["infonce"], mesh, masks=MASKS, buckets=dict.fromkeys(SIDES, BUCKETS)
    )
    traced = []

    def traced_loss(*arguments):
        traced.append(arguments)
        return loss(*arguments)

    step = make_train_step(traced_loss, optimizer, mesh, temperature=TEMPERATURE)
    state = init_state(jax.random.key(0), towers.init, optimizer, temperature=TEMPERATURE)
    state = jax.device_put(state, state_sharding(mesh, state))
    for most in (3, 10, LONGEST):
        state, metrics = step(state, put_batch(some_batch(most), mesh))
        assert np.isfinite(float(metrics.loss))
    assert len(traced) == 1


def test_no_set_of_widths_has_less_padding():
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = rng.integers(0, 61, rng.integers(1, 40))
        count = int(rng.integers(1, 5))
        widths = choose_widths(lengths, max_tokens=60, num_widths=count)
        assert len(widths) <= count
        assert widths[-1] == 60
        others = [
            (*some, 60) for k in range(count) for some in itertools.combinations(CANDIDATES, k)
        ]
        least = min(padded_tokens(lengths, one) for one in others)
        assert least <= padded_tokens(lengths, widths) <= 1.005 * least


def test_a_width_that_saves_little_is_left_out():
    assert choose_widths(np.full(99, 30), max_tokens=30, num_widths=8) == (30,)
    assert choose_widths(np.array([30] * 999 + [8]), max_tokens=30, num_widths=8) == (30,)
    assert choose_widths(np.array([30] * 9 + [8]), max_tokens=30, num_widths=8) == (8, 30)


def test_the_computed_tokens_are_those_of_the_chunks():
    """Of rows of 20, 20, 9, 8, 3 and 1 tokens: two of width 20, then two of 13, then two of 8."""
    longest = longest_first(jnp.array([[3, 20, 8], [20, 9, 1]]).reshape(1, -1))
    assert longest.tolist() == [20, 20, 9, 8, 3, 1]
    assert int(computed_tokens(longest, BUCKETS)) == 2 * 20 + 2 * 13 + 3 * 8
    assert int(computed_tokens(longest[:1], BUCKETS)) == 20
    # A device takes the width of the longest row of all devices.
    assert longest_first(jnp.array([[3, 20, 8], [20, 9, 1]])).tolist() == [20, 9, 3]


def test_a_gap_in_a_text_counts_as_a_part_of_it():
    tokens = jnp.array([[5, 0, 7, 0], [0, 0, 0, 0], [1, 2, 3, 4]])
    assert text_lengths({"tokens": tokens}).tolist() == [3, 0, 4]
    assert text_lengths({"tokens": tokens, "length": jnp.array([4, 1, 2])}).tolist() == [4, 1, 2]


def test_only_as_many_tokens_as_a_chunk_needs_are_encoded():
    """Each embedding is the width at which its row was encoded."""

    def encode(params, inputs, rngs):
        rows, width = inputs["tokens"].shape
        return jnp.full((rows, 1), width) * params

    tokens = jnp.where(jnp.arange(LONGEST) < jnp.array([[3], [20], [9], [8], [1], [12]]), 1, 0)
    encode = bucketed(encode, BUCKETS)
    found = encode(jnp.ones(()), {"tokens": tokens}, None)
    assert found[:, 0].tolist() == [8, 20, 13, 13, 8, 20]


def padded_tokens(lengths, widths):
    return np.asarray(widths)[np.searchsorted(widths, lengths)].sum()


def towers_of(name, *, augment=None):
    return make_towers(ENCODERS[name], augment=augment)


@functools.cache
def of_one_width(name, **augment):
    """The loss and the gradients on one device, with all texts padded to one width."""
    return loss_and_gradients(towers_of(name, augment=augment), {"data": 1})


def double(tree):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), tree)


def loss_and_gradients(towers, shape, batch=None, key=1, **options):
    size = int(np.prod(list(shape.values())))
    mesh = make_mesh(shape, devices=jax.devices()[:size])
    params = double({"towers": towers.init(jax.random.key(0)), "log_temperature": jnp.log(0.05)})
    of_batch = make_loss(towers, LOSSES["infonce"], mesh, masks=MASKS, **options)
    key = None if key is None else jax.random.key(key)
    batch = put_batch(some_batch() if batch is None else batch, mesh)
    value_and_gradient = jax.jit(jax.value_and_grad(of_batch, has_aux=True))
    (value, _), gradient = value_and_gradient(params, {}, batch, key)
    return value, gradient


def worst(found, wanted):
    """The largest relative error, without key biases, whose gradient is rounding error."""
    errors = relative_errors(found, wanted)
    return max(error for path, error in errors.items() if "['key']['bias']" not in path)


def some_batch(most=LONGEST):
    rng = np.random.default_rng(0)
    rows = np.arange(ROWS, dtype=np.int32)
    sides = {side: texts(rng, ROWS, (ROWS,), most) for side in SIDES}
    return {**sides, "row": rows, "group": rows // 2}


def texts(rng, count, shape, most=LONGEST):
    lengths = rng.integers(1, most + 1, count).astype(np.int32)
    lengths[:2] = most, 2
    tokens = rng.integers(1, VOCABULARY, (count, LONGEST)).astype(np.int32)
    tokens = np.where(np.arange(LONGEST) < lengths[:, None], tokens, 0)
    return {"tokens": tokens.reshape(*shape, LONGEST), "length": lengths.reshape(shape)}
