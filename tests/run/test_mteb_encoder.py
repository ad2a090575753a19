"""Models from `jaxcl.load` accept the calls of `mteb`, which need not be installed.

`test_mteb.py` runs tasks of `mteb` itself.
"""

import inspect
import sys
from enum import Enum
from types import SimpleNamespace

import numpy as np
import pytest

from jaxcl.run.host_vectors import SIMILARITIES, pairwise_similarities, similarities
from tests.small_models import DIM, small_model

TEXTS = ["parse the date", "open a socket", "", "read"]
rng = np.random.default_rng(0)


class PromptType(Enum):
    query = "query"
    document = "document"


@pytest.fixture(scope="module")
def model():
    prompts = {"MyTask-query": "a ", "MyTask": "b ", "STS-document": "c ", "STS": "d "}
    return small_model(["parse the date open a socket read a b c d"], prompts=prompts)


def call(model, task, kind, *, prompt_type=None, **options):
    """Encode as `mteb` does, in batches of two texts."""
    batches = [{"text": TEXTS[:2], "id": ["1", "2"]}, {"text": TEXTS[2:], "id": ["3", "4"]}]
    task = SimpleNamespace(name=task, type=kind)
    names = {"hf_split": "test", "hf_subset": "default", "prompt_type": prompt_type}
    return model.encode(iter(batches), task_metadata=task, **names, **options)


@pytest.mark.parametrize(
    ("task", "kind", "prompt_type", "options"),
    [
        ("Other", "Retrieval", PromptType.query, {"side": "query"}),
        ("Other", "Retrieval", PromptType.document, {"side": "key"}),
        ("Other", "Clustering", None, {"side": "query"}),
        ("MyTask", "Retrieval", PromptType.query, {"side": "query", "prompt": "a "}),
        ("MyTask", "STS", PromptType.document, {"side": "key", "prompt": "b "}),
        ("MyTask", "STS", None, {"side": "query", "prompt": "b "}),
        ("Other", "STS", PromptType.document, {"side": "key", "prompt": "c "}),
        ("Other", "STS", PromptType.query, {"side": "query", "prompt": "d "}),
        ("Other", "STS", None, {"side": "query", "prompt": "d "}),
    ],
)
def test_the_type_of_a_prompt_is_a_side_and_tasks_have_prompts(
    model, task, kind, prompt_type, options
):
    found = call(model, task, kind, prompt_type=prompt_type)
    np.testing.assert_array_equal(found, model.encode(TEXTS, **options))
    wrong = {"side": "key" if options["side"] == "query" else "query", "prompt": "date "}
    for name, value in wrong.items():
        assert np.abs(found - model.encode(TEXTS, **{**options, name: value})).max() > 0.1


def test_options_of_mteb_are_those_of_encode(model, monkeypatch):
    sizes = []

    def embed(rows, side, text, batch_size, advance):
        sizes.append(batch_size)
        return np.zeros((len(rows), DIM), np.float32)

    monkeypatch.setattr(model, "_embed", embed)
    call(model, "Other", "STS", batch_size=32, show_progress_bar=False)
    call(model, "Other", "STS")
    assert sizes == [32, None]


def test_unsupported_options_are_errors(model):
    with pytest.raises(ValueError, match="precision='int8' is not supported in mteb; leave it out"):
        call(model, "Other", "STS", precision="int8")
    with pytest.raises(TypeError, match="unknown_option"):
        call(model, "Other", "STS", unknown_option=1)
    task = SimpleNamespace(name="Pictures", type="Any2AnyRetrieval")
    with pytest.raises(
        ValueError, match="Pictures has inputs of image, id; the model embeds texts"
    ):
        model.encode([{"image": [], "id": []}], task_metadata=task, hf_split="", hf_subset="")


def test_texts_are_embedded_as_before(model):
    names = ["self", "texts", "images", "side", "prompt", "batch_size", "dim", "quantize"]
    names.append("progress")
    assert list(inspect.signature(type(model).encode).parameters) == names
    assert model.encode("read").shape == (DIM,)
    np.testing.assert_array_equal(model.encode(texts=TEXTS), model.encode(TEXTS))
    with pytest.raises(TypeError, match="sides"):
        model.encode(TEXTS, sides="key")


@pytest.mark.parametrize("function", SIMILARITIES)
def test_pairwise_similarities_are_the_diagonal(function):
    a, b = rng.normal(size=(2, 7, 5)).astype(np.float32)
    a[0] = 0  # of an empty text
    found = pairwise_similarities(function, a, b)
    assert (found.shape, found.dtype) == ((7,), np.float32)
    np.testing.assert_allclose(found, np.diag(similarities(function, a, b)), rtol=1e-6)
    model = small_model(TEXTS, similarity_function=function)
    np.testing.assert_array_equal(model.similarity_pairwise(a, b), found)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3, 5), (4, 5)), r"\(3, 5\) and \(4, 5\) are not pairs; give \[n, d\] twice"),
        (((5,), (5,)), r"\(5,\) and \(5,\) are not pairs"),
        (((3, 5), (3, 4)), r"\(3, 5\) and \(3, 4\) cannot be compared"),
    ],
)
def test_vectors_that_are_not_pairs_are_an_error(shapes, message):
    with pytest.raises(ValueError, match=message):
        pairwise_similarities("dot", *map(np.zeros, shapes))


def test_the_description_names_the_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb", None)
    monkeypatch.delitem(sys.modules, "mteb.models.model_meta", raising=False)
    with pytest.raises(
        ImportError, match=r"mteb_model_meta needs mteb: pip install 'jaxcl\[mteb\]'"
    ):
        small_model(TEXTS).mteb_model_meta  # noqa: B018 - reading it raises
