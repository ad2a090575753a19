"""Folders of pretrained encoders: their descriptions, and the reasons to refuse one."""

import json
import os
import random
import shutil

import numpy as np
import pytest

from jaxcl.models.pretrained.description import Dense, Pooling
from jaxcl.models.pretrained.folder import read_pretrained
from jaxcl.models.pretrained.tensor_files import write_tensors

OLD = "sentence_transformers.models"
NEW = "sentence_transformers.sentence_transformer.modules"
BASE = "sentence_transformers.base.modules"
WORDS = {"embeddings.word_embeddings.weight": np.zeros((7, 4), np.float32)}


BERT = {
    "model_type": "bert",
    "num_hidden_layers": 1,
    "vocab_size": 7,
    "hidden_size": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def write(folder, tensors=WORDS, **files):
    """Write JSON files (`a__b` is `a/b.json`), a tokenizer and tensors; `None` omits a file."""
    for name, content in {"tokenizer": {}, **files}.items():
        path = folder / f"{name.replace('__', '/')}.json"
        if content is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
    if tensors:
        write_tensors(folder / "model.safetensors", tensors)
    return folder


def modules(*classes, package=OLD):
    """The content of a `modules.json` as sentence-transformers writes it."""
    paths = ["" if not i else f"{i}_{name}" for i, name in enumerate(classes)]
    return [
        {"idx": i, "name": str(i), "path": path, "type": f"{package}.{name}"}
        for i, (name, path) in enumerate(zip(classes, paths, strict=True))
    ]


MEAN = {"word_embedding_dimension": 4, "pooling_mode_mean_tokens": True}
DENSE = {"in_features": 4, "out_features": 2}


def write_sentence_transformer(folder, **files):
    """Write Transformer, Pooling, Dense and Normalize; `None` omits a file."""
    defaults = {
        "config": BERT,
        "modules": modules("Transformer", "Pooling", "Dense", "Normalize"),
        "1_Pooling__config": MEAN,
        "2_Dense__config": DENSE,
    }
    write(folder, **defaults | files)
    if (folder / "2_Dense").is_dir():
        weights = {"linear.weight": np.zeros((2, 4), np.float32), "linear.bias": np.zeros(2)}
        write_tensors(folder / "2_Dense" / "model.safetensors", weights)
    return folder


def test_a_plain_folder_has_mean_pooling_without_normalisation(tmp_path):
    model = read_pretrained(write(tmp_path, config=BERT))
    assert model.path == tmp_path
    assert (model.family, model.config, model.encoder_folder) == ("bert", BERT, "")
    assert (model.pooling, model.dense, model.normalize) == (Pooling(("mean",), True), (), False)
    assert (model.prompts, model.similarity) == ({"query": "", "key": ""}, "cosine")
    assert (model.special_tokens, model.skip_unknown) == (True, False)
    assert (model.max_tokens, model.vocabulary_size, model.dim) == (32, 7, 4)
    assert model.tensors == {
        "model.safetensors": {"embeddings.word_embeddings.weight": (np.dtype("f4"), (7, 4))}
    }
    assert model.files == {"config.json": json.dumps(BERT).encode(), "tokenizer.json": b"{}"}


def test_a_sentence_transformers_folder_is_read_with_its_modules(tmp_path):
    write_sentence_transformer(tmp_path)
    (tmp_path / "README.md").write_text("license")
    (tmp_path / "optimizer.pt").write_text("not read")
    model = read_pretrained(str(tmp_path))
    assert model.dense == (Dense("2_Dense", 4, 2, True, "tanh", False),)
    assert (model.normalize, model.dim) == (True, 2)
    assert set(model.files) == {
        *("README.md", "config.json", "modules.json", "tokenizer.json"),
        *("1_Pooling/config.json", "2_Dense/config.json"),
    }
    assert set(model.tensors) == {"model.safetensors", "2_Dense/model.safetensors"}
    assert model.tensors["2_Dense/model.safetensors"]["linear.bias"] == (np.dtype("f8"), (2,))


@pytest.mark.parametrize("package", [OLD, NEW, BASE, f"{BASE}.transformer"])
def test_modules_are_recognised_by_class_name_in_any_package(tmp_path, package):
    listed = modules("Transformer", "Pooling", "Dense", "Normalize", package=package)
    assert read_pretrained(write_sentence_transformer(tmp_path, modules=listed)).normalize


def test_an_encoder_may_have_its_own_folder(tmp_path):
    listed = modules("Transformer", "Pooling")
    listed[0]["path"] = "0_Transformer"
    write(tmp_path, None, tokenizer=None, modules=listed, **{"1_Pooling__config": MEAN})
    write(tmp_path / "0_Transformer", config=BERT)
    model = read_pretrained(tmp_path)
    assert model.encoder_folder == "0_Transformer"
    assert set(model.tensors) == {"0_Transformer/model.safetensors"}
    assert model.files["0_Transformer/tokenizer.json"] == b"{}"


POOLINGS = {
    "an old flag": ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ["cls"]),
    "no flag": ({"word_embedding_dimension": 4}, ["mean"]),
    "several old flags": (
        {"pooling_mode_lasttoken": True, "pooling_mode_max_tokens": True}
        | {"pooling_mode_mean_sqrt_len_tokens": True, "pooling_mode_weightedmean_tokens": True},
        ["max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"],
    ),
    "a new mode": ({"embedding_dimension": 4, "pooling_mode": "lasttoken"}, ["lasttoken"]),
    "new modes in their order": ({"pooling_mode": ["mean", "cls"]}, ["mean", "cls"]),
}


@pytest.mark.parametrize("pooling", POOLINGS)
def test_old_and_new_pooling_configs_are_read(tmp_path, pooling):
    config, modes = POOLINGS[pooling]
    files = {"modules": modules("Transformer", "Pooling"), "1_Pooling__config": config}
    model = read_pretrained(write(tmp_path, config=BERT, **files))
    assert model.pooling == Pooling(tuple(modes), include_prompt=True)
    assert model.dim == 4 * len(modes)


def test_a_prompt_may_be_left_out_of_pooling(tmp_path):
    write_sentence_transformer(tmp_path, **{"1_Pooling__config": MEAN | {"include_prompt": False}})
    assert not read_pretrained(tmp_path).pooling.include_prompt


ACTIVATIONS = {
    "torch.nn.modules.linear.Identity": "identity",
    "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.modules.activation.GELU": "gelu",
}


@pytest.mark.parametrize("path", ACTIVATIONS)
def test_the_options_of_a_dense_layer_are_read(tmp_path, path):
    options = {"bias": False, "activation_function": path, "use_residual": True}
    write_sentence_transformer(tmp_path, **{"2_Dense__config": DENSE | options})
    expected = Dense("2_Dense", 4, 2, False, ACTIVATIONS[path], True)
    assert read_pretrained(tmp_path).dense == (expected,)


PROMPTS = {
    "none": ({}, "", ""),
    "null": ({"prompts": None, "default_prompt_name": None}, "", ""),
    "both": ({"prompts": {"query": "q: ", "document": "d: "}}, "q: ", "d: "),
    "a passage": ({"prompts": {"passage": "p: ", "corpus": "c: "}}, "", "p: "),
    "a corpus": ({"prompts": {"corpus": "c: ", "classify": "x: "}}, "", "c: "),
    "a default": ({"prompts": {"sts": "s: "}, "default_prompt_name": "sts"}, "s: ", "s: "),
    "a default of queries": (
        {"prompts": {"query": "q: "}, "default_prompt_name": "query"},
        "q: ",
        "",
    ),
    "a default of keys": (
        {"prompts": {"corpus": "c: "}, "default_prompt_name": "corpus"},
        "",
        "c: ",
    ),
    "a default and an empty one": (
        {"prompts": {"sts": "s: ", "document": ""}, "default_prompt_name": "sts"},
        *("s: ", ""),
    ),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_each_side_gets_its_prompt(tmp_path, case):
    config, query, key = PROMPTS[case]
    model = read_pretrained(write(tmp_path, config=BERT, config_sentence_transformers=config))
    assert model.prompts == {"query": query, "key": key}


def test_the_similarity_is_read(tmp_path):
    config = {"similarity_fn_name": "dot"}
    model = read_pretrained(write(tmp_path, config=BERT, config_sentence_transformers=config))
    assert model.similarity == "dot"


LENGTHS = {
    "of the module": ({"max_seq_length": 16}, {"model_max_length": 8}, 16),
    "of the tokenizer": ({"max_seq_length": None}, {"model_max_length": 8}, 8),
    "of the positions": ({}, {}, 32),
    "beyond the positions": ({"max_seq_length": 400}, {}, 32),
    "without a limit": ({}, {"model_max_length": 10**30}, 32),
}


@pytest.mark.parametrize("case", LENGTHS)
def test_the_longest_text_is_read(tmp_path, case):
    module, tokenizer, expected = LENGTHS[case]
    files = {"sentence_bert_config": module, "tokenizer_config": tokenizer}
    assert read_pretrained(write(tmp_path, config=BERT, **files)).max_tokens == expected


def test_older_names_of_the_module_config_are_read(tmp_path):
    files = {"sentence_xlm-roberta_config": {"max_seq_length": 9}}
    assert read_pretrained(write(tmp_path, config=BERT, **files)).max_tokens == 9


TABLE = {"embedding.weight": np.zeros((7, 3), np.float32)}


def test_a_static_embedding_is_read(tmp_path):
    listed = modules("StaticEmbedding", "Normalize")
    model = read_pretrained(write(tmp_path, TABLE, modules=listed))
    assert (model.family, model.normalize) == ("static_embedding", True)
    assert (model.vocabulary_size, model.dim, model.max_tokens) == (7, 3, None)
    assert (model.special_tokens, model.skip_unknown) == (False, False)
    assert model.config == {"tensors": {"embedding.weight": [7, 3]}}
    write(tmp_path, TABLE, tokenizer={"truncation": {"max_length": 5}})
    assert read_pretrained(tmp_path).max_tokens == 5


MODEL2VEC = {"embeddings": np.zeros((5, 3)), "weights": np.ones(7), "mapping": np.zeros(7, int)}


@pytest.mark.parametrize("model_type", [{"model_type": "model2vec"}, {}])
@pytest.mark.parametrize("listed", [None, modules("StaticEmbedding", "Normalize")])
def test_a_model2vec_folder_is_read(tmp_path, model_type, listed):
    if listed:
        listed[0]["path"] = "."
    config = {"normalize": True, "max_length": 100, **model_type}
    model = read_pretrained(write(tmp_path, MODEL2VEC, config=config, modules=listed))
    assert (model.family, model.encoder_folder, model.normalize) == ("model2vec", "", True)
    assert (model.special_tokens, model.skip_unknown, model.max_tokens) == (False, True, 100)
    assert model.config["tensors"] == {"embeddings": [5, 3], "mapping": [7], "weights": [7]}


def test_model2vec_has_its_own_defaults(tmp_path):
    model = read_pretrained(write(tmp_path, MODEL2VEC, config={}))
    assert (model.normalize, model.max_tokens) == (False, 512)
    write(tmp_path, MODEL2VEC, config={"max_length": None})
    assert read_pretrained(tmp_path).max_tokens is None


def listing(kind, position=0, **changes):
    listed = modules("Transformer", "Pooling", "Dense", "Normalize")
    listed[position] |= changes
    return {"modules": listed} if kind == "change" else {}


REFUSED = {
    "a class to import": (listing("change", type="mine.Transformer"), "import 'mine.Transformer'"),
    "another module": (
        {"modules": modules("Router", "Pooling")},
        "lists Router, Pooling; supported are Transformer, Pooling, any number of Dense",
    ),
    "no pooling": ({"modules": modules("Transformer", "Dense")}, "lists Transformer, Dense;"),
    "another order": (
        {"modules": modules("Transformer", "Pooling", "Normalize", "Dense")},
        "lists Transformer, Pooling, Normalize, Dense;",
    ),
    "no modules": ({"modules": []}, "not a list of 1 to 32 modules"),
    "an object of modules": ({"modules": {}}, "not a list of 1 to 32 modules"),
    "a hundred modules": ({"modules": modules(*["Dense"] * 100)}, "not a list of 1 to 32 modules"),
    "a number for a module": ({"modules": [1]}, "the module 1; give its type and path"),
    "no path": (listing("change", path=None), "give its type and path"),
    "a path above": (listing("change", 1, path="../1_Pooling"), "'../1_Pooling', which may lie"),
    "an absolute path": (listing("change", 2, path="/etc"), "'/etc', which may lie outside"),
    "a drive": (listing("change", 2, path="C:\\x"), "which may lie outside"),
    "a zero byte": (listing("change", 2, path="a\0b"), "which may lie outside"),
    "a folder twice": (listing("change", 2, path=""), "gives one folder to two modules"),
    "no pooling config": ({"1_Pooling__config": None}, "the pooling config, is missing"),
    "an unknown pooling": (
        {"1_Pooling__config": {"pooling_mode": "median"}},
        r"pooling_mode=\['median'\]; known are cls, max, mean",
    ),
    "a number for pooling": ({"1_Pooling__config": {"pooling_mode": 5}}, "pooling_mode=5; known"),
    "a text for a flag": (
        {"1_Pooling__config": {"include_prompt": "no"}},
        "include_prompt='no'; give true or false",
    ),
    "no width": ({"2_Dense__config": {"in_features": 4}}, "out_features=None; give a width"),
    "another width": (
        {"2_Dense__config": {"in_features": 5, "out_features": 2}},
        "in_features=5, but the layer receives 4 features",
    ),
    "an activation to import": (
        {"2_Dense__config": DENSE | {"activation_function": "os.system"}},
        "import activation_function='os.system'",
    ),
    "a layer for tokens": (
        {"2_Dense__config": DENSE | {"module_input_name": "token_embeddings"}},
        "only 'sentence_embedding' is supported",
    ),
    "custom code": (
        {"config": BERT | {"auto_map": {"AutoModel": "modeling.Model"}}},
        "config.json asks to import code with auto_map",
    ),
    "a custom tokenizer": (
        {"tokenizer_config": {"auto_map": {"AutoTokenizer": ["a.B", None]}}},
        "tokenizer_config.json asks to import code",
    ),
    "an adapter": ({"adapter_config": {}}, "merge_and_unload"),
    "a changed config": ({"sentence_bert_config": {"config_args": {"a": 1}}}, "config_args"),
    "another task": ({"sentence_bert_config": {"transformer_task": "fill-mask"}}, "transformer_ta"),
    "another case": ({"sentence_bert_config": {"do_lower_case": True}}, "has no Lowercase"),
    "no text": ({"sentence_bert_config": {"max_seq_length": -1}}, "is -1 tokens"),
    "another kind": ({"config_sentence_transformers": {"model_type": "SparseEncoder"}}, "'Sparse"),
    "another similarity": (
        {"config_sentence_transformers": {"similarity_fn_name": "cos"}},
        "similarity_fn_name='cos'; known are cosine, dot",
    ),
    "numbers for prompts": ({"config_sentence_transformers": {"prompts": [1]}}, "give a text"),
    "an unknown default": (
        {"config_sentence_transformers": {"prompts": {"a": ""}, "default_prompt_name": "b"}},
        "default_prompt_name='b'; choose one of a",
    ),
    "an unknown family": ({"config": {"model_type": "new"}}, "model_type='new'.*known are bert"),
    "a billion layers": (
        {"config": {"model_type": "modernbert", "num_hidden_layers": 10**9}},
        "num_hidden_layers=1000000000, but there are 1 tensors",
    ),
    "no family": ({"config": {}}, "has no model_type"),
    "no config": ({"config": None}, "config.json is missing"),
    "a list for a config": ({"config": []}, "config.json is not a JSON object"),
    "no tokenizer": ({"tokenizer": None}, r"no tokenizer\.json; load"),
    "a static module": ({"modules": modules("StaticEmbedding")}, "no tensor embedding.weight or"),
    "no embeddings": ({"modules": None, "config": {"model_type": "model2vec"}}, "no tensor embed"),
}


@pytest.mark.parametrize("name", ["Asym", "BoW", "CNN", "LSTM", "Router", "WordEmbeddings"])
@pytest.mark.parametrize("position", [0, 1])
def test_other_modules_are_refused_by_name(tmp_path, name, position):
    names = ["Transformer", "Pooling"]
    names[position] = name
    write(tmp_path, config=BERT, modules=modules(*names))
    with pytest.raises(ValueError, match=f"lists {', '.join(names)}; supported are Transformer"):
        read_pretrained(tmp_path)


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_is_refused_by_name(tmp_path, case):
    files, message = REFUSED[case]
    write_sentence_transformer(tmp_path, **files)
    with pytest.raises(ValueError, match=f"^{tmp_path}.*{message}"):
        read_pretrained(tmp_path)


def test_do_lower_case_is_accepted_if_the_tokenizer_lowercases(tmp_path):
    for normalizer in (
        {"type": "BertNormalizer", "lowercase": True},
        {"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "Lowercase"}]},
    ):
        files = {"sentence_bert_config": {"do_lower_case": True}}
        write(tmp_path, config=BERT, tokenizer={"normalizer": normalizer}, **files)
        assert read_pretrained(tmp_path).special_tokens


def test_the_error_for_a_missing_folder_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent is not a folder"):
        read_pretrained(tmp_path / "absent")


def test_links_to_files_outside_the_folder_are_refused(tmp_path):
    folder = write(tmp_path / "model", config=BERT)
    (tmp_path / "secret").write_text("{}")
    (folder / "tokenizer_config.json").symlink_to("../secret")
    with pytest.raises(ValueError, match=r"is a link to .*secret, outside of the folder"):
        read_pretrained(folder)


def test_a_hub_cache_is_read_through_its_links(tmp_path):
    plain = write_sentence_transformer(tmp_path / "plain")
    revision = tmp_path / "models--org--name" / "snapshots" / "0123"
    shutil.copytree(plain, revision)
    blobs = tmp_path / "models--org--name" / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in revision.rglob("*") if path.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    assert read_pretrained(revision)._replace(path=plain) == read_pretrained(plain)


def test_a_pipe_or_a_folder_instead_of_a_file_is_refused(tmp_path):
    write(tmp_path, config=BERT, tokenizer=None)
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="pipe or a device"):
        read_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        read_pretrained(tmp_path)


def test_a_huge_file_is_refused(tmp_path):
    write(tmp_path, config=BERT)
    os.truncate(tmp_path / "tokenizer.json", 10**9)  # takes no space on the disk
    with pytest.raises(ValueError, match=r"tokenizer\.json has more than 67,108,864 bytes"):
        read_pretrained(tmp_path)
    os.truncate(tmp_path / "config.json", 10**7)
    with pytest.raises(ValueError, match=r"config\.json has more than 8,388,608 bytes"):
        read_pretrained(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "modules.json", "1_Pooling/config.json"])
@pytest.mark.parametrize("content", ["{", "[" * 100_000, "\xff", "5", '"text"', "[null]", "NaN"])
def test_damaged_json_is_refused_by_name(tmp_path, file, content):
    write_sentence_transformer(tmp_path)
    (tmp_path / file).write_bytes(content.encode("latin1"))
    with pytest.raises(ValueError, match=f"^{tmp_path}: {file}"):
        read_pretrained(tmp_path)


@pytest.mark.parametrize("rounds", [60, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("unchecked_annotations")
def test_random_damage_is_refused_by_name_or_harmless(tmp_path, rounds):
    source = write_sentence_transformer(
        tmp_path / "source",
        sentence_bert_config={"max_seq_length": 8, "do_lower_case": False},
        config_sentence_transformers={"prompts": {"query": "q: "}, "default_prompt_name": None},
        tokenizer_config={"model_max_length": 8},
    )
    names = sorted(str(path.relative_to(source)) for path in source.rglob("*.json"))
    rng = random.Random(rounds)
    refused = 0
    for _ in range(rounds):
        folder = tmp_path / "damaged"
        shutil.copytree(source, folder)
        damage(folder / rng.choice(names), rng)
        try:
            read_pretrained(folder)
        except ValueError as error:
            refused += str(error).startswith(str(folder))
        shutil.rmtree(folder)
    assert refused > rounds / 2


def damage(path, rng):
    """Flip a byte, truncate the file, or change the type of a value in its JSON."""
    content = bytearray(path.read_bytes())
    kind = rng.choice(["flip", "cut", "retype", "retype"])
    if kind == "flip":
        content[rng.randrange(len(content))] = rng.randrange(256)
    elif kind == "cut":
        del content[rng.randrange(len(content)) :]
    else:
        value = json.loads(content)
        target = rng.choice(value) if isinstance(value, list) else value
        if target:
            other = rng.choice([None, [], {}, -1, 2.5, "text", True, [[]], {"a": 1}, 10**40])
            target[rng.choice(sorted(target))] = other
        content = json.dumps(value).encode()
    path.write_bytes(content)
