"""Prompts of concatenated data sets: each row has the prompt of its data set."""

import jax
import numpy as np
import pytest
from jaxcl.configs.code_search import get_config

from jaxcl.assignment import SourcedRows
from jaxcl.data import token_columns
from jaxcl.data.loader import _LocalBatches
from jaxcl.data.modalities import MODALITIES, open_tables, text_rule
from jaxcl.data.row_prompts import RowPrompts, row_prompts
from jaxcl.data.sources import InMemoryPairs
from jaxcl.data.splits import ConcatenatedPairs
from jaxcl.data.table import table_batch
from jaxcl.data.text_rule import TextRule
from jaxcl.data.token_table import build_token_table
from jaxcl.settings.data_sections import DataSet, DataSettings, MaxTokens, SidePrompts
from jaxcl.settings.derived import sources_by
from jaxcl.settings.effects import check_effects
from jaxcl.settings.read import read_data_settings, read_settings
from jaxcl.settings.sections import AssignmentSettings, Settings, SourcedSettings
from jaxcl.typing import SIDES
from tests.data.test_text_rule import A, B, word_tokenizer

SOURCES = [
    InMemoryPairs(["a b c", "", "c a", "b"], ["c", "a a", "b c a b c a b", "z"]),
    InMemoryPairs(["c a", "a"], ["b c a b c a b", "c"]),
    InMemoryPairs(["b b b b b b b b", "a b c", "b"], ["a", "b a", "c c"]),
]
PROMPTS = [
    SidePrompts(query="query: "),
    SidePrompts(query="", key="c: "),
    SidePrompts(query="a query: ", key="b "),
]
WIDTHS = MaxTokens(query=8, key=6)
RULES = [
    {},
    {"exclude_prompt": True},
    {"special_tokens": False, "exclude_prompt": True, "skip_unknown": True},
    {"distinct": True},
]


@pytest.fixture(autouse=True, params=[1, 3, 4096])
def chunk_rows(request, monkeypatch):
    monkeypatch.setattr(token_columns, "_CHUNK_ROWS", request.param)


def settings(*, names=("b", "c"), **changes):
    """Settings of the data sets above; the first is the run's own."""
    concatenated = {
        name: DataSet(name, {"train": "train"}, prompts=prompts)
        for name, prompts in zip(names, PROMPTS[1:], strict=True)
    }
    data = DataSettings(
        concatenated=concatenated, prompts=PROMPTS[0], max_tokens=WIDTHS, special_tokens=True
    )
    return data._replace(**changes)


def table_of(source, directory, *, prompts=None, own=PROMPTS[0], **rule):
    rules = {
        side: TextRule(
            getattr(WIDTHS, side),
            **{"special_tokens": True, "prompt": getattr(own, side) or "", **rule},
        )
        for side in SIDES
    }
    return build_token_table(
        source, word_tokenizer(), rules=rules, prompts=prompts, directory=directory
    )


def together(directory, **rule):
    source = ConcatenatedPairs(SOURCES)
    return table_of(source, directory, prompts=row_prompts(settings(), "train", source), **rule)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rows_have_the_tokens_of_their_data_set_alone(tmp_path, rule):
    table = together(tmp_path, **rule)
    excludes = rule.get("exclude_prompt", False)
    first = 0
    for source, own in zip(SOURCES, PROMPTS, strict=True):
        alone = table_of(source, tmp_path, own=own, **rule)
        rows = np.arange(len(source))[::-1]
        for side in SIDES:
            found, wanted = table.side(side, first + rows), alone.side(side, rows)
            if excludes and not getattr(own, side):
                wanted["prompt_length"] = np.zeros(len(rows), np.int32)
            assert found.keys() == wanted.keys()
            for name in wanted:
                np.testing.assert_array_equal(found[name], wanted[name])
                assert found[name].dtype == wanted[name].dtype
        first += len(source)
    assert first == table.num_rows


def test_a_batch_of_all_data_sets_has_each_row_s_prompt_length(tmp_path):
    inputs = together(tmp_path, exclude_prompt=True).side("query", np.array([8, 4, 0, 5]))
    # <s> and the tokens of "a query :", of an empty prompt, and of "query :".
    assert inputs["prompt_length"].tolist() == [1 + 3, 0, 1 + 2, 0]
    assert inputs["length"].tolist() == [1 + 3 + 1 + 1, 1 + 2 + 1, 1 + 2 + 3 + 1, 1 + 1 + 1]


def test_equal_texts_are_found_whatever_their_prompts(tmp_path):
    text = together(tmp_path).text
    assert text[0] == text[7]  # "a b c" in different data sets
    assert text[2] == text[4]  # "c a", without a prompt in the second
    assert text[3] == text[8]  # "b"
    assert len({text[row] for row in (1, 5, 6)}) == 3
    without = table_of(ConcatenatedPairs(SOURCES), tmp_path, own=SidePrompts())
    np.testing.assert_array_equal(text, without.text)


def test_the_tokens_of_a_prompt_are_compared_where_it_runs_into_the_text(tmp_path):
    """Given the prompt "a", the unknown words in "ac b" and "az b" are not a prompt before "b"."""
    pairs = ConcatenatedPairs([InMemoryPairs(["c b", " b", "z b"], ["a", "b", "c"]), SOURCES[1]])
    prompts = RowPrompts(("x", "y"), np.array([3, 5]), {"query": ("a", ""), "key": ("", "")})
    table = table_of(pairs, tmp_path, prompts=prompts)
    inputs = table.side("query", np.arange(3))
    unknown = word_tokenizer().token_to_id("<unk>")
    assert inputs["tokens"][:, 1:3].tolist() == [[unknown, B], [A, B], [unknown, B]]
    assert table.text[0] == table.text[2] != table.text[1]


def test_prompts_name_the_table(tmp_path):
    together(tmp_path)
    together(tmp_path)
    source = ConcatenatedPairs(SOURCES)
    table_of(source, tmp_path)
    prompts = row_prompts(settings(), "train", source)
    assert prompts is not None
    table_of(source, tmp_path, prompts=prompts._replace(ends=np.array([3, 6, 9])))
    assert len(list(tmp_path.iterdir())) == 3


def test_equal_prompts_are_those_of_the_run():
    data = settings()
    source = ConcatenatedPairs(SOURCES)
    same = dict.fromkeys(data.concatenated, DataSet("x", {"train": "train"}))
    assert row_prompts(data._replace(concatenated=same), "train", source) is None
    named = {"b": same["b"]._replace(prompts=SidePrompts("query: ", ""))}
    assert row_prompts(data._replace(concatenated=named), "train", source) is None
    assert row_prompts(data, "validation", SOURCES[0]) is None


def test_data_sets_are_in_the_order_of_their_names():
    data = settings(names=("z", "b"))
    found = row_prompts(data, "train", ConcatenatedPairs([SOURCES[0], SOURCES[2], SOURCES[1]]))
    assert found is not None
    assert found.settings == tuple(
        f"data{name}.prompts" for name in ("", ".concatenated.b", ".concatenated.z")
    )
    assert found.ends.tolist() == [4, 7, 9]
    assert found.prompts == {"query": ("query: ", "a query: ", ""), "key": ("", "b ", "c: ")}
    assert found.apply(data, 1).prompts == SidePrompts("a query: ", "b ")
    assert found.data_set(np.array([8, 0, 3, 4, 6, 7])).tolist() == [2, 0, 0, 1, 1, 2]


def test_texts_of_a_ragged_table_have_the_prompts_of_their_rows():
    prompts = RowPrompts(("x", "y"), np.array([2, 4]), {"key": ("", "k: ")})
    offsets = np.array([0, 3, 3, 5, 9])
    assert prompts.spread(offsets).ends.tolist() == [3, 9]


def test_the_spec_and_random_inputs_fit_the_table(tmp_path):
    word_tokenizer().save(str(tmp_path / "tokenizer.json"))
    for own in (SidePrompts(), PROMPTS[0]):
        data = settings(exclude_prompt=True, prompts=own, vocabulary_size=300)
        source = ConcatenatedPairs(SOURCES)
        [table] = open_tables(
            data, {"validation": source}, data_dir=tmp_path, workdir=tmp_path
        ).values()
        assert "prompt_length" not in table.spec("key")  # validation has one data set
        data = data._replace(tokenizer=str(tmp_path / "tokenizer.json"))
        [table] = open_tables(data, {"train": source}, data_dir=tmp_path, workdir=tmp_path).values()
        text = MODALITIES["text"]
        for side in SIDES:
            inputs = table.side(side, np.arange(9))
            assert "prompt_length" in inputs
            random = text.random_inputs(data, side, np.random.default_rng(0), 9)
            for spec in (text.spec(data, side), table.spec(side)):
                assert spec.keys() == inputs.keys() == random.keys()
        assert text_rule(data, "query").prompt == (own.query or "")


def test_a_prompt_without_room_names_its_setting(tmp_path):
    data = settings(names=("b", "c"))
    data = data._replace(max_tokens=MaxTokens(query=5, key=6))
    source = ConcatenatedPairs(SOURCES)
    prompts = row_prompts(data, "train", source)
    rules = {side: TextRule(5, special_tokens=True) for side in SIDES}
    with pytest.raises(
        ValueError,
        match=r"data\.concatenated\.c\.prompts\.query: max_tokens=5 leaves no room .*at least 6",
    ):
        build_token_table(
            source, word_tokenizer(), rules=rules, prompts=prompts, directory=tmp_path
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("num_processes", [1, 2])
def test_the_parts_of_all_processes_make_up_a_mixed_batch(tmp_path, monkeypatch, num_processes):
    table, source = together(tmp_path, exclude_prompt=True), ConcatenatedPairs(SOURCES)
    rows_of = SourcedRows(source.data_set_of_row, batch_size=4, seed=0, temperature=2.0)
    batches = _LocalBatches(table, rows_of, 5)
    for step in range(5):
        parts = []
        for process in range(num_processes):
            monkeypatch.setattr(jax, "process_count", lambda: num_processes)
            monkeypatch.setattr(jax, "process_index", lambda process=process: process)
            parts.append(batches[step])
        whole = jax.tree.map(lambda *rows: np.concatenate(rows), *parts)
        wanted = table_batch(table, rows_of(step))
        assert jax.tree.structure(whole) == jax.tree.structure(wanted)
        jax.tree.map(np.testing.assert_array_equal, whole, wanted)


# Settings

WIKI = {"name": "wiki:1.0.0", "splits": {"train": "train"}, "group_field": "topic"}


def read(**changes):
    config = get_config("smoke").to_dict()
    config["data"]["concatenated"] = {"wiki": WIKI | changes.pop("wiki", {})}
    config["data"] |= changes
    return read_settings({"data": config["data"]}).data


def test_a_data_set_has_the_run_s_prompts_by_default():
    assert read().concatenated["wiki"].prompts == SidePrompts(None, None)
    given = read(wiki={"prompts": {"query": "wiki: "}}).concatenated["wiki"].prompts
    assert given == SidePrompts("wiki: ", None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wiki": {"prompts": "wiki: "}}, r"wiki\.prompts='wiki: '; set it to a ConfigDict with"),
        ({"wiki": {"prompts": {"queries": ""}}}, r"prompts\.queries is unknown .*'query'"),
        ({"wiki": {"prompts": {"query": 3}}}, r"wiki\.prompts\.query=3; set it to a text"),
        (
            {"wiki": {"prompts": {"query": "query"}}},
            "the name of the run's own prompt; write the prompt out, such as 'query: '",
        ),
        (
            {"wiki": {"prompts": {"key": ""}}, "modality": {"query": "text", "key": "number"}},
            r"wiki\.prompts\.key='' has no effect: data\.modality\.key='number'",
        ),
    ],
)
def test_invalid_prompts_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        read(**changes)


@pytest.mark.parametrize("side", SIDES)
def test_only_texts_have_prompts(side):
    field = f"data.prompts.{side}"
    texts = read_settings({"data": {"prompts": {side: "a"}}}, changed=[field])
    numbers = texts.data._replace(modality=texts.data.modality._replace(**{side: "number"}))
    with pytest.raises(ValueError, match=rf"{field} has no effect here: data\.modality\.{side}="):
        check_effects(texts._replace(data=numbers), [field])


def test_prompts_of_a_data_set_have_no_effect_on_other_models():
    config = get_config("smoke")
    with config.unlocked():
        config.data.concatenated = {"wiki": WIKI | {"prompts": {"query": "wiki: "}}}
    field = "data.concatenated.wiki.prompts.query"
    assert read_data_settings(config, changed=["data.concatenated.wiki.name"]).data.concatenated
    with pytest.raises(ValueError, match=rf"{field} has no effect here"):
        read_data_settings(config, changed=[field])


@pytest.mark.parametrize(
    ("group_field", "by", "wanted"),
    [
        ("group", None, "group"),
        (None, None, "data_set"),
        ("group", "data_set", "data_set"),
        (None, "topic", "topic"),
    ],
)
def test_rows_without_groups_are_sourced_by_data_set(group_field, by, wanted):
    data = settings(group_field=group_field)
    assignment = AssignmentSettings("sourced", SourcedSettings(by=by))
    assert sources_by(Settings(data=data, assignment=assignment)) == wanted
    alone = Settings(data=data._replace(concatenated={}), assignment=assignment)
    assert sources_by(alone) == (by or "group")
