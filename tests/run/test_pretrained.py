"""A run that begins with loaded weights, and one with an encoder per side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.run.training import build_towers, build_training
from jaxcl.settings.read import read_settings
from tests.helpers import bits

OWN_ENCODER = """
import jax, numpy as np
from flax import nnx
from jaxcl.models import EncoderPart
from jaxcl.models.static import StaticEncoder, StaticOptions

def load(path, abstract):
    with np.load(path) as file:
        return jax.tree_util.tree_map_with_path(
            lambda key, _: file[jax.tree_util.keystr(key, simple=True)], abstract
        )

LOADED = EncoderPart(StaticEncoder, StaticOptions, load)

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


def weights(settings, seed=5):
    return jax.device_get(build_towers(settings).init(jax.random.key(seed)))


def write(path, tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    np.savez(path, **{jax.tree_util.keystr(key, simple=True): leaf for key, leaf in leaves})
    return str(path)


@pytest.mark.parametrize("mesh", [{"data": -1}, {"data": 2, "fsdp": 4}], ids=str)
def test_a_run_begins_with_the_loaded_weights_on_any_mesh(own_encoder, tmp_path, mesh):
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


def test_loaded_weights_are_no_constants_of_a_program(own_encoder, tmp_path, monkeypatch):
    wanted = weights(settings_with(name=own_encoder))["both"]
    path = write(tmp_path / "weights.npz", wanted)
    training = build_training(settings_with(name=own_encoder, pretrained=path))
    texts, jit = [], jax.jit

    def recording(function, **options):
        jitted = jit(function, **options)

        def call(*arguments):
            texts.append(jitted.lower(*arguments).as_text())
            return jitted(*arguments)

        return call

    monkeypatch.setattr(jax, "jit", recording)
    training.init()
    monkeypatch.undo()
    table = wanted["table"]
    hexadecimal = table[0, :4].tobytes().hex().upper()
    (program,) = texts
    assert hexadecimal not in program
    assert hexadecimal in jit(lambda: jnp.asarray(table) + 1).lower().as_text()  # as a constant is


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
        ({"pretrained": "weights.npz"}, r"the encoder 'static' cannot be loaded from a file"),
        ({"key": {"name": "decoder"}}, r"set model\.shared to False"),
        ({"key": {"pretrained": "weights"}}, r"set model\.key\.name"),
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
def test_models_that_cannot_be_are_errors(model, message):
    with pytest.raises(ValueError, match=message):
        settings_with(**model)
