"""`jaxcl.load` gives the embeddings of sentence-transformers for its folders."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

import jaxcl
from jaxcl.typing import SIDES
from tests.helpers import relative_error
from tests.models.pretrained.tiny import write_tiny_static
from tests.run.encoded.folders import FOLDERS, HERE, TEXTS, write_folder
from tests.small_models import small_run

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def vectors():
    with np.load(HERE / "vectors.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: write_folder(name, tmp_path_factory.mktemp(name)) for name in FOLDERS}


@pytest.fixture(scope="module")
def models(folders):
    return {name: jaxcl.load(folder) for name, folder in folders.items()}


@pytest.mark.parametrize("side", ["query", "key"])
@pytest.mark.parametrize("name", FOLDERS)
def test_embeddings_match_sentence_transformers(models, vectors, name, side):
    wanted = vectors[f"{name}/{side}"]
    found = models[name].encode(TEXTS, side=side)
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() < TOLERANCE
    assert models[name].dim == wanted.shape[1]
    one = models[name].encode(TEXTS[4], side=side)
    assert np.abs(one - wanted[4]).max() < TOLERANCE


@pytest.mark.parametrize(("prompt", "wanted"), [("task", "task"), ("message : ", "given")])
def test_a_prompt_may_be_a_name_in_the_folder_or_any_text(models, vectors, prompt, wanted):
    found = models["prompts"].encode(TEXTS, prompt=prompt)
    assert np.abs(found - vectors[f"prompts/{wanted}"]).max() < TOLERANCE
    assert relative_error(found, vectors["prompts/query"]) > 0.01


@pytest.mark.parametrize("name", FOLDERS)
def test_similarities_use_the_function_of_the_folder(models, vectors, name):
    model = models[name]
    found = model.similarity(vectors[f"{name}/query"], vectors[f"{name}/key"])
    assert np.abs(found - vectors[f"{name}/similarity"]).max() < TOLERANCE
    assert model.similarity_function == ("dot" if name == "prompts" else "cosine")


def test_a_tokenizer_with_more_ids_than_the_table_has_rows_is_an_error(tmp_path):
    folder = write_tiny_static(tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["another"])
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match="has ids up to 39, but the model's token table has 39 r"):
        jaxcl.load(folder)


def test_the_attributes_of_a_model_come_from_its_folder(models):
    assert models["mean"].max_tokens == {"query": 12, "key": 12}
    assert models["static"].max_tokens == {"query": None, "key": None}
    assert models["mean"].prompts == {"query": "", "key": ""}
    assert models["prompts"].prompts == {
        "query": "query : ",
        "document": "",
        "key": "",
        "task": "task : open ",
    }
    assert [name for name, model in models.items() if model.normalizes] == ["mean", "static"]


def test_tokens_include_special_tokens_within_the_limit_of_the_model(models):
    found = models["mean"].tokenize(TEXTS)
    assert [len(row) for row in found] == [6, 2, 9, 4, 12, 3]
    assert {(row[0], row[-1]) for row in found} == {(2, 3)}
    assert models["prompts"].tokenize("a").tolist()[:3] == [2, 14, 15]
    assert len(models["static"].tokenize(TEXTS[4])) == 36


def test_activations_may_have_another_type(folders, models):
    coarse = jaxcl.load(folders["mean"], compute_dtype="bfloat16").encode(TEXTS)
    assert 1e-4 < relative_error(coarse, models["mean"].encode(TEXTS)) < 0.05


def test_a_folder_that_lacks_a_tensor_is_refused(folders, tmp_path):
    folder = write_folder("mean", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("encoder.layer.0.output.dense.weight")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"without a tensor: encoder/.*output\.dense\.weight"):
        jaxcl.load(folder)


def test_a_model_id_is_looked_up_on_the_hub(folders, monkeypatch):
    monkeypatch.setattr("jaxcl.run.load_model.local_or_hub", lambda name: folders[name])
    assert jaxcl.load("mean").source == str(folders["mean"])


def test_a_fine_tuned_run_has_the_longer_limit_on_both_sides(folders, models, tmp_path):
    changes = {"model.pretrained": str(folders["static"]), "model.shared": True}
    run = jaxcl.load(small_run(tmp_path, **changes))
    assert run.max_tokens == {"query": 12, "key": 12}
    cut = [" ".join(text.split()[:12]) for text in TEXTS]
    for side in SIDES:
        found = run.encode(TEXTS, side=side)
        assert np.abs(found - models["static"].encode(cut, side=side)).max() < 1e-6
