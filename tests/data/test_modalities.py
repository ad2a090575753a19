"""The files in a workdir that inputs depend on must not change."""

import json

import numpy as np
import pytest
from jaxcl.configs.code_search import get_config

from jaxcl.data.modalities import (
    MODALITIES,
    build_readers,
    check_inputs,
    input_fingerprints,
    open_tables,
)
from jaxcl.data.prepare import prepare_data
from jaxcl.data.sources import InMemoryPairs
from jaxcl.settings.data_sections import MaxTokens, SidePrompts
from jaxcl.settings.read import read_settings
from jaxcl.typing import SIDES
from tests.data.test_text_rule import COLON, END, QUERY, START, A, B, word_tokenizer

PAIRS = InMemoryPairs(["add one", "sub two"], ["return a + 1", "return b - 2"])


@pytest.fixture
def data():
    config = get_config("smoke").data
    config.update({"name": "memory", "vocabulary_size": 300})
    config.splits = {"train": "train"}
    return read_settings({"data": config.to_dict()}).data


def prepare(data, workdir):
    workdir.mkdir(exist_ok=True)
    return prepare_data(
        data, data_dir=workdir.parent, workdir=workdir, open_source=lambda role: PAIRS
    )


def swap_two_ids(workdir):
    path = workdir / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content))


def test_a_run_does_not_resume_with_another_tokenizer(data, tmp_path):
    prepare(data, tmp_path / "run")
    prepare(data, tmp_path / "run")  # the same one
    swap_two_ids(tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"tokenizer\.json in .*run has changed since .*restore it"
    ):
        prepare(data, tmp_path / "run")


def test_no_command_reads_another_tokenizer(data, tmp_path):
    prepare(data, tmp_path / "run")
    recorded = json.loads((tmp_path / "run" / "data.json").read_text())["fingerprints"]
    check_inputs(data, tmp_path / "run", recorded)
    assert recorded.items() >= input_fingerprints(data, tmp_path / "run").items()
    swap_two_ids(tmp_path / "run")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        check_inputs(data, tmp_path / "run", recorded)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        open_tables(data, {}, data_dir=tmp_path, workdir=tmp_path / "run", recorded=recorded)


def test_a_lost_tokenizer_is_trained_again_if_it_is_the_same(data, tmp_path):
    prepare(data, tmp_path / "run")
    content = (tmp_path / "run" / "tokenizer.json").read_bytes()
    (tmp_path / "run" / "tokenizer.json").unlink()
    prepare(data, tmp_path / "run")
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == content
    (tmp_path / "run" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json in .*run has changed"):
        prepare(data._replace(vocabulary_size=25), tmp_path / "run")


def test_a_workdir_of_an_earlier_version_opens_and_is_recorded_from_then_on(data, tmp_path):
    prepare(data, tmp_path / "run")
    path = tmp_path / "run" / "data.json"
    content = json.loads(path.read_text())
    content["fingerprints"] = {"train": content["fingerprints"]["train"]}
    path.write_text(json.dumps(content))
    prepare(data, tmp_path / "run")
    swap_two_ids(tmp_path / "run")
    with pytest.raises(ValueError, match=r"tokenizer\.json in .*run has changed"):
        prepare(data, tmp_path / "run")


# Pretrained tokenizers and prompts

TEXTS = {"query": ["a b c a b c a b", "", "b"], "key": ["c", "a a", "z b \n z"]}


@pytest.fixture
def pretrained(data, tmp_path):
    """A tokenizer file that pads and truncates, and a prompt that pooling leaves out."""
    tokenizer = word_tokenizer()
    tokenizer.enable_padding(length=12, pad_id=1, pad_token="<pad>", direction="left")
    tokenizer.enable_truncation(12)
    tokenizer.save(str(tmp_path / "foreign.json"))
    return data._replace(
        tokenizer=str(tmp_path / "foreign.json"),
        max_tokens=MaxTokens(query=8, key=6),
        special_tokens=True,
        distinct_tokens=False,
        prompts=SidePrompts(query="query: "),
        exclude_prompt=True,
    )


def prepare_texts(data, workdir):
    workdir.mkdir(exist_ok=True)
    pairs = InMemoryPairs(*(TEXTS[side] for side in SIDES))
    return prepare_data(
        data, data_dir=workdir.parent, workdir=workdir, open_source=lambda role: pairs
    )


def assert_equal_inputs(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name])
        assert found[name].dtype == wanted[name].dtype


def test_a_pretrained_tokenizer_s_inputs_have_prompts_special_tokens_and_lengths(
    pretrained, tmp_path
):
    readers = prepare_texts(pretrained, tmp_path / "run").readers
    query, key = (readers[side](["a b", ""]) for side in SIDES)
    assert query["tokens"].tolist() == [
        [START, QUERY, COLON, A, B, END, 0, 0],
        [START, QUERY, COLON, END, 0, 0, 0, 0],
    ]
    assert query["length"].tolist() == [6, 4]
    assert query["prompt_length"].tolist() == [3, 3]
    assert key["tokens"].tolist() == [[START, A, B, END, 0, 0], [START, END, 0, 0, 0, 0]]
    assert key.keys() == {"tokens", "length"}


CHANGES = [
    {},
    {"special_tokens": False},
    {"special_tokens": False, "skip_unknown": True},
    {"distinct_tokens": True},
    {"exclude_prompt": False},
    {"prompts": SidePrompts(key="c c")},
    {"prompts": SidePrompts(query="query: ", key="query:\n")},
    {"tokenizer": None, "special_tokens": None},
    {"tokenizer": None, "special_tokens": None, "add_cls": True, "exclude_prompt": None},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_tables_readers_random_inputs_and_spec_agree(pretrained, tmp_path, changes):
    data = pretrained._replace(**changes)
    run = prepare_texts(data, tmp_path / "run")
    for side in SIDES:
        read = run.readers[side](TEXTS[side])
        rows = np.array([0, 1, 2])
        assert_equal_inputs(run.tables["train"].side(side, rows), read)
        text = MODALITIES["text"]
        random = text.random_inputs(data, side, np.random.default_rng(0), 5)
        for spec in (run.tables["train"].spec(side), text.spec(data, side)):
            for inputs in (read, random):
                shapes = {name: (leaf.shape[1:], leaf.dtype) for name, leaf in inputs.items()}
                assert shapes == {name: (leaf.shape, leaf.dtype) for name, leaf in spec.items()}
        assert text.count(random) == 5 * getattr(data.max_tokens, side)
        lengths = read.get("length", (read["tokens"] != 0).sum(1))
        assert text.count(read) == lengths.sum() > 0


def test_a_prompt_precedes_texts_with_a_trained_tokenizer_too(data, tmp_path):
    data = data._replace(prompts=SidePrompts(query="add "), distinct_tokens=False)
    with_prompt = prepare(data, tmp_path / "run").readers
    plain = build_readers(data._replace(prompts=SidePrompts()), tmp_path / "run")
    assert_equal_inputs(with_prompt["query"](["one"]), plain["query"](["add one"]))
    assert_equal_inputs(with_prompt["key"](["one"]), plain["key"](["one"]))


def test_a_run_s_copy_of_a_pretrained_tokenizer_equals_the_file(pretrained, tmp_path):
    wanted = prepare_texts(pretrained, tmp_path / "run").readers["query"](TEXTS["query"])
    (tmp_path / "foreign.json").unlink()
    found = build_readers(pretrained, tmp_path / "run")["query"](TEXTS["query"])
    assert_equal_inputs(found, wanted)


def test_special_tokens_of_a_tokenizer_that_the_run_trains_are_an_error(pretrained, tmp_path):
    with pytest.raises(ValueError, match=r"data\.special_tokens=True .* set data\.tokenizer"):
        prepare_texts(pretrained._replace(tokenizer=None), tmp_path / "run")


def test_a_limit_without_room_is_an_error_before_the_first_step(pretrained, tmp_path):
    data = pretrained._replace(max_tokens=MaxTokens(query=4, key=6))
    with pytest.raises(ValueError, match=r"max_tokens=4 .* the prompt 'query: ' take 4"):
        prepare_texts(data, tmp_path / "run")


def test_a_vocabulary_that_the_encoder_does_not_have_is_an_error(pretrained, tmp_path):
    with pytest.raises(ValueError, match=r"ids go up to 8, but data\.vocabulary_size=8"):
        prepare_texts(pretrained._replace(vocabulary_size=8), tmp_path / "run")
    prepare_texts(pretrained._replace(vocabulary_size=9), tmp_path / "run")
