"""Weights of pretrained encoders: all parameters are loaded, all tensors used, and exported."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxcl.host.paths import as_path
from jaxcl.models.pretrained.description import Pooling, PretrainedModel
from jaxcl.models.pretrained.encoder import PretrainedEncoder
from jaxcl.models.pretrained.families import FAMILIES
from jaxcl.models.pretrained.folder import read_pretrained
from jaxcl.models.pretrained.tensor_files import map_tensors, write_tensors
from jaxcl.models.pretrained.weights import (
    export_tensors,
    keep_copy,
    load_parameters,
    place,
    unused_tensors,
)
from tests import buckets

SIZES = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 20,
    # Decoders' keys.
    **{"num_key_value_heads": 1, "head_dim": 4},
    # DistilBERT's keys.
    **{"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 16},
}
MODEL_TYPES = sorted(set(FAMILIES) - {"static_embedding", "model2vec"})
POOLER = {
    "pooler.dense.weight": np.ones((8, 8), np.float32),
    "embeddings.position_ids": np.arange(20)[None],
}


def encoder_tensors(model_type="bert"):
    """Random tensors of a tiny encoder, with the names of its family."""
    family, config = FAMILIES[model_type], SIZES | {"model_type": model_type}
    shapes = {
        path.removeprefix("encoder/"): leaf.shape
        for path, leaf in flat(abstract_of(model_type, dense=()))
    }
    rng = np.random.default_rng(0)
    return {
        tensor.name: rng.normal(
            size=shapes[path][::-1] if tensor.transposed else shapes[path]
        ).astype(np.float32)
        for path, tensor in family.tensors(config).items()
    }


def flat(tree):
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def write(folder, tensors, *, model_type="bert", dense=None):
    """Write the folder of an encoder, with a dense layer if its tensors are given."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SIZES | {"model_type": model_type}))
    (folder / "tokenizer.json").write_text("{}")
    write_tensors(folder / "model.safetensors", tensors)
    if dense is not None:
        names = ["Transformer", "Pooling", "Dense"]
        paths = ["", "1_Pooling", "2_Dense"]
        modules = [
            {"type": f"sentence_transformers.models.{name}", "path": path}
            for name, path in zip(names, paths, strict=True)
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        options = {"in_features": 8, "out_features": 4, "bias": "linear.bias" in dense}
        for path, config in (("1_Pooling", {}), ("2_Dense", options)):
            (folder / path).mkdir(exist_ok=True)
            (folder / path / "config.json").write_text(json.dumps(config))
        write_tensors(folder / "2_Dense" / "model.safetensors", dense)
    return read_pretrained(folder, modality=FAMILIES[model_type].modality)


def load(model):
    return load_parameters(model, abstract_of(model.family, model.dense))


@functools.cache
def abstract_of(model_type, dense):
    """The parameters of a tiny encoder, without values."""
    model = PretrainedModel(*[None] * len(PretrainedModel._fields))._replace(
        family=model_type,
        config=SIZES | {"model_type": model_type},
        pooling=Pooling(),
        dense=dense,
    )
    encoder = nnx.eval_shape(lambda: PretrainedEncoder(model, rngs=nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(encoder, nnx.Param))


def assert_same_bytes(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert actual[name].shape == tensor.shape
        assert actual[name].tobytes() == tensor.tobytes()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_parameter_of_every_family_is_filled_from_its_tensor(tmp_path, model_type):
    tensors = encoder_tensors(model_type)
    model = write(tmp_path, tensors, model_type=model_type)
    parameters = dict(flat(load(model)))
    expected = FAMILIES[model_type].tensors(model.config)
    assert parameters.keys() == {f"encoder/{path}" for path in expected}
    for path, tensor in expected.items():
        stored = tensors[tensor.name]
        np.testing.assert_array_equal(
            parameters[f"encoder/{path}"], stored.T if tensor.transposed else stored
        )


DENSE = {"linear.weight": np.arange(32, dtype=np.float32).reshape(4, 8), "linear.bias": np.ones(4)}


def test_dense_layers_are_loaded(tmp_path):
    parameters = load(write(tmp_path, encoder_tensors(), dense=DENSE))["dense"][0]
    np.testing.assert_array_equal(parameters["kernel"], DENSE["linear.weight"].T)
    np.testing.assert_array_equal(parameters["bias"], DENSE["linear.bias"])
    without_bias = {"linear.weight": DENSE["linear.weight"]}
    model = write(tmp_path, encoder_tensors(), dense=without_bias)
    assert load(model)["dense"][0].keys() == {"kernel"}


STATIC = {
    "static_embedding": {"embedding.weight": np.arange(12, dtype=np.float32).reshape(4, 3)},
    "model2vec": {
        "embeddings": np.arange(12, dtype=np.float16).reshape(4, 3),
        "weights": np.ones(4, np.float64),
    },
}


@pytest.mark.parametrize("family", STATIC)
def test_static_embeddings_are_loaded_and_exported(tmp_path, family):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    write_tensors(tmp_path / "model.safetensors", STATIC[family])
    model = read_pretrained(tmp_path)
    encoder = nnx.eval_shape(lambda: PretrainedEncoder(model, rngs=nnx.Rngs(0)))
    parameters = load_parameters(model, nnx.to_pure_dict(nnx.state(encoder, nnx.Param)))
    assert model.family == family
    np.testing.assert_array_equal(
        parameters["encoder"]["token_table"], next(iter(STATIC[family].values()))
    )
    assert_same_bytes(export_tensors(model, parameters)["model.safetensors"], STATIC[family])


def test_parameters_are_views_of_the_file(tmp_path):
    for leaf in jax.tree.leaves(load(write(tmp_path, encoder_tensors()))):
        while isinstance(leaf.base, np.ndarray):
            leaf = leaf.base
        assert isinstance(leaf, np.memmap)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_tensor_names_with_the_prefix_of_a_model_with_a_head_are_read(tmp_path, model_type):
    tensors = encoder_tensors(model_type)
    expected = load(write(tmp_path / "bare", tensors, model_type=model_type))
    for prefix in FAMILIES[model_type].prefixes:
        named = {prefix + name: tensor for name, tensor in tensors.items()}
        model = write(tmp_path / prefix, named | {"cls.bias": np.zeros(3)}, model_type=model_type)
        jax.tree.map(np.testing.assert_array_equal, load(model), expected)
        assert unused_tensors(model)["model.safetensors"].keys() == {"cls.bias"}


def test_older_names_of_norms_are_read(tmp_path):
    tensors = encoder_tensors()
    expected = load(write(tmp_path / "new", tensors))
    older = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in tensors.items()
    }
    assert older.keys() != tensors.keys()
    model = write(tmp_path / "old", older)
    jax.tree.map(np.testing.assert_array_equal, load(model), expected)
    assert_same_bytes(export_tensors(model, load(model))["model.safetensors"], older)


def test_shards_are_loaded_and_exported(tmp_path):
    tensors = encoder_tensors() | POOLER
    expected = load(write(tmp_path, tensors))
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, part in shards.items():
        write_tensors(tmp_path / file, {name: tensors[name] for name in part})
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    model = read_pretrained(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, load(model), expected)
    exported = export_tensors(model, load(model))
    for file, part in shards.items():
        assert_same_bytes(exported[file], {name: tensors[name] for name in part})


def without(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if key != name}


LAYER = "encoder.layer.0.attention.self.query"
UNFIT = {
    "a missing tensor": (
        lambda t: without(t, f"{LAYER}.bias"),
        rf"without a tensor: encoder/blocks/0/attention/query/bias \({LAYER}.bias\)$",
    ),
    "another shape": (
        lambda t: t | {f"{LAYER}.weight": np.zeros((8, 9), np.float32)},
        rf"query/kernel \[8, 8\] \({LAYER}.weight: float32\[9, 8\]\)$",
    ),
    "whole numbers": (
        lambda t: t | {f"{LAYER}.bias": np.zeros(8, np.int32)},
        rf"query/bias \[8\] \({LAYER}.bias: int32\[8\]\)$",
    ),
    "an unknown tensor": (
        lambda t: t | {"encoder.layer.2.more": np.zeros(2)},
        r"tensors without a parameter: encoder.layer.2.more$",
    ),
    "a tensor under two names": (
        lambda t: t | {"embeddings.LayerNorm.gamma": np.zeros(8)},
        r"tensors without a parameter: embeddings.LayerNorm.(gamma|weight)$",
    ),
    "all names changed": (
        lambda t: {f"x.{name}": tensor for name, tensor in t.items()},
        r"without a tensor: .* and \d+ more; tensors without a parameter: x\..* and \d+ more$",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_tensors_that_do_not_fit_are_listed(tmp_path, case):
    change, message = UNFIT[case]
    model = write(tmp_path, change(encoder_tensors()))
    wrong = f"^{tmp_path}: its weights do not fit its bert config.*{message}"
    with pytest.raises(ValueError, match=wrong):
        load(model)


def test_an_unknown_tensor_of_a_dense_layer_is_listed(tmp_path):
    model = write(tmp_path, encoder_tensors(), dense=DENSE | {"residual.weight": np.zeros(1)})
    with pytest.raises(ValueError, match=r"without a parameter: residual\.weight$"):
        load(model)


def test_a_file_changed_after_its_folder_was_read_is_refused(tmp_path):
    model = write(tmp_path, encoder_tensors())
    write_tensors(tmp_path / "model.safetensors", encoder_tensors() | {f"{LAYER}.bias": np.ones(1)})
    with pytest.raises(ValueError, match=rf"has changed since .*: the tensor {LAYER}\.bias"):
        load(model)


STORED = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]


@pytest.mark.parametrize("stored", STORED, ids=lambda dtype: np.dtype(dtype).name)
def test_untrained_weights_are_exported_with_the_same_bytes(tmp_path, stored):
    # Random float32, so that no type loses bits on the way through float32.
    tensors = {name: tensor.astype(stored) for name, tensor in encoder_tensors().items()}
    dense = {name: tensor.astype(stored) for name, tensor in DENSE.items()}
    model = write(tmp_path, tensors | POOLER, dense=dense)
    parameters = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), load(model))
    exported = export_tensors(model, parameters)
    assert exported.keys() == {"model.safetensors", "2_Dense/model.safetensors"}
    assert_same_bytes(exported["model.safetensors"], tensors | POOLER)
    assert_same_bytes(exported["2_Dense/model.safetensors"], dense)
    write_tensors(tmp_path / "again", exported["model.safetensors"])
    assert (tmp_path / "again").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_family_is_exported_with_the_same_bytes(tmp_path, model_type):
    tensors = {
        f"{prefix}{name}": tensor.astype(ml_dtypes.bfloat16)
        for prefix in FAMILIES[model_type].prefixes[:1]
        for name, tensor in encoder_tensors(model_type).items()
    }
    model = write(tmp_path, tensors, model_type=model_type)
    parameters = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), load(model))
    assert_same_bytes(export_tensors(model, parameters)["model.safetensors"], tensors)


def test_trained_weights_are_exported_in_float32_if_their_type_is_too_narrow(tmp_path):
    tensors = {name: tensor.astype(np.float16) for name, tensor in encoder_tensors().items()}
    model = write(tmp_path, tensors)
    parameters = jax.tree.map(lambda leaf: np.array(leaf, np.float32), load(model))
    query = parameters["encoder"]["blocks"][0]["attention"]["query"]
    query["bias"] += np.float32(1e-6)
    query["kernel"][0, 1] = 1e6
    exported = export_tensors(model, parameters)["model.safetensors"]
    changed = {f"{LAYER}.bias", f"{LAYER}.weight"}
    assert {name for name, t in exported.items() if t.dtype == np.float32} == changed
    np.testing.assert_array_equal(exported[f"{LAYER}.bias"], query["bias"])
    assert exported[f"{LAYER}.weight"][1, 0] == 1e6
    assert_same_bytes(
        {name: t for name, t in exported.items() if name not in changed},
        {name: t for name, t in tensors.items() if name not in changed},
    )


def test_parameters_of_another_model_are_not_exported(tmp_path):
    model = write(tmp_path, encoder_tensors())
    parameters = load(model)
    del parameters["encoder"]["blocks"][1]
    with pytest.raises(ValueError, match=r"tensors without a parameter: encoder\.layer\.1"):
        export_tensors(model, parameters)


def test_unused_tensors_are_views_by_name(tmp_path):
    unused = unused_tensors(write(tmp_path, encoder_tensors() | POOLER))
    assert unused.keys() == {"model.safetensors"}
    assert_same_bytes(unused["model.safetensors"], POOLER)
    assert unused_tensors(write(tmp_path, encoder_tensors())) == {}


HEADS = (
    *("cls.predictions.bias", "lm_head.dense.weight", "qa_outputs.bias", "vocab_transform.bias"),
    *("classifier.out_proj.weight", "pre_classifier.bias", "head.norm.weight", "decoder.bias"),
    *("vocab_layer_norm.bias", "vocab_projector.bias", "embeddings.position_ids"),
    *("bert.pooler.dense.bias", "rotary_emb.inv_freq"),
)


def test_heads_and_computed_constants_count_as_unused(tmp_path):
    heads = {name: np.zeros(1, np.float32) for name in HEADS}
    model = write(tmp_path, encoder_tensors() | heads)
    assert unused_tensors(model)["model.safetensors"].keys() == set(HEADS)
    assert load(model)


@pytest.mark.parametrize("spec", [(), ("data",), (None, "data"), ("data", "model")], ids=str)
def test_each_device_receives_its_shard_in_float32(spec):
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    stored = np.arange(64, dtype=ml_dtypes.bfloat16).reshape(8, 8).T
    like = {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)}
    placed = place({"kernel": stored}, like)["kernel"]
    assert (placed.dtype, placed.sharding) == (jnp.float32, sharding)
    np.testing.assert_array_equal(placed, stored.astype(np.float32))


def test_placed_parameters_do_not_share_memory_with_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    entry = {"dtype": "F32", "shape": [2**16], "data_offsets": [0, 2**18]}
    header = json.dumps({"a": entry}).ljust(120).encode()  # so that the tensor begins at byte 128
    ones = np.ones(2**16, np.float32)
    path.write_bytes((120).to_bytes(8, "little") + header + ones.tobytes())
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {"a": jax.ShapeDtypeStruct((2**16,), jnp.float32, sharding=sharding)}
    placed = place(map_tensors(path), like)["a"]
    with open(path, "r+b") as file:
        file.seek(-4, 2)
        file.write(bytes(4))
    assert map_tensors(path)["a"][-1] == 0
    assert placed[-1] == 1


def test_a_copy_describes_the_same_model_without_its_weights(tmp_path):
    model = write(tmp_path / "original", encoder_tensors() | POOLER, dense=DENSE)
    parameters, exported = jax.tree.map(np.array, load(model)), export_tensors(model, load(model))
    keep_copy(model, tmp_path / "run" / "pretrained")
    shutil.copytree(tmp_path / "run", tmp_path / "moved")
    exported = {file: {k: np.array(v) for k, v in t.items()} for file, t in exported.items()}
    shutil.rmtree(tmp_path / "original")
    copy = read_pretrained(tmp_path / "moved" / "pretrained")
    assert copy._replace(path=model.path) == model
    assert_same_bytes(unused_tensors(copy)["model.safetensors"], POOLER)
    for file, tensors in export_tensors(copy, parameters).items():
        assert_same_bytes(tensors, exported[file])
    with pytest.raises(ValueError, match="is a run's copy without the weights; load them from"):
        load(copy)
    size = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert size < 8_000  # the parameters alone have more than twice that


def test_a_copy_may_lie_on_an_object_store(tmp_path, monkeypatch):
    buckets.install(monkeypatch, tmp_path / "store")
    model = write(tmp_path / "original", encoder_tensors() | POOLER)
    directory = as_path("gs://bucket/run/pretrained")
    keep_copy(model, directory)
    copy = read_pretrained(directory)
    assert copy == model._replace(path=directory)
    assert_same_bytes(unused_tensors(copy)["model.safetensors"], POOLER)


def test_a_copy_can_be_copied_and_replaced(tmp_path):
    model = write(tmp_path / "original", encoder_tensors() | POOLER)
    for place_of_copy in ("first", "second", "second"):
        keep_copy(model, tmp_path / place_of_copy)
        model = read_pretrained(tmp_path / place_of_copy)
    assert_same_bytes(unused_tensors(model)["model.safetensors"], POOLER)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "original", "second"]


def test_an_interrupted_copy_leaves_nothing(tmp_path, monkeypatch):
    model = write(tmp_path / "original", encoder_tensors() | POOLER)

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr("jaxcl.models.pretrained.weights.write_sealed_json", fail)
    with pytest.raises(OSError, match="no space"):
        keep_copy(model, tmp_path / "run" / "pretrained")
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("file", ["../model.safetensors", "/tmp/x", "..\\model.safetensors"])
def test_a_copy_that_names_files_outside_it_is_refused(tmp_path, file):
    model = write(tmp_path / "original", encoder_tensors())
    keep_copy(model._replace(tensors={file: {}}), tmp_path / "copy")
    with pytest.raises(ValueError, match="which may lie outside of it"):
        read_pretrained(tmp_path / "copy")


@pytest.mark.parametrize("damage", ["tensors.json", "unused/model.safetensors", "config.json"])
def test_a_damaged_copy_is_refused(tmp_path, damage):
    model = write(tmp_path / "original", encoder_tensors() | POOLER)
    keep_copy(model, tmp_path / "copy")
    path = tmp_path / "copy" / damage
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=str(path.name).replace(".", r"\.")):
        unused_tensors(read_pretrained(tmp_path / "copy"))
