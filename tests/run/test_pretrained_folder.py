"""Export writes the original folder with new weights and widely known module names."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxcl.models.pretrained.encoder import PretrainedEncoder
from jaxcl.models.pretrained.folder import read_pretrained
from jaxcl.models.pretrained.weights import load_parameters
from jaxcl.run.model_files import write_folder
from jaxcl.run.pretrained_folder import pretrained_files
from jaxcl.settings.data_sections import DataSettings, MaxTokens, SidePrompts
from tests.models.pretrained.tiny import (
    DIM,
    write_tiny_bert,
    write_tiny_decoder,
    write_tiny_static,
)

DATA = DataSettings(
    max_tokens=MaxTokens(query=7, key=20), prompts=SidePrompts("query: ", ""), exclude_prompt=False
)
WEIGHTS = "model.safetensors"


def abstract_parameters(model):
    module = nnx.eval_shape(lambda: PretrainedEncoder(model, rngs=nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def exported(original, folder, *, data=DATA, change=lambda leaf: leaf, dtype=None):
    """Export the model of a folder with changed parameters."""
    model = read_pretrained(original)
    params = jax.tree.map(change, load_parameters(model, abstract_parameters(model)))
    write_folder(folder, pretrained_files(model, data, params, dtype=dtype))
    return folder


def rewritten(folder, name, **changes):
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in (content | changes).items() if v is not None}))


def tensor_bytes(folder):
    tensors = load_file(folder / WEIGHTS)
    return {name: (tensor.dtype, tensor.tobytes()) for name, tensor in tensors.items()}


@pytest.fixture
def original(tmp_path):
    return write_tiny_bert(tmp_path / "original")


def test_unchanged_weights_have_the_same_bytes_and_changed_ones_do_not(original, tmp_path):
    unchanged = exported(original, tmp_path / "unchanged")
    assert tensor_bytes(unchanged) == tensor_bytes(original)
    doubled = tensor_bytes(exported(original, tmp_path / "doubled", change=lambda leaf: 2 * leaf))
    before = tensor_bytes(original)
    same = {name for name in before if before[name] == doubled[name]}
    assert same == {"pooler.dense.weight", "pooler.dense.bias"}


def test_the_folder_describes_the_trained_model(tmp_path):
    original = write_tiny_bert(
        tmp_path / "original",
        normalize=False,
        library={
            "prompts": {"query": "old", "clustering": "group: "},
            "similarity_fn_name": "dot",
            "__version__": {"sentence_transformers": "6.2.0"},
        },
    )
    (original / "README.md").write_text("of the original")
    (original / "LICENSE").write_text("be kind")
    folder = exported(original, tmp_path / "model", data=DATA._replace(exclude_prompt=True))
    before, after = read_pretrained(original), read_pretrained(folder)
    assert (before.normalize, after.normalize) == (False, True)
    assert (before.similarity, after.similarity) == ("dot", "cosine")
    assert after.prompts == {"query": "query: ", "key": ""}
    assert after.max_tokens == 20
    assert after.pooling == before.pooling._replace(include_prompt=False)
    for field in ("family", "config", "tensors", "special_tokens", "dim"):
        assert getattr(after, field) == getattr(before, field)
    library = json.loads((folder / "config_sentence_transformers.json").read_text())
    assert library["prompts"]["clustering"] == "group: "
    assert "__version__" not in library, "it would warn in older versions"
    for name in ("tokenizer.json", "config.json", "LICENSE"):
        assert (folder / name).read_bytes() == (original / name).read_bytes()
    assert not (folder / "README.md").exists()


def test_modules_have_the_names_that_all_versions_know(original, tmp_path):
    rewritten(original, "1_Pooling/config.json", pooling_mode="mean", pooling_mode_mean_tokens=None)
    modules = json.loads((original / "modules.json").read_text())
    modules[1]["type"] = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
    (original / "modules.json").write_text(json.dumps(modules))
    folder = exported(original, tmp_path / "model")
    modules = json.loads((folder / "modules.json").read_text())
    assert [(module["path"], module["type"]) for module in modules] == [
        ("", "sentence_transformers.models.Transformer"),
        ("1_Pooling", "sentence_transformers.models.Pooling"),
        ("2_Normalize", "sentence_transformers.models.Normalize"),
    ]
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    assert pooling == {
        "word_embedding_dimension": DIM,
        "pooling_mode_cls_token": False,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_mean_sqrt_len_tokens": False,
        "pooling_mode_weightedmean_tokens": False,
        "pooling_mode_lasttoken": False,
        "include_prompt": True,
    }


@pytest.mark.parametrize(
    ("modes", "is_old"), [(["cls", "mean"], True), (["mean", "cls"], False), (["lasttoken"], True)]
)
def test_pooling_keeps_its_modes_in_their_order(original, tmp_path, modes, is_old):
    rewritten(original, "1_Pooling/config.json", pooling_mode=modes)
    folder = exported(original, tmp_path / "model")
    assert list(read_pretrained(folder).pooling.modes) == modes
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    assert ("pooling_mode" not in pooling) == is_old
    assert pooling["word_embedding_dimension" if is_old else "embedding_dimension"] == DIM


def test_a_transformers_folder_is_exported_for_sentence_transformers(original, tmp_path):
    for name in ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json"):
        (original / name).unlink(missing_ok=True)
    folder = exported(original, tmp_path / "model")
    model = read_pretrained(folder)
    assert model.normalize
    assert model.pooling.modes == ("mean",)
    assert len(json.loads((folder / "modules.json").read_text())) == 3


def test_dense_layers_are_exported_without_the_fields_of_later_versions(original, tmp_path):
    modules = json.loads((original / "modules.json").read_text())
    dense = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (original / "modules.json").write_text(json.dumps([*modules[:2], dense]))
    (original / "2_Dense").mkdir()
    config = {
        "in_features": DIM,
        "out_features": 5,
        "bias": True,
        "activation_function": "torch.nn.modules.linear.Identity",
        "module_input_name": "sentence_embedding",
    }
    rewritten(original, "2_Dense/config.json", **config)
    rng = np.random.default_rng(0)
    weights = {"linear.weight": rng.normal(size=(5, DIM)), "linear.bias": rng.normal(size=5)}
    layer = {name: value.astype(np.float32) for name, value in weights.items()}
    save_file(layer, original / "2_Dense" / WEIGHTS)
    folder = exported(original, tmp_path / "model")
    del config["module_input_name"]
    assert json.loads((folder / "2_Dense" / "config.json").read_text()) == config
    found = load_file(folder / "2_Dense" / WEIGHTS)
    assert {name: value.tolist() for name, value in found.items()} == {
        name: value.tolist() for name, value in layer.items()
    }
    paths = [module["path"] for module in json.loads((folder / "modules.json").read_text())]
    assert paths == ["", "1_Pooling", "2_Dense", "3_Normalize"]


def test_a_tokenizer_config_is_kept_or_written_if_missing(original, tmp_path):
    folder = exported(original, tmp_path / "without")
    assert json.loads((folder / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 20,
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
    }
    (original / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizerFast"}')
    folder = exported(original, tmp_path / "with")
    assert "BertTokenizerFast" in (folder / "tokenizer_config.json").read_text()


PADDING = {
    "a token of the text's end": ({"eos_token_id": [99, 3]}, {}, {}, "[SEP]"),
    "the tokenizer's last token": ({}, {}, {}, "[SEP]"),
    "its own": ({"eos_token_id": 3}, {"pad_token": "[UNK]"}, {}, "[UNK]"),
    "its own in another file": ({"eos_token_id": 3}, {}, {"pad_token": "[UNK]"}, None),
    "an id": ({"pad_token_id": 1}, {}, {}, "[UNK]"),
}


@pytest.mark.parametrize("case", PADDING)
def test_a_decoder_without_a_padding_token_gets_one(tmp_path, case):
    config, tokenizer, tokens, wanted = PADDING[case]
    original = write_tiny_decoder(tmp_path / "original")
    rewritten(original, "config.json", **{"pad_token_id": None} | config)
    rewritten(original, "tokenizer.json", padding=None)
    rewritten(original, "tokenizer_config.json", **{"pad_token": None} | tokenizer)
    rewritten(original, "special_tokens_map.json", **tokens)
    folder = exported(original, tmp_path / "model")
    found = json.loads((folder / "tokenizer_config.json").read_text())
    assert (found["padding_side"], found.get("pad_token")) == ("left", wanted)
    assert tensor_bytes(folder) == tensor_bytes(original)


def test_the_config_names_the_type_that_the_trained_weights_need(original, tmp_path):
    rewritten(original, "config.json", torch_dtype="bfloat16")
    stored = {name: t.astype(jnp.bfloat16) for name, t in load_file(original / WEIGHTS).items()}
    save_file(stored, original / WEIGHTS, metadata={"format": "pt"})

    def type_of(folder):
        return json.loads((folder / "config.json").read_text())["torch_dtype"]

    unchanged = exported(original, tmp_path / "unchanged")
    assert type_of(unchanged) == "bfloat16"
    assert (unchanged / WEIGHTS).read_bytes() == (original / WEIGHTS).read_bytes()

    def trained(leaf):
        return leaf.astype(np.float32) * np.float32(1.001)

    assert type_of(exported(original, tmp_path / "trained", change=trained)) == "float32"
    narrow = exported(original, tmp_path / "narrow", change=trained, dtype=np.dtype(jnp.bfloat16))
    assert type_of(narrow) == "bfloat16"


def test_static_embeddings_keep_their_bytes_and_get_a_limit(tmp_path):
    original = write_tiny_static(tmp_path / "original", normalize=False)
    folder = exported(original, tmp_path / "model")
    assert tensor_bytes(folder) == tensor_bytes(original)
    model = read_pretrained(folder)
    assert (model.family, model.normalize, model.max_tokens) == ("static_embedding", True, 20)


def test_a_model2vec_folder_becomes_one_table_with_a_zero_row_for_unknown(tmp_path):
    original = write_tiny_static(tmp_path / "original")
    (original / "modules.json").unlink()
    rewritten(original, "config.json", model_type="model2vec", normalize=True)
    (table,) = load_file(original / WEIGHTS).values()
    weights = np.random.default_rng(1).uniform(size=len(table)).astype(np.float32)
    save_file({"embeddings": table, "weights": weights}, original / WEIGHTS)
    folder = exported(original, tmp_path / "model")
    model = read_pretrained(folder)
    assert (model.family, model.normalize) == ("static_embedding", True)
    wanted = table * weights[:, None]
    wanted[1] = 0  # [UNK]
    ((name, found),) = load_file(folder / WEIGHTS).items()
    assert name == "embedding.weight"
    np.testing.assert_array_equal(found, wanted)
