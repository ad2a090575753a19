"""Towers of different kinds, and parameters that are loaded instead of initialised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxcl.models import StaticEncoder, TowerSpec, TransformerEncoder, make_towers
from jaxcl.models.towers import Towers
from tests.helpers import bits


class Pixels(nnx.Module):
    """A toy encoder of another modality: a linear map of all pixels."""

    def __init__(self, size, *, dim, rngs):
        self.project = nnx.Linear(size, dim, rngs=rngs)

    def __call__(self, inputs, rngs=None):
        return self.project(inputs["pixels"].reshape(len(inputs["pixels"]), -1))


def read_npz(path, abstract):
    with np.load(path) as file:
        return jax.tree_util.tree_map_with_path(lambda key, _: file[name_of(key)], abstract)


def name_of(path):
    return jax.tree_util.keystr(path, simple=True, separator=".")


def write_npz(path, tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    np.savez(path, **{name_of(key): np.asarray(leaf) for key, leaf in leaves})


def text_tower(load=read_npz):
    return TowerSpec(lambda rngs: StaticEncoder(50, dim=4, max_tokens=6, rngs=rngs), load)


def image_tower():
    return TowerSpec(lambda rngs: Pixels(12, dim=4, rngs=rngs))


def image_and_text() -> Towers:
    return make_towers({"query": image_tower(), "key": text_tower()})


def test_each_side_has_an_encoder_of_its_own_kind():
    towers = image_and_text()
    params = towers.init(jax.random.key(0))
    assert set(params) == {"query", "key"}
    images = {"pixels": jnp.ones((3, 2, 2, 3))}
    assert towers.encode(params, "query", images).shape == (3, 4)
    assert towers.encode(params, "key", {"tokens": jnp.ones((5, 6), int)}).shape == (5, 4)


def in_one_loop(rngs):
    return TransformerEncoder(
        50, dim=4, hidden_dim=8, num_layers=2, num_heads=2, mlp_dim=8, scan_layers=True, rngs=rngs
    )


@pytest.mark.parametrize("make", [text_tower().make, in_one_loop])
def test_initial_parameters_have_the_bits_of_flax_s_streams(make):
    key = jax.random.key(3)
    _, wanted = nnx.split(make(nnx.Rngs(params=key)), nnx.Param)
    found = make_towers(make).init(key)["both"]
    assert jax.tree.map(bits, found) == jax.tree.map(bits, nnx.to_pure_dict(wanted))


def test_tracing_an_initialisation_searches_no_equations(monkeypatch):
    """JAX does so, at great length, to explain an error that flax would ignore."""
    towers, searched, kinds = make_towers(in_one_loop), [], []
    jax.eval_shape(lambda number: kinds.append(type(number)), 1.0)
    monkeypatch.setattr(kinds[0], "_origin_msg", lambda self: searched.append(self) or "")
    jax.eval_shape(towers.init, jax.random.key(0))
    drawn = len(searched)
    jax.eval_shape(
        lambda key: nnx.to_pure_dict(nnx.state(in_one_loop(nnx.Rngs(params=key)), nnx.Param)),
        jax.random.key(0),
    )
    assert drawn == 0 < len(searched)


def test_other_names_of_towers_are_an_error():
    with pytest.raises(ValueError, match="give 'both', or query and key"):
        make_towers({"image": image_tower(), "text": text_tower()})


def test_loaded_parameters_are_the_tree_of_init(tmp_path):
    towers = make_towers({"both": text_tower()})
    wanted = towers.init(jax.random.key(3))
    write_npz(tmp_path / "weights.npz", wanted["both"])
    loaded = towers.load(tmp_path / "weights.npz")
    assert jax.tree.map(bits, loaded) == jax.tree.map(bits, wanted)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(loaded))


def test_one_of_two_towers_may_be_loaded(tmp_path):
    towers = image_and_text()
    params = towers.init(jax.random.key(3))
    write_npz(tmp_path / "weights.npz", params["key"])
    loaded = towers.load({"key": tmp_path / "weights.npz"})
    assert jax.tree.map(bits, loaded) == jax.tree.map(bits, {"key": params["key"]})
    with pytest.raises(ValueError, match="the encoder 'query' cannot be loaded"):
        towers.load({"query": tmp_path / "weights.npz"})
    with pytest.raises(ValueError, match="no encoder is called 'both'; there are query, key"):
        towers.load({"both": tmp_path / "weights.npz"})


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (lambda path, abstract: {}, "other parameters than the encoder: .*table"),
        (
            lambda path, abstract: jax.tree.map(lambda leaf: np.zeros((1, *leaf.shape)), abstract),
            r"has the shape \(1, .*, and the encoder's",
        ),
    ],
)
def test_a_file_of_another_model_is_an_error(load, message, tmp_path):
    towers = make_towers({"both": text_tower(load)})
    with pytest.raises(ValueError, match=message):
        towers.load(tmp_path)
