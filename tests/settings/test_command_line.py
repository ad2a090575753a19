"""Values of a config from the command line."""

import pytest
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jaxcl.host.command_flags import CommandParser
from jaxcl.settings.command_line import (
    add_config_flags,
    changed_fields,
    config_of,
    override,
    parse_value,
)
from jaxcl.settings.config_files import load_config, read_settings_file


@pytest.fixture
def config() -> ConfigDict:
    """A field of each type."""
    made = ConfigDict(
        {
            "flag": True,
            "count": 3,
            "rate": 0.5,
            "name": "adam",
            "methods": ("bm25", "dense"),
            "sizes": [1, 2],
            "anything": None,
            "model": {"dim": 512, "options": {"dropout": 0.1}},
        }
    )
    made.limit = placeholder(int)
    made.pair = placeholder(tuple)
    return made.lock()


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("flag", "False", False),
        ("flag", "false", False),
        ("flag", "1", True),
        ("count", "-7", -7),
        ("count", "1_000", 1_000),
        ("rate", "2", 2.0),
        ("rate", "1e-30", 1e-30),
        ("rate", "inf", float("inf")),
        ("name", "lion", "lion"),
        ("name", "7", "7"),
        ("name", "", ""),
        ("name", "a=b", "a=b"),
        ("methods", "('dense',)", ("dense",)),
        ("methods", "['dense', 'bm25']", ("dense", "bm25")),
        ("methods", "dense", ("dense",)),
        ("methods", "dense,hybrid", ("dense", "hybrid")),
        ("methods", "()", ()),
        ("sizes", "3,4", [3, 4]),
        ("sizes", "5", [5]),
        ("anything", "4", 4),
        ("anything", "four", "four"),
        ("limit", "9", 9),
        ("limit", "None", None),
        ("pair", "(1, 2)", (1, 2)),
        ("model.dim", "64", 64),
        ("model.options.dropout", "0", 0.0),
    ],
)
def test_a_text_is_read_as_the_type_of_the_field(config, field, text, value):
    override(config, field, text)
    section, _, leaf = field.rpartition(".")
    found = (config[section] if section else config)[leaf]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("flag", "maybe", "--config.flag=maybe: give true or false"),
        ("count", "many", "--config.count=many: give an integer"),
        ("count", "2.5", "--config.count=2.5: give an integer"),
        ("limit", "x", "--config.limit=x: give an integer"),
        ("rate", "fast", "--config.rate=fast: give a number"),
        ("methods", "('dense'", "give a Python literal"),
        ("cuont", "3", "no such field as cuont (did you mean 'count'?); a config has "),
        ("model.dimm", "3", "no such field as dimm (did you mean 'dim'?); model has dim, options"),
        ("modle.dim", "3", "no such field as modle (did you mean 'model'?)"),
        ("model", "3", "model is a section; set one of dim, options"),
        ("count.size", "3", "count is a value without fields"),
        ("", "3", "there is no such field as "),
        ("model.", "3", "there is no such field as "),
    ],
)
def test_a_wrong_field_or_value_is_named_and_changes_nothing(config, field, text, message):
    before = config.copy_and_resolve_references()
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
        override(config, field, text)
    assert message in str(caught.value)
    assert config.copy_and_resolve_references() == before


def test_evaluation_sets_are_named_on_the_command_line():
    config = load_config("code_search:smoke")
    override(config, "evaluation.sets.dev", "sts-dev.csv")
    override(config, "evaluation.sets.dev", "other.csv")
    override(config, "evaluation.sets.nano", "nano")
    assert config.evaluation.sets.to_dict() == {"dev": "other.csv", "nano": "nano"}
    for field in ("evaluation.sets.nano.deeper", "evaluation.set.dev", "loss.sets.dev"):
        with pytest.raises(ValueError, match=f"--config.{field}=x: "):
            override(config, field, "x")
    with pytest.raises(ValueError, match="there is no such field as evaluation"):
        override(ConfigDict({"steps": 3}), "evaluation.sets.dev", "x")


def test_a_value_may_be_of_another_type():
    assert parse_value("{'data': 3}", dict) == {"data": 3}
    with pytest.raises(ValueError, match="give a dict"):
        parse_value("3", dict)


@pytest.mark.parametrize("named", ["code_search:smoke", "configs/code_search.py:smoke"])
def test_a_config_is_found_by_name_and_by_path(named):
    assert load_config(named).steps == 20


def test_later_values_win_and_all_changed_fields_are_named():
    parser = CommandParser("jaxcl.train", "Trains.")
    add_config_flags(parser)
    flags = ["--config.steps=5", "--config", "code_search:smoke", "--config.model.dim", "8"]
    arguments = parser.parse([*flags, "--config.steps=6"])
    config = config_of(arguments)
    assert (config.steps, config.model.dim) == (6, 8)
    assert changed_fields(arguments) == ("steps", "model.dim", "steps")


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("def get_config(): return 1 / 0", "ZeroDivisionError: division by zero"),
        (
            "def get_config(: pass",
            "mine.py cannot be read as Python, ",
        ),
        ("steps: 3\nmodel:\n  dim: 8", "cannot be read as Python"),
        ("import ast; ast.literal_eval('1 +')", "the config cannot be used: "),
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("def get_config(): return {}", "does not return a ConfigDict"),
        ("config = 3", "has no function get_config"),
        ("def get_config(): raise ValueError('no variant')", "mine.py: no variant"),
    ],
)
def test_a_config_file_that_fails_is_an_error_with_its_reason(tmp_path, program, message):
    file = tmp_path / "mine.py"
    file.write_text(program)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
        load_config(str(file))
    assert message in str(caught.value)
    assert "mine.py" in str(caught.value)


def test_a_file_of_settings_without_its_function_is_an_error(tmp_path):
    (tmp_path / "mine.py").write_text("settings = 3")
    with pytest.raises(ValueError, match=r"mine\.py has no function get_settings"):
        read_settings_file(str(tmp_path / "mine.py"))


def test_a_config_that_does_not_exist_is_an_error_with_a_suggestion():
    with pytest.raises(ValueError, match=r"no such file as .*\(did you mean 'code_search'\?\)"):
        load_config("code_serch")
