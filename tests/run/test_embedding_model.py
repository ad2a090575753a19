"""An embedding depends only on its text, not on the batch, the order or the padding."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.data.tokenizer import train_tokenizer
from tests.helpers import relative_error
from tests.small_models import DIM, LONGEST, VOCABULARY, encode, small_model

WORDS = ["parse", "the", "iso", "date", "of", "a", "message", "and", "open", "socket"]
rng = np.random.default_rng(0)
TEXTS = [" ".join(rng.choice(WORDS, size=n)) for n in (1, 9, 30, 2, 60, 9, 17, 5, 44, 3, 12)]
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def model():
    return small_model(TEXTS)


@pytest.fixture(scope="module")
def wanted(model):
    """All texts padded to the longest."""
    tokens = np.zeros((len(TEXTS), LONGEST), np.int32)
    for row, ids in zip(tokens, model.tokenize(TEXTS), strict=True):
        row[: len(ids)] = ids
    return np.asarray(encode(model._params, "query", {"tokens": jnp.asarray(tokens)}))


def test_vectors_match_the_encoder_in_the_order_of_the_texts(model, wanted):
    found = model.encode(TEXTS)
    assert (found.shape, found.dtype) == ((len(TEXTS), DIM), np.float32)
    assert np.abs(found - wanted).max() < TOLERANCE


def test_one_text_has_one_vector(model, wanted):
    found = model.encode(TEXTS[2])
    assert found.shape == (DIM,)
    assert np.abs(found - wanted[2]).max() < TOLERANCE


@pytest.mark.parametrize("batch_size", [1, 8, 11, 64])
def test_the_batch_size_does_not_change_a_vector(model, wanted, batch_size):
    found = model.encode(TEXTS, batch_size=batch_size)
    assert np.abs(found - wanted).max() < TOLERANCE


def test_the_order_does_not_change_a_vector(model, wanted):
    order = np.random.default_rng(1).permutation(len(TEXTS))
    found = model.encode([TEXTS[i] for i in order])
    assert np.abs(found - wanted[order]).max() < TOLERANCE


def test_few_programs_are_compiled():
    shapes = []

    def noted(params, side, inputs, rngs=None):
        shapes.append(inputs["tokens"].shape)
        return encode(params, side, inputs)

    model = small_model(TEXTS, encode=noted)
    for _ in range(2):
        for text in TEXTS:
            model.encode([text])
    assert len(shapes) == len(set(shapes))
    assert {rows for rows, _ in shapes} == {jax.device_count()}
    assert {width for _, width in shapes} <= {8, 12, 16, 24, 32, LONGEST}


def test_the_sides_have_their_own_encoders_and_prompts(model):
    assert relative_error(model.encode(TEXTS, side="key"), model.encode(TEXTS)) > 0.5
    without = model.encode(TEXTS, side="key", prompt="")
    assert relative_error(model.encode(TEXTS, side="key"), without) > 0.01
    assert model.prompts == {"query": "", "key": "open "}
    assert model.max_tokens == {"query": LONGEST, "key": LONGEST}


def test_a_prompt_is_a_name_or_a_text(model):
    wanted = model.encode(["open " + text for text in TEXTS])
    np.testing.assert_allclose(model.encode(TEXTS, prompt="key"), wanted, atol=TOLERANCE)
    np.testing.assert_allclose(model.encode(TEXTS, prompt="open "), wanted, atol=TOLERANCE)


def test_tokenize_returns_the_tokens_that_the_encoder_reads(model):
    tokenizer = train_tokenizer(TEXTS, vocabulary_size=VOCABULARY)
    found = model.tokenize(TEXTS, side="key")
    assert found[1].tolist() == tokenizer.encode("open " + TEXTS[1]).ids[:LONGEST]
    assert model.tokenize(TEXTS[1], side="key").tolist() == found[1].tolist()
    assert max(map(len, found)) == LONGEST


def test_fewer_dimensions_are_normalised_again(model, wanted):
    short = wanted[:, :5] / np.linalg.norm(wanted[:, :5], axis=1, keepdims=True)
    assert np.abs(model.encode(TEXTS, dim=5) - short).max() < TOLERANCE
    assert model.encode(TEXTS[0], dim=5).shape == (5,)


def test_a_model_that_does_not_normalise_keeps_the_length_of_its_vectors(wanted):
    def longer(params, side, inputs, rngs=None):
        return 3 * encode(params, side, inputs)

    raw = small_model(TEXTS, encode=longer, normalizes=False)
    assert np.abs(raw.encode(TEXTS) - 3 * wanted).max() < 3 * TOLERANCE
    assert np.abs(raw.encode(TEXTS, dim=5) - 3 * wanted[:, :5]).max() < 3 * TOLERANCE
    assert raw.encode(TEXTS, quantize="binary").shape == (len(TEXTS), 2)
    with pytest.raises(ValueError, match="the vectors of this model are not normalised"):
        raw.encode(TEXTS, quantize="int8")


def test_int8_keeps_cosines(model, wanted):
    found = model.encode(TEXTS, quantize="int8")
    assert found.dtype == np.int8
    assert np.abs(found / 127 - wanted).max() <= 0.5 / 127 + TOLERANCE
    assert np.abs(model.similarity(found, found) - wanted @ wanted.T).max() < 0.02
    np.testing.assert_array_equal(model.encode(TEXTS[0], quantize="int8"), found[0])


def test_binary_is_the_sign_of_each_dimension(model, wanted):
    found = model.encode(TEXTS, quantize="binary")
    assert (found.shape, found.dtype) == ((len(TEXTS), DIM // 8), np.uint8)
    np.testing.assert_array_equal(np.unpackbits(found, axis=1), wanted > 0)
    assert model.encode(TEXTS, quantize="binary", dim=11).shape == (len(TEXTS), 2)
    with pytest.raises(ValueError, match=r"np\.unpackbits"):
        model.similarity(found, found)


def test_no_texts_have_no_vectors(model):
    assert model.encode([]).shape == (0, DIM)
    assert model.encode([], dim=5, quantize="int8").shape == (0, 5)
    assert model.tokenize([]) == []


@pytest.mark.parametrize("value", [None, 3, b"bytes", ["nested"]])
def test_the_error_for_a_value_that_is_not_a_text_gives_its_number(
    model, value, unchecked_annotations
):
    with pytest.raises(TypeError, match=f"text 2 is {type(value).__name__}"):
        model.encode(["a", "b", value])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"side": "document"}, "side='document' is unknown; use query or key"),
        ({"dim": 0}, "dim=0 is out of range; the model has"),
        ({"dim": 17}, "dim=17 is out of range; the model has"),
        ({"batch_size": 0}, "batch_size=0 is out of range"),
        ({"quantize": "int4"}, "quantize='int4' is unknown; use int8 or binary"),
    ],
)
def test_unknown_options_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.encode(TEXTS, **options)


def test_the_error_for_text_that_is_not_unicode_gives_its_number(model):
    with pytest.raises(ValueError, match="text 1 is not Unicode"):
        model.encode(["a", "\ud800"])


def test_progress_counts_the_texts(model):
    done = []
    model.encode(TEXTS, batch_size=8, progress=done.append)
    assert done == [8, 3]


def test_equal_texts_are_embedded_once():
    rows = []

    def noted(params, side, inputs, rngs=None):
        rows.append(inputs["tokens"].shape[0])
        return encode(params, side, inputs)

    model, done = small_model(TEXTS, encode=noted), []
    found = model.encode([*TEXTS[:3] * 20, TEXTS[4]], batch_size=8, progress=done.append)
    assert rows == [8]
    assert done == [61]
    np.testing.assert_array_equal(found[:3], found[57:60])
    assert np.abs(found[:3] - model.encode(TEXTS[:3])).max() < TOLERANCE


def test_made_from_depends_on_parameters_prompts_and_description():
    def made_from(**options):
        return small_model(TEXTS, **options).made_from

    model = small_model(TEXTS)
    assert made_from() == model.made_from
    assert json.loads(json.dumps(made_from())) == made_from()
    assert made_from(description={"dtype": "bfloat16"}) != model.made_from
    prompted, trained = small_model(TEXTS), small_model(TEXTS)
    prompted._rules = {side: rule._replace(prompt="other") for side, rule in model._rules.items()}
    assert prompted.made_from != model.made_from
    trained._params = {side: table + 1 for side, table in model._params.items()}
    assert trained.made_from != model.made_from
    assert small_model(TEXTS[:5]).made_from != model.made_from


def test_by_default_long_work_on_a_terminal_shows_a_bar(model, capsys, monkeypatch):
    model.encode(["open"] * 1000)
    assert capsys.readouterr() == ("", "")
    model.encode(TEXTS, progress=True)
    assert "embedding: 11/11" in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    model.encode(TEXTS)
    assert capsys.readouterr() == ("", "")
    model.encode(["open"] * 1000)
    assert "1000/1000" in capsys.readouterr().err


def test_a_model_names_its_folder_and_width(model):
    assert repr(model) == "EmbeddingModel('here', dim=16)"
