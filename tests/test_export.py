"""Exported folders give the run's embeddings, are complete or absent, and have a model card."""

import ast
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from jaxcl import export
from jaxcl.data.tokenizer import train_tokenizer
from jaxcl.models.pretrained.tensor_files import map_tensors
from jaxcl.run import model_files
from jaxcl.run.exported import open_exported
from jaxcl.run.model_card import model_card
from jaxcl.run.opened import OpenedRun, open_run
from jaxcl.run.sentence_transformers import sentence_transformers_files
from jaxcl.settings.read import read_settings
from tests.helpers import relative_error
from tests.models.pretrained.tiny import write_tiny_bert, write_tiny_static
from tests.saved_run import EXPORTED, TEXTS, TUNED, save_run, save_tuned_run, settings_of


@pytest.fixture(scope="module")
def static_run(tmp_path_factory) -> Path:
    return save_run(tmp_path_factory.mktemp("static") / "run")


def static_embeddings(folder: Path, texts) -> np.ndarray:
    """Compute embeddings as sentence-transformers does with `StaticEmbedding` and `Normalize`."""
    modules = json.loads((folder / "modules.json").read_text())
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    assert kinds == ["StaticEmbedding", "Normalize"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    (table,) = load_file(folder / "model.safetensors").values()
    rows = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    means = np.array([table[ids].mean(0) if ids else np.zeros(table.shape[1]) for ids in rows])
    return means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)


@pytest.mark.parametrize("hidden_dim", [None, 9])
def test_a_static_folder_gives_the_run_s_embeddings(tmp_path, hidden_dim):
    workdir = save_run(tmp_path / "run", model__options=EXPORTED | {"hidden_dim": hidden_dim})
    folder = export.export(workdir, tmp_path / "models" / "static")
    wanted = open_run(workdir).encoder.encode("query", TEXTS)
    found = static_embeddings(folder, TEXTS)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert np.abs(static_embeddings(folder, TEXTS[::-1]) - wanted).max() > 0.1


def test_a_static_folder_truncates_texts_at_the_larger_limit(tmp_path):
    workdir = save_run(tmp_path / "run", data__max_tokens={"query": 3, "key": 5})
    folder = export.export(workdir, tmp_path / "static")
    encoder = open_run(workdir).encoder
    long, short = ["a date, a window, a text, a date"], ["a date"]
    np.testing.assert_allclose(
        static_embeddings(folder, long), encoder.encode("key", long), atol=1e-6
    )
    assert np.abs(static_embeddings(folder, long) - encoder.encode("query", long)).max() > 1e-3
    np.testing.assert_allclose(
        static_embeddings(folder, short), encoder.encode("query", short), atol=1e-6
    )


def test_a_text_without_tokens_is_zero_when_exported_and_unknown_in_jaxcl(static_run, tmp_path):
    folder = export.export(static_run, tmp_path / "static")
    assert not static_embeddings(folder, ["", " _ "]).any()
    vectors = open_run(static_run).encoder.encode("query", ["", " _ ", "漢"])
    np.testing.assert_array_equal(vectors[:2], vectors[[2, 2]])


@pytest.mark.parametrize("skip_unknown", [False, True])
def test_a_static_folder_keeps_the_special_tokens_of_a_pretrained_tokenizer(tmp_path, skip_unknown):
    changes = {"data__special_tokens": False, "data__skip_unknown": skip_unknown}
    workdir = save_run(tmp_path / "run", **changes)
    folder = export.export(workdir, tmp_path / "static")
    texts = ["[PAD]", "a [UNK] date", ""]
    wanted = open_run(workdir).encoder.encode("query", texts)
    np.testing.assert_allclose(static_embeddings(folder, texts), wanted, atol=1e-6)
    (table,) = load_file(folder / "model.safetensors").values()
    assert table[0].any()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model__options": {}}, "position weights"),
        ({"model__shared": False}, r"model\.shared=False"),
        ({"model__name": "decoder", "model__options": {}}, "no encoder like model.name='decoder'"),
        ({"data__distinct_tokens": True}, r"data\.distinct_tokens=True"),
        ({"data__add_cls": True}, r"data\.add_cls=True"),
    ],
)
def test_a_model_without_an_equivalent_is_refused_with_the_reason(tmp_path, changes, reason):
    run = OpenedRun(tmp_path, settings_of(**changes), encoder=None, data_set="", made_from={})
    with pytest.raises(ValueError, match=rf"no equivalent in .*{reason}.*--format jaxcl"):
        sentence_transformers_files(run)


@pytest.mark.parametrize(
    ("write", "changes", "reason"),
    [
        (
            write_tiny_bert,
            {"special_tokens": False},
            r"data\.special_tokens=False differs from its",
        ),
        (write_tiny_bert, {"skip_unknown": True}, r"data\.skip_unknown=True differs from its bert"),
        (
            write_tiny_static,
            {"exclude_prompt": True, "prompts": {"key": "key : "}},
            r"data\.exclude_prompt=True leaves prompts out of the mean",
        ),
    ],
)
def test_texts_that_the_folder_reads_otherwise_are_a_reason(tmp_path, write, changes, reason):
    data = {"name": "pairs", "max_tokens": {"query": 12, "key": 12}, **changes}
    settings = read_settings({"data": data, "model": {"pretrained": str(write(tmp_path / "tiny"))}})
    run = OpenedRun(tmp_path, settings, encoder=None, data_set="", made_from={})
    with pytest.raises(ValueError, match=rf"no equivalent in .*{reason}.*--format jaxcl"):
        sentence_transformers_files(run)


def test_a_refused_export_leaves_nothing(tmp_path):
    workdir = save_run(tmp_path / "run", data__add_cls=True)
    with pytest.raises(ValueError, match="no equivalent"):
        export.export(workdir, tmp_path / "models" / "static")
    assert list(tmp_path.iterdir()) == [workdir]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__shared": False, "data__add_cls": True, "data__distinct_tokens": True},
        {"model__options": {"hidden_dim": 9}},
    ],
)
def test_a_jaxcl_folder_gives_the_run_s_parameters_and_embeddings_bitwise(tmp_path, changes):
    workdir = save_run(tmp_path / "run", **changes)
    folder = export.export(workdir, tmp_path / "model", format="jaxcl")
    run, model = open_run(workdir), open_exported(folder)
    assert jax.tree.structure(model.encoder.params) == jax.tree.structure(run.encoder.params)
    jax.tree.map(np.testing.assert_array_equal, model.encoder.params, run.encoder.params)
    for side in ("query", "key"):
        found, wanted = (one.encoder.encode(side, TEXTS) for one in (model, run))
        assert found.tobytes() == wanted.tobytes()
    assert model.step == 7
    assert model.settings.model == run.settings.model


def test_the_exported_folder_needs_no_run_and_no_other_file(static_run, tmp_path):
    first = export.export(static_run, tmp_path / "first", format="jaxcl")
    moved = first.rename(tmp_path / "moved")
    assert {path.name for path in moved.iterdir()} == {
        "README.md",
        "jaxcl.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert open_exported(moved).encoder.encode("key", TEXTS).shape == (4, 6)


@pytest.mark.parametrize("format", ["sentence-transformers", "jaxcl"])
def test_a_model_exported_twice_gives_the_same_files(static_run, tmp_path, format):
    folders = [
        export.export(static_run, tmp_path / parent / "model", format=format) for parent in "ab"
    ]
    first, second = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*")}
        for folder in folders
    )
    assert first == second


def test_an_empty_folder_is_filled_and_another_one_left_alone(static_run, tmp_path):
    (tmp_path / "empty").mkdir()
    export.export(static_run, tmp_path / "empty")
    assert (tmp_path / "empty" / "modules.json").exists()
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "file").write_text("mine")
    for taken in ("empty", "file"):
        with pytest.raises(FileExistsError, match="give another folder"):
            export.export(static_run, tmp_path / taken)
    assert sorted(tmp_path.rglob("*")) == [*before, tmp_path / "file"]


def test_an_interrupted_export_leaves_nothing(static_run, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(model_files, "write_tensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export.export(static_run, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_format_and_a_folder_without_a_run_are_errors(static_run, tmp_path):
    with pytest.raises(ValueError, match="format='onnx' is unknown; use one of sentence-transf"):
        export.export(static_run, tmp_path / "model", format="onnx")
    with pytest.raises(ValueError, match="there is no run in"):
        export.export(tmp_path / "absent", tmp_path / "model")
    with pytest.raises(ValueError, match=r"no model exported for jaxcl \(no jaxcl.json\)"):
        open_exported(static_run)


@pytest.mark.parametrize("format", ["sentence-transformers", "jaxcl"])
@pytest.mark.parametrize("dtype", export.DTYPES)
def test_parameters_are_written_in_the_requested_type(static_run, tmp_path, format, dtype):
    folder = export.export(static_run, tmp_path / "model", format=format, dtype=dtype)
    tensors = map_tensors(folder / "model.safetensors")
    assert {tensor.dtype.name for tensor in tensors.values()} == {dtype}
    wanted = open_run(static_run).encoder.encode("key", TEXTS)
    if format == "jaxcl":
        found = open_exported(folder).encoder.encode("key", TEXTS)
        assert relative_error(found, wanted) < 0.02  # bfloat16 has 8 bits
        assert (relative_error(found, wanted) == 0) == (dtype == "float32")


def test_a_type_that_cannot_hold_the_parameters_is_an_error(static_run, tmp_path):
    with pytest.raises(ValueError, match="dtype='int8' is unknown; use one of float32, bfloat16"):
        export.export(static_run, tmp_path / "model", dtype="int8")
    large = {"model.safetensors": {"table": np.array([1.0, 7e4], np.float32)}}
    with pytest.raises(ValueError, match=r"dtype=float16 cannot hold table, .* 70000; use b"):
        model_files.with_dtype(large, np.dtype(np.float16))


def damaged(folder: Path, damage: str) -> str:
    """Damage an exported folder, and return the pattern of the error message."""
    description = json.loads((folder / "jaxcl.json").read_text())
    if damage == "tokenizer":
        other = train_tokenizer(["another text"], vocabulary_size=40)
        (folder / "tokenizer.json").write_text(other.to_str())
        return "tokenizer.json in .* has changed"
    if damage == "format":
        description["format"] = 2
    elif damage in ("step", "pretrained"):
        del description[damage]
    else:
        description["settings"]["model"]["dim"] = 5
    (folder / "jaxcl.json").write_text(json.dumps(description))
    messages = {"format": "has the format 2"} | {
        name: f"damaged .it lacks {name}" for name in ("step", "pretrained")
    }
    return messages.get(
        damage, r"both/table is \(120, 6\) in the file but \(120, 5\) in the encoder"
    )


@pytest.mark.parametrize("damage", ["tokenizer", "format", "step", "pretrained", "dim"])
def test_files_that_do_not_match_are_an_error(static_run, tmp_path, damage):
    folder = export.export(static_run, tmp_path / "model", format="jaxcl")
    message = damaged(folder, damage)
    with pytest.raises(ValueError, match=message):
        open_exported(folder)


def test_an_opened_folder_does_not_share_memory_with_its_file(static_run, tmp_path):
    folder = export.export(static_run, tmp_path / "model", format="jaxcl")
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    begin = -(-(8 + length) // 64) * 64  # JAX would use memory of this alignment without a copy
    header = content[8 : 8 + length].ljust(begin - 8)
    path.write_bytes((begin - 8).to_bytes(8, "little") + header + content[8 + length :])
    opened = open_exported(folder)
    before = jax.tree.map(np.array, opened.encoder.params)
    with open(path, "r+b") as file:
        file.seek(begin)
        file.write(b"\xff" * (path.stat().st_size - begin))
    jax.tree.map(np.testing.assert_array_equal, opened.encoder.params, before)


def test_the_command_exports_with_a_message(static_run, tmp_path, capsys):
    arguments = ["--workdir", str(static_run), "--to", str(tmp_path / "model")]
    export.main([*arguments, "--dtype", "bfloat16"])
    tensors = map_tensors(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype.name for tensor in tensors.values()} == {"bfloat16"}
    assert f"{tmp_path / 'model'} holds the model" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        export.main(arguments)
    assert stopped.value.code == 1
    assert "give another folder" in capsys.readouterr().err


def save_results(workdir: Path, **changes) -> None:
    """Write `results.json` as the evaluation at the end of training does."""

    def figure(mean, error):
        return {"mean": mean, "standard_error": error}

    results = {
        "steps": 7,
        "rows": {"train": 4321, "test": 98},
        "devices": "8 × cpu",
        "versions": {"jax": "0.10.2"},
        "metrics": {
            "test": {
                "plain": {
                    "dense": {"mrr@10": figure(0.5, 0.0249), "ndcg@10": figure(0.25, None)},
                    "dense - bm25": {"mrr@10": figure(-0.125, 0.02)},
                }
            }
        },
    }
    (workdir / "results.json").write_text(json.dumps(results | changes))


def card_of(workdir: Path, folder: Path, **options) -> tuple[dict, str]:
    """The metadata and the text of the model card of an exported folder."""
    export.export(workdir, folder, **options)
    _, metadata, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_the_card_lists_the_prompts_of_data_sets(tmp_path):
    others = {
        name: {"name": name, "splits": {"train": "train"}, "prompts": {"key": prompt}}
        for name, prompt in (("b", "b: "), ("a", None), ("c", ""))
    }
    workdir = save_run(tmp_path / "run", data__concatenated=others)
    _, text = card_of(workdir, tmp_path / "model")
    assert [line for line in text.splitlines() if "| Prompt of" in line] == [
        '| Prompt of keys in training rows of `b` | `"b: "` |'
    ]


def test_the_card_describes_the_run_and_its_results(tmp_path):
    workdir = save_run(tmp_path / "run", data__prompts={"query": "query: ", "key": None})
    save_results(workdir)
    metadata, text = card_of(workdir, tmp_path / "model")
    assert metadata["library_name"] == "sentence-transformers"
    assert metadata["pipeline_tag"] == "sentence-similarity"
    assert metadata["datasets"] == ["pairs"]
    assert {"sentence-transformers", "dataset_size:4321", "loss:infonce"} <= set(metadata["tags"])
    assert "base_model" not in metadata
    assert "license" not in metadata
    for line in (
        "# `model`",
        "| Dimensions | 6 |",
        '| Prompt of queries | `"query: "` |',
        "| `train` | 4,321 |",
        "The parameters are from step 7 of 7.",
        "| `global_batch_size` | `8` |",
        "| `model.options.position_weights` | `false` |",
        "| `test` | `plain` | `dense` | 98 | 0.500 ± 0.025 | 0.250 |  |  |",
        "| `test` | `plain` | `dense - bm25` | 98 | -0.125 ± 0.020 |  |  |  |",
        "model = SentenceTransformer('model')",
        "model = jaxcl.load('model')",
    ):
        assert f"\n{line}\n" in text, line
    assert "`loss.exchange`" not in text, "a default that says nothing"


def test_the_card_of_jaxcl_s_own_format_names_no_other_library(static_run, tmp_path):
    metadata, text = card_of(static_run, tmp_path / "model", format="jaxcl")
    assert metadata["library_name"] == "jaxcl"
    assert "sentence" not in text.lower()
    assert "model = jaxcl.load('model')" in text


@pytest.mark.parametrize("results", [None, {"steps": 6}])
def test_results_of_another_step_are_not_in_the_card(tmp_path, results):
    workdir = save_run(tmp_path / "run")
    if results is not None:
        save_results(workdir, **results)
    metadata, text = card_of(workdir, tmp_path / "model")
    assert "The run has no results for step 7." in text
    assert "0.500" not in text
    assert not any(tag.startswith("dataset_size") for tag in metadata["tags"])


HOSTILE = "a`b``|<script>\n---\n# [x](y)\n: {'q': \"1\"}\u202e\x85\ufffe\x00é"


def test_hostile_names_do_not_change_the_structure_of_the_card(tmp_path):
    name = HOSTILE.replace("[x]", "")  # brackets would be a glob pattern
    workdir = save_run(tmp_path / "run", data__name=name, data__query_field=HOSTILE)
    metadata, text = card_of(workdir, tmp_path / "a`|\n# b'\"{}")
    assert metadata["datasets"] == [re.split("[:/]", name)[0]]
    assert set(metadata) == {"library_name", "pipeline_tag", "datasets", "tags"}
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert [line.split()[1] for line in headings[1:]] == SECTIONS
    assert sum(line.strip() == "---" for line in text.splitlines()) == 0
    for line in text.splitlines():
        prose = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", line)  # without code spans
        assert "<script>" not in prose
        assert "[x](y)" not in prose
        assert not line.startswith("|") or prose.count("|") == line.count("|")
    for snippet in re.findall(r"```python\n(.*?)```\n", text, re.S):
        names = [
            node.value for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Constant)
        ]
        assert "a`|\n# b'\"{}" in names


SECTIONS = ["Usage", "Data", "Training", "Evaluation", "Limitations"]


@pytest.mark.parametrize(
    ("name", "shown", "data_set"),
    [
        ("/home/lovelace/pairs", "pairs", "pairs"),
        ("~/lovelace/pairs/1.0.0", "pairs/1.0.0", "pairs"),
        ("pairs:1.0.0", "pairs:1.0.0", "pairs"),
    ],
)
def test_the_card_names_the_data_and_not_the_folders_of_the_machine(
    tmp_path, name, shown, data_set
):
    workdir = save_run(tmp_path / "run", data__name=name)
    metadata, text = card_of(workdir, tmp_path / "model")
    assert metadata["datasets"] == [data_set]
    assert f'| `data.name` | `"{shown}"` |' in text
    assert "lovelace" not in text


def test_a_file_of_pairs_is_not_a_data_set_of_the_hub(tmp_path):
    workdir = save_run(tmp_path / "run", data__name="/home/lovelace/mine/pairs.jsonl")
    metadata, text = card_of(workdir, tmp_path / "model")
    assert "datasets" not in metadata
    assert "Pairs of a query and its key, from `pairs.jsonl`." in text
    assert "lovelace" not in text


@pytest.fixture(scope="module")
def tuned_run(tmp_path_factory) -> Path:
    """A run with the unchanged parameters of a tiny BERT that states its license."""
    folder = tmp_path_factory.mktemp("tuned")
    original = write_tiny_bert(folder / "tiny")
    (original / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# Tiny\n")
    return save_tuned_run(folder / "run", original)


def test_the_card_of_a_fine_tuned_model_names_its_origin(tuned_run, tmp_path):
    metadata, text = card_of(tuned_run, tmp_path / "model")
    assert metadata["license"] == "mit"
    assert "base_model" not in metadata, "a folder is no model of the Hub"
    assert "| Encoder | `bert`, from `tiny` |" in text
    assert "left these tensors" in text
    assert "`pooler.dense.bias`, `pooler.dense.weight`." in text
    assert "may have seen the held-out pairs" in text


def test_the_card_names_a_model_of_the_hub_or_the_run_that_training_began_with(tuned_run):
    settings = settings_of(TUNED, model__pretrained=str(tuned_run.with_name("tiny")))
    model, encoder = settings.model, open_run(tuned_run).encoder

    def card(**changes):
        changed = settings._replace(**changes)
        run = OpenedRun(tuned_run, changed, encoder=encoder, data_set="", made_from={"step": 7})
        return model_card(run, name="model", library="jaxcl")

    of_hub = card(model=model._replace(pretrained="org/tiny"))
    assert '\nbase_model: "org/tiny"\n' in of_hub
    assert "`bert`, from `org/tiny` |" in of_hub
    of_run = card(model=model._replace(pretrained=None), init_from="/home/lovelace/first")
    assert "base_model" not in of_run
    assert "`bert`, from `first` |" in of_run


def test_a_fine_tuned_model_is_exported_after_its_original_is_gone(tuned_run, tmp_path):
    workdir = Path(shutil.copytree(tuned_run, tmp_path / "run"))
    original = tuned_run.with_name("tiny")
    weights = load_file(original / "model.safetensors")
    moved = original.rename(tmp_path / "moved")
    try:
        folder = export.export(workdir, tmp_path / "model")
        own = export.export(workdir, tmp_path / "own", format="jaxcl")
        shutil.rmtree(workdir)
        model = open_exported(own)
    finally:
        moved.rename(original)
    found = load_file(folder / "model.safetensors")
    assert found.keys() == weights.keys()
    assert all(found[name].tobytes() == weights[name].tobytes() for name in weights)
    run = open_run(tuned_run)
    for side in ("query", "key"):
        vectors, wanted = (one.encoder.encode(side, TEXTS) for one in (model, run))
        assert vectors.tobytes() == wanted.tobytes()


@pytest.mark.slow
def test_two_pretrained_towers_are_exported_only_for_jaxcl(tmp_path):
    original = write_tiny_bert(tmp_path / "tiny")
    workdir = save_tuned_run(tmp_path / "run", original, model__shared=False)
    with pytest.raises(ValueError, match=r"separate encoders \(model\.shared=False\)"):
        export.export(workdir, tmp_path / "model")
    folder = export.export(workdir, tmp_path / "model", format="jaxcl")
    assert set(open_exported(folder).encoder.params) == {"query", "key"}


def test_a_changed_copy_of_the_pretrained_model_is_an_error(tuned_run, tmp_path):
    folder = export.export(tuned_run, tmp_path / "model", format="jaxcl")
    config = json.loads((folder / "pretrained" / "config.json").read_text())
    config["layer_norm_eps"] = 0.1
    (folder / "pretrained" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"pretrained in .*model has changed .* export the model"):
        open_exported(folder)
