"""The tokenizer: identifiers split into words, id 0 only for padding, everything in one file."""

import json
import os

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from jaxcl.data.text_rule import TextRule, TextTokenizer
from jaxcl.data.tokenizer import load_tokenizer, tokenizer_fingerprint, train_tokenizer

TEXTS = [
    "parse the ISO date of a string",
    "def parse_iso_date(text): return date.fromisoformat(text)",
    "open an HTTP server on port 80",
    "def openHTTPServer(port=80): return HTTPServer(port)",
]
PADDING, UNKNOWN, CLS = 0, 1, 2


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(TEXTS, vocabulary_size=200)


def encoded(tokenizer, text, *, max_tokens=32, add_cls=False):
    (ids,) = TextTokenizer(tokenizer, TextRule(max_tokens, add_cls=add_cls)).tokenize([text])
    return ids.tolist()


def tokens(tokenizer, text):
    return [tokenizer.id_to_token(i) for i in encoded(tokenizer, text)]


@pytest.mark.parametrize(
    ("forms", "words"),
    [
        (["parseISODate", "parse_iso_date", "ParseIsoDate", "PARSE_ISO_DATE", "parse ISO date"],
         ["parse", "iso", "date"]),
        (["openHTTPServer", "open_http_server", "__open_HTTP_server__", " open\tHTTP\nserver "],
         ["open", "http", "server"]),
        (["port80", "port_80", "port 80"], ["port", "8", "0"]),
    ],
)  # fmt: skip
def test_camel_case_snake_case_and_prose_read_alike(trained, forms, words):
    for form in forms:
        assert tokens(trained, form) == words


def test_different_words_do_not_read_alike(trained):
    assert encoded(trained, "parse_date") != encoded(trained, "parse_iso_date")
    assert encoded(trained, "date parse") != encoded(trained, "parse date")


def test_punctuation_stays_one_sign_each(trained):
    assert tokens(trained, "(port=80)") == ["(", "port", "=", "8", "0", ")"]


def test_compatible_forms_of_a_character_read_alike(trained):
    fullwidth, ligature = "\uff50\uff41\uff52\uff53\uff45", "\ufb01le"
    assert encoded(trained, fullwidth) == encoded(trained, "parse")
    assert encoded(trained, ligature) == encoded(trained, "file")


def test_special_tokens_have_the_first_ids(trained):
    for token, token_id in {"[PAD]": PADDING, "[UNK]": UNKNOWN, "[CLS]": CLS}.items():
        assert trained.token_to_id(token) == token_id


@pytest.mark.parametrize("vocabulary_size", [60, 61, 200])
def test_the_vocabulary_is_no_larger_than_asked_for(vocabulary_size):
    tokenizer = train_tokenizer(TEXTS, vocabulary_size=vocabulary_size)
    assert tokenizer.get_vocab_size() <= vocabulary_size
    assert max(max(encoded(tokenizer, text)) for text in TEXTS) < vocabulary_size


def test_training_twice_gives_the_same_tokenizer(trained):
    again = train_tokenizer(iter(TEXTS), vocabulary_size=200)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(trained)


@pytest.mark.parametrize("text", ["", " ", "\n\t", "__"])
def test_text_without_tokens_is_one_unknown_token(trained, text):
    assert encoded(trained, text) == [UNKNOWN]
    assert encoded(trained, text, add_cls=True) == [CLS, UNKNOWN]


def test_unseen_characters_are_unknown_tokens(trained):
    assert set(encoded(trained, "日本")) == {UNKNOWN}


@pytest.mark.parametrize("special", ["[PAD]", "[UNK]", "[CLS]"])
def test_special_tokens_spelt_out_in_a_text_are_text(special, trained, tmp_path):
    trained.save(str(tmp_path / "tokenizer.json"))
    for tokenizer in (trained, load_tokenizer(tmp_path / "tokenizer.json")):
        ids = encoded(tokenizer, f"parse {special} date")
        assert PADDING not in ids
        assert CLS not in ids
        assert len(ids) > 3  # two words, and brackets with something between


def test_texts_are_cut_to_max_tokens(trained):
    whole = encoded(trained, "parse the ISO date")
    assert len(whole) == 4
    for max_tokens in (1, 3, 4, 5):
        assert encoded(trained, "parse the ISO date", max_tokens=max_tokens) == whole[:max_tokens]


def test_cls_comes_first_and_counts_as_a_token(trained):
    whole = encoded(trained, "parse the ISO date")
    assert encoded(trained, "parse the ISO date", add_cls=True) == [CLS, *whole]
    assert encoded(trained, "parse the ISO date", add_cls=True, max_tokens=3) == [CLS, *whole[:2]]


def test_each_text_is_encoded_by_itself_and_in_order(trained):
    text = TextTokenizer(trained, TextRule(9, add_cls=True))
    rows = text.tokenize(TEXTS)
    assert [row.tolist() for row in rows] == [
        encoded(trained, text, max_tokens=9, add_cls=True) for text in TEXTS
    ]
    assert all(row.dtype == np.int32 for row in rows)
    assert text.tokenize([]) == []


def test_a_saved_tokenizer_is_the_same_when_loaded(trained, tmp_path):
    trained.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(trained)
    for text in [*TEXTS, "", "日本"]:
        assert encoded(loaded, text) == encoded(trained, text)


def test_the_fingerprint_changes_with_what_the_tokenizer_does(trained):
    others = [
        train_tokenizer(TEXTS, vocabulary_size=60),
        train_tokenizer(TEXTS[:3], vocabulary_size=200),
        Tokenizer.from_str(trained.to_str().replace('"Lowercase"', '"StripAccents"')),
    ]
    fingerprints = {tokenizer_fingerprint(tokenizer) for tokenizer in [trained, *others]}
    assert len(fingerprints) == 4


def test_padding_and_truncation_of_a_foreign_file_are_taken_off(trained, tmp_path):
    foreign = Tokenizer.from_str(trained.to_str())
    foreign.enable_padding(length=7, pad_id=0)
    foreign.enable_truncation(max_length=2)
    foreign.save(str(tmp_path / "tokenizer.json"))
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    assert settings["padding"] and settings["truncation"]  # noqa: PT018 - one state of two
    assert len(encoded(foreign, "parse the ISO date")) == 7

    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert encoded(loaded, "parse the ISO date") == encoded(trained, "parse the ISO date")
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(trained)


def saved_vocabulary(path, *tokens: str):
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path))
    return path


def test_a_foreign_vocabulary_is_read(tmp_path):
    path = saved_vocabulary(tmp_path / "tokenizer.json", "[PAD]", "one", "[CLS]", "[UNK]", "two")
    assert encoded(load_tokenizer(path), "two one", add_cls=True) == [2, 4, 1]
    assert encoded(load_tokenizer(path), "") == [3]


@pytest.mark.parametrize("first", ["word", "<pad>", "[UNK]"])
def test_another_id_0_than_padding_is_an_error_that_names_it(first, tmp_path):
    path = saved_vocabulary(tmp_path / "tokenizer.json", first, "[PAD]", "[CLS]")
    with pytest.raises(ValueError, match=r"tokenizer\.json: token 0 is '.*must be '\[PAD\]'") as e:
        load_tokenizer(path)
    assert repr(first) in str(e.value)


def test_a_foreign_vocabulary_without_an_unknown_token_is_an_error_that_names_it(tmp_path):
    path = saved_vocabulary(tmp_path / "tokenizer.json", "[PAD]", "[CLS]", "word")
    with pytest.raises(ValueError, match=r"tokenizer\.json has no token '\[UNK\]'"):
        load_tokenizer(path)


def test_a_missing_cls_token_is_an_error_that_names_it(tmp_path):
    path = saved_vocabulary(tmp_path / "tokenizer.json", "[PAD]", "[UNK]", "word")
    tokenizer = load_tokenizer(path)
    assert encoded(tokenizer, "word") == [2]
    with pytest.raises(ValueError, match=r"no token '\[CLS\]'.*add_cls=False"):
        encoded(tokenizer, "word", add_cls=True)


@pytest.mark.parametrize("content", [None, "", "{}", "{", "no JSON"])
def test_an_unreadable_file_is_an_error_that_names_it(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a readable tokenizer\.json"):
        load_tokenizer(path)


def test_a_folder_a_pipe_and_a_file_without_end_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    for name, message in {
        ".": "is a folder; give the tokenizer.json in it",
        "pipe": "pipe is a pipe or a device",
        "zero": "zero is a pipe or a device",
        "sparse": "has more than 268,435,456 bytes",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path / name)


def test_a_tokenizer_that_cannot_encode_is_an_error(tmp_path):
    path = saved_vocabulary(tmp_path / "tokenizer.json", "[PAD]", "[UNK]", "word")
    assert '"unk_token": "<unk>"' in path.read_text()
    with pytest.raises(ValueError, match=r"the tokenizer cannot encode the texts: .*UNK"):
        encoded(load_tokenizer(path), "another")


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (3, "text 1 is int, 3; give a text"),
        (None, "text 1 is NoneType, None; give a text"),
        (b"word", "text 1 is bytes, b'word'; give a text"),
        ("\udcff", "text 1 is not Unicode"),
    ],
)
def test_a_value_that_is_not_text_is_an_error_that_names_it(trained, text, message):
    with pytest.raises(ValueError, match=message):
        TextTokenizer(trained, TextRule(4)).tokenize(["word", text])


def test_words_of_a_bounded_length_are_read_as_without_the_bound(trained, monkeypatch):
    longest = "acgt" * 64
    texts = [*TEXTS, "日本", f"x{longest[1:]} 12 {longest}"]
    bounded = train_tokenizer(texts, vocabulary_size=200)
    monkeypatch.setattr("jaxcl.data.tokenizer._MAX_WORD", 10_000)
    unbounded = train_tokenizer(texts, vocabulary_size=200)
    assert bounded.get_vocab() == unbounded.get_vocab()
    for text in texts:
        assert encoded(bounded, text) == encoded(unbounded, text)
    assert encoded(bounded, longest + longest) == 2 * encoded(bounded, longest)


def test_distinct_keeps_each_token_at_its_first_position(trained):
    text = "date = parse(date) : parse"
    every = encoded(trained, text)
    (distinct,) = TextTokenizer(trained, TextRule(32, distinct=True)).tokenize([text])
    assert [trained.id_to_token(i) for i in distinct] == ["date", "=", "parse", "(", ")", ":"]
    assert len(every) == 8
    # Truncated after repeated tokens are removed, not before.
    (cut,) = TextTokenizer(trained, TextRule(3, distinct=True)).tokenize([text])
    assert cut.tolist() == distinct[:3].tolist()
