"""Texts become tokens by the rule of their side, and tokens become inputs."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from jaxcl.data.text_rule import (
    UNLIMITED,
    TextRule,
    TextTokenizer,
    as_inputs,
    input_spec,
    special_tokens_around,
)
from jaxcl.data.tokenizer import load_pretrained_tokenizer, train_tokenizer
from jaxcl.models.layers import token_mask

START, PAD, END, UNK, QUERY, COLON, A, B, C = range(9)
VOCABULARY = {
    token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "query", ":", *"abc"])
}
TEXTS = ["a b c", "", "b", "c a b a b c c", "z", "  a\n b "]
AROUND = ([START], [END])
NOTHING = ([], [])
TEMPLATE = processors.TemplateProcessing(
    single="<s> $A </s>", special_tokens=[("<s>", START), ("</s>", END)]
)
BYTE_LEVEL = processors.ByteLevel(trim_offsets=False)
POST_PROCESSORS = {
    "template": (TEMPLATE, AROUND),
    "bert": (processors.BertProcessing(("</s>", END), ("<s>", START)), AROUND),
    "roberta": (processors.RobertaProcessing(("</s>", END), ("<s>", START)), AROUND),
    "sequence": (processors.Sequence([BYTE_LEVEL, TEMPLATE]), AROUND),
    "byte level": (BYTE_LEVEL, NOTHING),
    "none": (None, NOTHING),
    "end only": (
        processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)]),
        ([], [END]),
    ),
    "two before": (
        processors.TemplateProcessing(
            single="<s> </s> $A", special_tokens=[("<s>", START), ("</s>", END)]
        ),
        ([START, END], []),
    ),
}


def word_tokenizer(post_processor=TEMPLATE) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    if post_processor is not None:
        tokenizer.post_processor = post_processor
    return tokenizer


def tokenized(text, rule, tokenizer=None):
    (row,) = TextTokenizer(tokenizer or word_tokenizer(), rule).tokenize([text])
    return row.tolist()


every_post_processor = pytest.mark.parametrize(
    ("post_processor", "around"), POST_PROCESSORS.values(), ids=POST_PROCESSORS
)


@every_post_processor
def test_the_special_tokens_of_every_post_processor_are_found(post_processor, around):
    assert special_tokens_around(word_tokenizer(post_processor)) == around


@every_post_processor
@pytest.mark.parametrize("max_tokens", [3, 4, 5, UNLIMITED])
def test_texts_are_truncated_as_by_the_tokenizer_itself(post_processor, around, max_tokens):
    tokenizer = word_tokenizer(post_processor)
    rows = TextTokenizer(tokenizer, TextRule(max_tokens, special_tokens=True)).tokenize(TEXTS)
    tokenizer.enable_truncation(max_tokens)
    assert [row.tolist() for row in rows] == [tokenizer.encode(text).ids for text in TEXTS]
    assert max(map(len, rows)) == min(max_tokens, 7 + len(around[0]) + len(around[1]))
    assert {row.dtype for row in rows} == {np.dtype(np.int32)}


@every_post_processor
def test_with_special_tokens_false_none_are_added(post_processor, around):
    tokenizer = word_tokenizer(post_processor)
    assert tokenized("a z", TextRule(9, special_tokens=False), tokenizer) == [A, UNK]
    assert tokenized("", TextRule(9, special_tokens=False), tokenizer) == []


def test_a_text_without_tokens_has_its_special_tokens():
    assert tokenized("", TextRule(9, special_tokens=True)) == [START, END]


def test_a_post_processor_that_does_more_than_add_tokens_is_an_error():
    between = processors.TemplateProcessing(single="<s> $A <s> $A", special_tokens=[("<s>", START)])
    with pytest.raises(ValueError, match="post-processor does more"):
        TextTokenizer(word_tokenizer(between), TextRule(9, special_tokens=True))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (models.WordLevel({"a": 0, "<s>": 1}), "cannot encode 'x x': WordLevel"),
        (models.BPE({"a": 0, "<s>": 1}, []), "no tokens for 'x x'"),
    ],
)
def test_special_tokens_that_cannot_be_distinguished_are_an_error(model, message):
    tokenizer = Tokenizer(model)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    with pytest.raises(ValueError, match=message):
        TextTokenizer(tokenizer, TextRule(9, special_tokens=True))
    assert tokenized("a", TextRule(9, special_tokens=False), tokenizer) == [0]


def test_special_tokens_spelt_out_in_a_text_are_read_as_special():
    assert tokenized("a </s> b", TextRule(9, special_tokens=False)) == [A, END, B]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_truncation_in_a_pretrained_file_are_disabled(tmp_path, side):
    tokenizer = word_tokenizer()
    tokenizer.enable_padding(length=6, pad_id=PAD, pad_token="<pad>", direction=side)
    tokenizer.enable_truncation(4, direction=side)
    assert len(tokenizer.encode("a b c a b c").ids) == 6
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_pretrained_tokenizer(tmp_path / "tokenizer.json")
    whole = [START, A, B, C, A, B, C, END]
    assert tokenized("a b c a b c", TextRule(9, special_tokens=True), loaded) == whole
    assert tokenized("a", TextRule(9, special_tokens=True), loaded) == [START, A, END]


def test_a_prompt_precedes_the_text_and_counts_towards_the_limit():
    rule = TextRule(6, special_tokens=True, prompt="query: ")
    assert tokenized("a b c", rule) == [START, QUERY, COLON, A, B, END]
    assert tokenized("", rule) == [START, QUERY, COLON, END]
    own = train_tokenizer(["query: a b c"], vocabulary_size=60)
    assert tokenized("a b", TextRule(9, prompt="query: "), own) == tokenized(
        "query: a b", TextRule(9), own
    )


@every_post_processor
def test_the_prompt_length_includes_only_special_tokens_before_the_prompt(post_processor, around):
    tokenizer = word_tokenizer(post_processor)
    rule = TextRule(9, special_tokens=True, prompt="query: ", exclude_prompt=True)
    text = TextTokenizer(tokenizer, rule)
    inputs = text.inputs(text.tokenize(["a b c", ""]))
    assert inputs["prompt_length"].tolist() == [len(around[0]) + 2] * 2
    assert inputs["tokens"][0, text.prompt_length] == A


@pytest.mark.parametrize(
    ("rule", "least"),
    [
        (TextRule(0, special_tokens=True), 3),
        (TextRule(0, special_tokens=False), 1),
        (TextRule(0, special_tokens=True, prompt="query: "), 5),
        (TextRule(0, special_tokens=False, prompt="query: "), 3),
    ],
)
def test_a_limit_without_room_for_text_is_an_error_with_the_least_limit(rule, least):
    for max_tokens in range(least):
        with pytest.raises(ValueError, match=rf"max_tokens={max_tokens} .* at least {least}"):
            TextTokenizer(word_tokenizer(), rule._replace(max_tokens=max_tokens))
    assert A in tokenized("a b", rule._replace(max_tokens=least))


def test_cls_of_a_trained_tokenizer_needs_room_too():
    own = train_tokenizer(["a b c"], vocabulary_size=60)
    with pytest.raises(ValueError, match=r"max_tokens=1 .* at least 2"):
        TextTokenizer(own, TextRule(1, add_cls=True))


@pytest.mark.parametrize("special_tokens", [True, False])
def test_asking_a_pretrained_tokenizer_for_cls_is_an_error(special_tokens):
    rule = TextRule(9, add_cls=True, special_tokens=special_tokens)
    with pytest.raises(ValueError, match="special_tokens=True"):
        TextTokenizer(word_tokenizer(), rule)


@pytest.mark.parametrize("text", ["é", "e\u0301", "日本", "🦊", "\u200b", "a\x00b", "İ"])
def test_unicode_is_tokenised_as_by_the_tokenizer_itself(text):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    wanted = tokenizer.encode(text).ids
    assert len(wanted) == len(text.encode())
    assert tokenized(text, TextRule(99, special_tokens=True), tokenizer) == wanted


def test_a_text_that_is_not_unicode_is_an_error_that_names_it():
    text = TextTokenizer(word_tokenizer(), TextRule(9, special_tokens=True, prompt="query: "))
    with pytest.raises(ValueError, match="text 1 is not Unicode"):
        text.tokenize(["a", "b \udcff"])


def test_a_prompt_that_is_not_unicode_is_an_error():
    with pytest.raises(ValueError, match="prompt 0 is not Unicode"):
        TextTokenizer(word_tokenizer(), TextRule(9, prompt="\udcff", special_tokens=True))


@pytest.mark.usefixtures("unchecked_annotations")
def test_a_value_that_is_not_a_text_is_an_error_that_names_it():
    text = TextTokenizer(word_tokenizer(), TextRule(9, special_tokens=True, prompt="query: "))
    with pytest.raises(ValueError, match="key of row 8 is int, 3; give a text"):
        text.tokenize(["a", 3], what="key of row", first=7)


def unigram_tokenizer() -> Tokenizer:
    pieces = [("<s>", 0.0), ("<unk>", 0.0), ("a", -1.0), ("b", -1.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=1))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "kept", "unknown"),
    [(word_tokenizer(), [A, B], UNK), (unigram_tokenizer(), [2, 3], 1)],
    ids=["by token", "by number"],
)
def test_unknown_tokens_are_skipped_before_truncation(tokenizer, kept, unknown):
    rule = TextRule(2, special_tokens=False)
    assert tokenized("z a z b", rule, tokenizer) == [unknown, kept[0]]
    assert tokenized("z a z b", rule._replace(skip_unknown=True), tokenizer) == kept
    assert tokenized("z", rule._replace(skip_unknown=True), tokenizer) == []


def test_a_tokenizer_without_an_unknown_token_skips_nothing():
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    rule = TextRule(9, special_tokens=False, skip_unknown=True)
    assert tokenized("ab", rule, tokenizer) == [0, 1]


# Inputs


def test_padding_follows_the_text_and_the_length_excludes_it():
    """Even if the padding id is a token, or padding and end share a token."""
    text = TextTokenizer(word_tokenizer(), TextRule(9, special_tokens=True))
    inputs = text.inputs(text.tokenize(["<s> a", "", "<pad> </s>"]), width=6)
    np.testing.assert_array_equal(
        inputs["tokens"],
        [[START, START, A, END, 0, 0], [START, END, 0, 0, 0, 0], [START, PAD, END, END, 0, 0]],
    )
    assert inputs["length"].tolist() == [4, 2, 4]
    assert {leaf.dtype for leaf in inputs.values()} == {np.dtype(np.int32)}


def test_one_token_may_both_end_texts_and_pad_them(tmp_path):
    tokenizer = word_tokenizer(POST_PROCESSORS["end only"][0])
    tokenizer.enable_padding(length=5, pad_id=END, pad_token="</s>")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_pretrained_tokenizer(tmp_path / "tokenizer.json")
    text = TextTokenizer(loaded, TextRule(5, special_tokens=True))
    inputs = text.inputs(text.tokenize(["a b", "", "</s>"]), width=5)
    assert inputs["tokens"][:, :3].tolist() == [[A, B, END], [END, 0, 0], [END, END, 0]]
    assert token_mask(inputs).sum(1).tolist() == inputs["length"].tolist() == [3, 1, 2]


def test_inputs_are_as_wide_as_their_longest_text():
    text = TextTokenizer(word_tokenizer(), TextRule(UNLIMITED, special_tokens=False))
    assert text.inputs(text.tokenize(["a", "a b c"]))["tokens"].shape == (2, 3)
    assert text.inputs(text.tokenize(["", ""]))["tokens"].shape == (2, 0)
    assert text.inputs([])["tokens"].shape == (0, 0)
    assert text.inputs([], width=4)["tokens"].shape == (0, 4)
    assert text.inputs(text.tokenize(["", ""]), width=4)["length"].tolist() == [0, 0]


@pytest.mark.parametrize("add_cls", [False, True])
def test_texts_of_a_trained_tokenizer_are_padded_to_one_width(add_cls):
    texts = ["add one", "", "add one to the number and return it", "number"]
    text = TextTokenizer(train_tokenizer(texts, vocabulary_size=60), TextRule(6, add_cls=add_cls))
    rows = text.tokenize(texts)
    inputs = text.inputs(rows, width=6)
    assert inputs.keys() == {"tokens"}
    np.testing.assert_array_equal(inputs["tokens"], [[*row, *[0] * (6 - len(row))] for row in rows])
    assert inputs["tokens"][1].tolist() == ([2, 1] if add_cls else [1, 0]) + [0] * 4


def test_distinct_keeps_each_token_of_a_text_once():
    rule = TextRule(9, special_tokens=True, distinct=True)
    assert tokenized("b a b b c", rule) == [START, B, A, C, END]


@pytest.mark.parametrize("special_tokens", [None, True, False])
@pytest.mark.parametrize("prompt", ["", "query: "])
@pytest.mark.parametrize("exclude_prompt", [False, True])
def test_the_spec_of_a_rule_matches_its_inputs(special_tokens, prompt, exclude_prompt):
    rule = TextRule(7, special_tokens=special_tokens, prompt=prompt, exclude_prompt=exclude_prompt)
    ids, lengths = np.arange(5), np.array([3, 0, 2])
    inputs = as_inputs(ids, lengths, rule, width=7, prompt_length=2)
    spec = input_spec(rule)
    assert {name: (leaf.shape[1:], leaf.dtype) for name, leaf in inputs.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in spec.items()
    }
    assert ("length" in inputs) == (special_tokens is not None)
    assert ("prompt_length" in inputs) == (exclude_prompt and prompt != "")
