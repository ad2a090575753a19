"""The folder of a pretrained encoder decides the settings that a config leaves open."""

import json
import re
import shutil

import pytest

from jaxcl.configs import base, finetune
from jaxcl.settings.command_line import override
from jaxcl.settings.read import as_dict, read_settings
from tests.models.pretrained.tiny import WORDS, write_tiny_bert

SHORT = {"max_tokens": {"query": 8, "key": 12}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    prompts = {"query": "query : ", "document": "key : "}
    return write_tiny_bert(
        tmp_path_factory.mktemp("tiny"),
        library={"prompts": prompts},
        pooling={"include_prompt": False},
    )


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A folder with another tokenizer."""
    return write_tiny_bert(tmp_path_factory.mktemp("other"), words=(*WORDS, "another"))


def read(model, data=SHORT, **options):
    return read_settings({"model": model, "data": data}, **options)


def test_the_folder_fills_in_the_settings_that_a_config_leaves_open(folder):
    settings = read({"pretrained": str(folder)})
    assert settings.model.name == "pretrained"
    assert settings.model.dim == 16
    data = settings.data
    assert data.vocabulary_size == 4 + len(WORDS)
    assert data.prompts._asdict() == {"query": "query : ", "key": "key : "}
    assert (data.special_tokens, data.exclude_prompt, data.skip_unknown) == (True, True, False)
    assert settings.parts.pretrained["model"].family == "bert"


def test_recorded_settings_are_read_back_unchanged(folder):
    recorded = as_dict(read({"pretrained": str(folder)}))
    assert as_dict(read_settings(json.loads(json.dumps(recorded)))) == recorded


def test_settings_of_the_user_are_kept(folder):
    data = SHORT | {"prompts": {"query": ""}, "exclude_prompt": False, "special_tokens": False}
    settings = read({"pretrained": str(folder), "options": {"dropout": 0.2}}, data).data
    assert settings.prompts._asdict() == {"query": "", "key": "key : "}
    assert (settings.special_tokens, settings.exclude_prompt) == (False, False)


def test_untouched_defaults_never_contradict_a_folder(folder):
    config = base.get_config()
    for field, value in {"model.pretrained": folder, "data.max_tokens.key": 24}.items():
        override(config, field, str(value))
    with pytest.raises(ValueError, match=r"data\.max_tokens\.query=32"):
        read_settings(config)
    override(config, "data.max_tokens.query", "24")
    assert read_settings(config, changed=("data.max_tokens.query",)).model.dim == 16


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model.dim", "32", "model.dim=32, but the model of model.pretrained needs 16"),
        ("data.vocabulary_size", "99", "data.vocabulary_size=99, but the model of"),
        ("data.add_cls", "true", "data.add_cls=True, but the model of"),
        ("data.distinct_tokens", "true", "data.distinct_tokens=True, but the model of"),
        ("data.tokenizer", "mine.json", "data.tokenizer='mine.json', but the model of"),
        # The default value, but set by the user.
        ("model.dim", "512", "model.dim=512, but the model of model.pretrained needs 16"),
        (
            "data.max_tokens.key",
            "25",
            "data.max_tokens.key=25, but the model of model.pretrained reads at most 24",
        ),
        ("model.options.num_layers", "3", "model.options.num_layers is unknown to 'pretrained'"),
        ("model.name", "static", "the encoder 'static' cannot be loaded from a file"),
        ("model.key.pretrained", "other", "set model.shared=False, or leave"),
        ("init_from", "run", "init_from='run' brings its own weights"),
    ],
)
def test_a_setting_that_contradicts_the_folder_is_an_error(folder, field, value, message):
    config = base.get_config()
    config.data.max_tokens.update(SHORT["max_tokens"])
    config.model.pretrained = str(folder)
    override(config, field, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_settings(config, changed=(field,))


def test_the_error_for_a_fine_tuning_config_without_a_folder_names_the_flag():
    with pytest.raises(ValueError, match=r"--config\.model\.pretrained=FOLDER"):
        read_settings(finetune.get_config())


def test_the_default_is_the_static_encoder():
    assert read_settings(base.get_config()).model.name == "static"


def test_both_towers_may_be_copies_of_one_folder(folder):
    settings = read({"pretrained": str(folder), "shared": False})
    assert settings.model.key.name is None
    assert [*settings.parts.pretrained] == ["model"]


def test_two_folders_need_equal_tokenizers(folder, other, tmp_path):
    def pair(key):
        model = {"pretrained": str(folder), "shared": False, "key": {"pretrained": str(key)}}
        return read(model, SHORT | {"exclude_prompt": False})

    with pytest.raises(ValueError, match="have different tokenizers"):
        pair(other)
    same = shutil.copytree(folder, tmp_path / "same")
    tokenizer = json.loads((same / "tokenizer.json").read_text())
    (same / "tokenizer.json").write_text(json.dumps(tokenizer | {"truncation": None}))
    settings = pair(same)
    assert settings.model.key.name == "pretrained"
    assert [*settings.parts.pretrained] == ["model", "model.key"]


def test_two_folders_need_the_same_width_and_prompt_pooling(folder, tmp_path):
    narrow = write_tiny_bert(tmp_path / "narrow", dim=8)
    model = {"pretrained": str(folder), "shared": False, "key": {"pretrained": str(narrow)}}
    with pytest.raises(ValueError, match=r"width 16, but model\.key\.pretrained of width 8"):
        read(model)
    whole = write_tiny_bert(tmp_path / "whole")
    model = {"pretrained": str(folder), "shared": False, "key": {"pretrained": str(whole)}}
    with pytest.raises(ValueError, match=r"set data\.exclude_prompt"):
        read(model)


def test_a_pretrained_encoder_may_be_used_for_one_side_only(folder):
    model = {"name": "static", "shared": False, "key": {"pretrained": str(folder)}}
    settings = read(model)
    assert (settings.model.name, settings.model.key.name) == ("static", "pretrained")
    assert settings.model.dim == 16
    assert settings.data.prompts._asdict() == {"query": None, "key": "key : "}


def test_a_run_that_has_begun_reads_its_copy_and_not_the_folder(folder, tmp_path):
    config = {"model": {"pretrained": str(tmp_path / "gone")}, "data": SHORT}
    with pytest.raises(OSError, match="gone"):
        read_settings(config)
    shutil.copytree(folder, tmp_path / "workdir" / "pretrained")
    settings = read_settings(config, workdir=tmp_path / "workdir")
    assert settings.parts.pretrained["model"].path == tmp_path / "workdir" / "pretrained"


def test_nothing_outside_an_untrusted_workdir_is_read(folder, tmp_path):
    recorded = as_dict(read({"pretrained": str(folder)}))
    with pytest.raises(ValueError, match=r"has no folder pretrained .* restore it from a copy"):
        read_settings(recorded, trust=(), workdir=tmp_path)
    origin = tmp_path / "origin"
    shutil.copytree(folder, origin / "pretrained")
    recorded["model"]["pretrained"] = None
    with pytest.raises(ValueError, match="restore it from a copy"):
        read_settings(recorded | {"init_from": str(origin)}, trust=(), workdir=tmp_path)
    shutil.copytree(folder, tmp_path / "pretrained")
    settings = read_settings(recorded | {"init_from": "origin"}, trust=(), workdir=tmp_path)
    assert settings.parts.pretrained["model"].path == tmp_path / "pretrained"


def test_a_copy_that_leads_out_of_the_workdir_is_not_read(folder, tmp_path):
    (tmp_path / "pretrained").symlink_to(folder)
    recorded = as_dict(read({"pretrained": str(folder)}))
    for trust in ((), None):
        with pytest.raises(ValueError, match="pretrained is a link, which may lead out"):
            read_settings(recorded, trust=trust, workdir=tmp_path)


def test_a_run_that_starts_from_a_fine_tuned_one_has_its_encoder(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "pretrained")
    step = tmp_path / "checkpoints" / "5"
    for init_from in (tmp_path, step):
        settings = read_settings({"init_from": str(init_from), "data": SHORT})
        assert settings.model.name == "pretrained"
        assert settings.parts.pretrained["model"].path == tmp_path / "pretrained"


def test_a_run_has_the_prompts_of_the_run_that_it_starts_from(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "pretrained")
    trained = read({"pretrained": str(folder)}, SHORT | {"prompts": {"query": "file read "}})
    (tmp_path / "config.json").write_text(json.dumps(as_dict(trained)))
    config = {"init_from": str(tmp_path), "data": SHORT}
    assert read_settings(config).data.prompts._asdict() == {"query": "file read ", "key": "key : "}
    own = config | {"data": SHORT | {"prompts": {"query": ""}, "exclude_prompt": False}}
    settings = read_settings(own)
    assert settings.data.prompts._asdict() == {"query": "", "key": "key : "}
    assert settings.data.exclude_prompt is False
    # The new run still has them after the other run is deleted.
    resumed = config | {"init_from": "gone"}
    assert read_settings(resumed, workdir=tmp_path).data == read_settings(config).data
