"""Runs that start from loaded weights: an encoder's own files, or a pretrained folder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxcl.data.modalities import modality_of
from jaxcl.models.pretrained.families import FAMILIES
from jaxcl.ops.mesh import put_batch
from jaxcl.run.optimizer import build_optimizer
from jaxcl.run.training import build_towers, build_training
from jaxcl.settings.read import read_settings
from jaxcl.typing import SIDES
from tests.helpers import bits, relative_errors
from tests.models.pretrained.tiny import (
    EMBEDDING_GEMMA,
    QWEN3,
    write_tiny_bert,
    write_tiny_decoder,
)

OWN_ENCODER = """
import jax, numpy as np
from flax import nnx
from jaxcl.models import EncoderPart
from jaxcl.models.options import options_of
from jaxcl.models.static import StaticEncoder

def load(path, abstract):
    with np.load(path) as file:
        return jax.tree_util.tree_map_with_path(
            lambda key, _: file[jax.tree_util.keystr(key, simple=True)], abstract
        )

LOADED = EncoderPart(StaticEncoder, options_of(StaticEncoder), load)

class Half(StaticEncoder):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.table = nnx.Param(self.table[...].astype("bfloat16"))
"""


@pytest.fixture
def own_encoder(tmp_path, monkeypatch):
    """The name of an encoder that reads `.npz` files."""
    (tmp_path / "own_encoder.py").write_text(OWN_ENCODER)
    monkeypatch.syspath_prepend(tmp_path)
    return "own_encoder:LOADED"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny BERT."""
    return write_tiny_bert(tmp_path_factory.mktemp("tiny"))


def settings_with(**model):
    mesh = model.pop("mesh", {"data": -1})
    return read_settings(
        {
            "global_batch_size": 16,
            "data": {"vocabulary_size": 304},
            "model": {"dim": 16, "options": {"max_tokens": 128}, **model},
            "run": {"mesh": mesh},
        }
    )


def fine_tuning(folder, *, mesh=None, rules=(), **sections):
    """The settings of a run that starts from the weights of a folder."""
    model = {"pretrained": str(folder)} | sections.pop("model", {})
    data = {"max_tokens": {"query": 8, "key": 12}}
    run = {"mesh": mesh or {"data": -1}, "parameter_rules": rules}
    return read_settings(
        {"global_batch_size": 16, "model": model, "data": data, "run": run, **sections}
    )


def weights(settings, seed=5):
    return jax.device_get(build_towers(settings).init(jax.random.key(seed)))


def write(path, tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    np.savez(path, **{jax.tree_util.keystr(key, simple=True): leaf for key, leaf in leaves})
    return str(path)


@pytest.mark.parametrize("mesh", [{"data": -1}, {"data": 2, "fsdp": 4}], ids=str)
def test_a_run_starts_with_the_loaded_weights_on_any_mesh(own_encoder, tmp_path, mesh):
    wanted = weights(settings_with(name=own_encoder))
    path = write(tmp_path / "weights.npz", wanted["both"])
    training = build_training(settings_with(name=own_encoder, pretrained=path, mesh=mesh))
    state = training.init()
    towers = state.params["towers"]
    assert jax.tree.map(bits, jax.device_get(towers)) == jax.tree.map(bits, wanted)
    abstract = training.abstract_state().params["towers"]
    assert jax.tree.map(lambda leaf: leaf.sharding, towers) == jax.tree.map(
        lambda leaf: leaf.sharding, abstract
    )
    drawn = build_training(settings_with(name=own_encoder, mesh=mesh)).init()
    assert not np.array_equal(drawn.params["towers"]["both"]["table"], wanted["both"]["table"])


def test_parameters_have_the_type_that_an_encoder_names_and_float32_otherwise(own_encoder):
    name = own_encoder.replace("LOADED", "Half")
    with jax.enable_x64(True):
        params = weights(settings_with(name=name))["both"]
    types = {parameter: str(leaf.dtype) for parameter, leaf in params.items()}
    assert types.pop("table") == "bfloat16"
    assert set(types.values()) == {"float32"}


def programs_of(function, monkeypatch):
    """The texts of the programs that a call compiles."""
    texts, jit = [], jax.jit

    def recording(function, **options):
        jitted = jit(function, **options)

        def call(*arguments):
            texts.append(jitted.lower(*arguments).as_text())
            return jitted(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(jax, "jit", recording)
        function()
    return texts


def test_loaded_weights_are_not_constants_of_a_program(own_encoder, tmp_path, monkeypatch):
    wanted = weights(settings_with(name=own_encoder))["both"]
    path = write(tmp_path / "weights.npz", wanted)
    training = build_training(settings_with(name=own_encoder, pretrained=path))
    table = wanted["table"]
    hexadecimal = table[0, :4].tobytes().hex().upper()
    (program,) = programs_of(training.init, monkeypatch)
    assert hexadecimal not in program
    constant = jax.jit(lambda: jnp.asarray(table) + 1).lower().as_text()
    assert hexadecimal in constant


def test_pretrained_weights_are_neither_constants_nor_random(folder, monkeypatch):
    table = load_file(folder / "model.safetensors")["embeddings.word_embeddings.weight"]
    (program,) = programs_of(build_training(fine_tuning(folder)).init, monkeypatch)
    assert table[0, :4].tobytes().hex().upper() not in program
    assert "erf_inv" not in program  # the primitive of random normal numbers
    (program,) = programs_of(build_training(settings_with(name="static")).init, monkeypatch)
    assert "erf_inv" in program


def as_stored(model, params):
    """The parameters of an encoder by tensor name, in their stored layout."""
    tensors = FAMILIES[model.family].tensors(model.config)
    leaves = jax.tree_util.tree_leaves_with_path(params["encoder"])
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    assert named.keys() == tensors.keys()
    return {
        tensor.name: named[path].T if tensor.transposed else named[path]
        for path, tensor in tensors.items()
    }


@pytest.mark.parametrize("mesh", [{"data": -1}, {"data": 2, "fsdp": 4}], ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "one each"])
def test_a_fresh_state_has_the_tensors_of_the_folder(folder, mesh, shared):
    rules = (("kernel", 0),) if "fsdp" in mesh else ()
    settings = fine_tuning(folder, mesh=mesh, rules=rules, model={"shared": shared})
    training = build_training(settings)
    state = training.init()
    stored = load_file(folder / "model.safetensors")
    wanted = {name: bits(one) for name, one in stored.items() if not name.startswith("pooler")}
    towers = state.params["towers"]
    assert set(towers) == ({"both"} if shared else {"query", "key"})
    for params in jax.device_get(towers).values():
        found = as_stored(settings.parts.pretrained["model"], params)
        assert {name: bits(leaf) for name, leaf in found.items()} == wanted
    abstract = training.abstract_state()
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == jax.tree.map(
        lambda leaf: leaf.sharding, abstract
    )
    spread = [not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(towers)]
    assert any(spread) == ("fsdp" in mesh)


def test_two_folders_fill_the_towers_of_their_sides(folder, tmp_path):
    other = write_tiny_bert(tmp_path, seed=1)
    settings = fine_tuning(folder, model={"shared": False, "key": {"pretrained": str(other)}})
    towers = jax.device_get(build_training(settings).init().params["towers"])
    for side, path in {"query": folder, "key": other}.items():
        stored = load_file(path / "model.safetensors")["embeddings.word_embeddings.weight"]
        np.testing.assert_array_equal(towers[side]["encoder"]["token_table"], stored)


def test_a_momentum_encoder_starts_as_a_copy_of_the_loaded_weights(folder):
    negatives = {
        "bank": {"kind": "queue", "slots": 32},
        "tiers": {"full_bank": True},
        "momentum_encoder": {"initial": 0.9},
    }
    state = build_training(fine_tuning(folder, negatives=negatives)).init()
    towers = state.params["towers"]
    assert jax.tree.map(bits, state.memory["momentum"]) == jax.tree.map(bits, towers)


def test_weights_decay_in_matrices_and_not_in_norms_and_biases(folder):
    decay = {"name": "sgd", "learning_rate": 0.1, "warmup_steps": 0, "weight_decay": 0.5}
    settings = fine_tuning(folder, optimizer=decay)
    params = jax.tree.map(
        lambda leaf: jnp.ones(leaf.shape), build_training(settings).abstract_state().params
    )
    optimizer, _ = build_optimizer(settings, params)
    gradients = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates["towers"]):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert bool(jnp.all(update != 0)) == name.endswith(("kernel", "_table")), name


def after_two_updates(folder, *, devices, chunk_size, options=None, **run):
    """The parameters after two updates on random texts, and the last loss."""
    settings = fine_tuning(
        folder,
        model={"options": {"dropout": 0.0} | (options or {})},  # dropout takes long to compile
        **run,
        grad_cache={"chunk_size": chunk_size},
        optimizer={"name": "sgd", "learning_rate": 0.1, "warmup_steps": 0},
    )
    training = build_training(settings, devices=jax.devices()[:devices])
    state, rng = training.init(), np.random.default_rng(0)
    for step in range(2):
        batch = {
            side: modality_of(settings.data, side).random_inputs(settings.data, side, rng, 16)
            for side in SIDES
        }
        rows = np.arange(16, dtype=np.int32) + 16 * step
        batch |= {"row": rows, "text": rows, "group": rows}
        state, metrics = training.train_step(state, put_batch(batch, training.mesh))
    return jax.device_get(state.params["towers"]), float(metrics.loss)


def test_eight_devices_and_chunks_train_as_one_device(folder):
    wanted, loss = after_two_updates(folder, devices=1, chunk_size=None)
    towers, ours = after_two_updates(folder, devices=8, chunk_size=1)
    errors = relative_errors(towers, wanted)
    assert max(errors.values()) < 2e-5, errors
    assert ours == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [QWEN3, EMBEDDING_GEMMA], ids=lambda config: config["model_type"]
)
def test_sharded_decoders_train_as_on_one_device(config, tmp_path):
    folder = write_tiny_decoder(tmp_path, config)
    wanted, loss = after_two_updates(folder, devices=1, chunk_size=None)
    towers, ours = after_two_updates(
        folder,
        devices=8,
        chunk_size=1,
        options={"remat": True},
        mesh={"data": 2, "fsdp": 4},
        rules=(("kernel", 0), ("table", 1)),
    )
    errors = relative_errors(towers, wanted)
    assert max(errors.values()) < 2e-5, errors
    assert ours == pytest.approx(loss, rel=1e-5)


def test_the_keys_may_have_an_encoder_of_another_kind(own_encoder, tmp_path):
    sizes = {"hidden_dim": 8, "num_layers": 1, "num_heads": 2, "mlp_dim": 8, "max_tokens": 128}
    key = {"name": "transformer", "options": sizes}
    mixed = settings_with(name=own_encoder, shared=False, key=key)
    params = weights(mixed)
    assert "position_weight" in params["query"]
    assert "position_table" in params["key"]
    path = write(tmp_path / "weights.npz", params["query"])
    state = build_training(
        settings_with(name=own_encoder, shared=False, key=key, pretrained=path)
    ).init()
    query = jax.device_get(state.params["towers"]["query"])
    assert jax.tree.map(bits, query) == jax.tree.map(bits, params["query"])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"name": "static", "pretrained": "weights.npz"},
            r"the encoder 'static' cannot be loaded from a file",
        ),
        ({"key": {"name": "decoder"}}, r"set model\.shared to False"),
        ({"key": {"pretrained": "weights"}}, r"set model\.shared=False"),
        (
            {"shared": False, "key": {"name": "static", "options": {"max_tokens": 32}}},
            r"data\.max_tokens\.key=128, but model\.key\.options\.max_tokens=32 is the longest",
        ),
        (
            {"shared": False, "key": {"name": "decoder", "options": {"dropuot": 0.1}}},
            r"model\.key\.options\.dropuot is unknown to 'decoder' \(did you mean 'dropout'\?\)",
        ),
    ],
)
def test_invalid_models_are_errors(model, message):
    with pytest.raises(ValueError, match=message):
        settings_with(**model)
