"""Search finds planted functions, keeps its index current, and does not change the run."""

import functools
import json
import shutil
from importlib import util
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxcl import search
from jaxcl.data import splits
from jaxcl.data.code_pairs import prepare_code_pairs
from jaxcl.data.prepare import prepare_data
from jaxcl.data.python_functions import SourceRoot
from jaxcl.data.sources import InMemoryPairs
from jaxcl.data.tokenizer import train_tokenizer
from jaxcl.run import pool_index
from jaxcl.run.checkpoint import Checkpoints
from jaxcl.run.hits import _first_line
from jaxcl.run.pool_index import INDEX_FILE
from jaxcl.run.training import build_training
from jaxcl.run.workdir import claim_workdir, read_config
from jaxcl.settings.read import read_settings
from tests.helpers import record_of
from tests.small_models import small_model

VERBS, NOUNS = ("open", "close", "count", "merge"), ("socket", "ledger", "window", "matrix")
PLANTED = "Tell the phase of the moon on a given calendar day."
PLANTED_CODE = '''
@cached(
    size=3)
def moon_phase(day):
    """Tell the phase of the moon on a given calendar day."""
    cycle = 29.53
    return (day % cycle) / cycle
'''
NUM_FUNCTIONS = len(VERBS) * len(NOUNS) + 2


def _function(verb: str, noun: str) -> str:
    body = f"    handle = find({noun!r})\n    return handle.{verb}(force=True)\n"
    return f'def {verb}_{noun}(name):\n    """{verb} the {noun} of a name."""\n{body}'


def _module(verbs) -> str:
    return "\n\n".join(_function(verb, noun) for verb in verbs for noun in NOUNS)


def _config(data_set: Path, data_dir: Path) -> ConfigDict:
    path = Path(__file__).parents[1] / "configs" / "code_search.py"
    spec = util.spec_from_file_location("code_search_config", path)
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("smoke")
    config.data.name = str(data_set)
    config.data.splits = ConfigDict({"train": "train", "test": "test"})
    config.data.vocabulary_size = 256
    config.model.dim = 64
    config.evaluation.batch_size = 8  # a size that does not divide the pool
    config.run.data_dir = str(data_dir)
    return config


def _save(workdir: Path, step: int, *, seed: int) -> None:
    settings = read_settings(read_config(workdir))._replace(seed=seed)
    state = build_training(settings).init()
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(step, state, record_of(workdir))


def _save_again(workdir: Path) -> None:
    """Make the run look as if it had started with the current `config.json` and `data.json`."""
    shutil.rmtree(workdir / "checkpoints")
    _save(workdir, 1, seed=1)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> Path:
    """The workdir of a run with data and without a checkpoint."""
    folder = tmp_path_factory.mktemp("search")
    for package, code in {
        "tools": _module(VERBS[:2]) + PLANTED_CODE,
        "more": _module(VERBS[2:]) + PLANTED_CODE.replace("moon", "tide").replace("29", "12"),
    }.items():
        (folder / "site" / package).mkdir(parents=True)
        (folder / "site" / package / "__init__.py").write_text(code)
    pairs = prepare_code_pairs(
        folder / "data",
        roots=[SourceRoot(folder / "site")],
        test_packages=["more"],
        validation_fraction=0.0,
    )
    assert sum(pairs.split_sizes.values()) == NUM_FUNCTIONS
    config, workdir = _config(pairs.directory, folder / "data"), folder / "workdir"
    claim_workdir(workdir, read_settings(config))
    prepare_data(read_settings(config).data, data_dir=folder / "data", workdir=workdir)
    return workdir


@pytest.fixture(scope="module")
def trained(untrained) -> Path:
    """The same workdir with checkpoints of two steps and an index."""
    workdir = untrained.with_name("trained")
    shutil.copytree(untrained, workdir)
    _save(workdir, 1, seed=1)
    _save(workdir, 2, seed=2)
    search.open_search(workdir)
    return workdir


@pytest.fixture
def workdir(trained, tmp_path) -> Path:
    """A copy, for tests that change it."""
    return Path(shutil.copytree(trained, tmp_path / "workdir"))


@pytest.fixture
def run(capsys):
    """Run the command; return (exit code, stdout, stderr)."""

    def run_command(*argv) -> tuple[int, str, str]:
        code = 0
        try:
            search.main([str(word) for word in argv])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run_command


def _error(run, *argv) -> str:
    code, out, error = run(*argv)
    assert (code, out) == (1, "")
    assert error.startswith("error: ")
    assert error.count("\n") == 1, "an error is one line"
    return error


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """The size and modification time of every file except the index."""
    stats = {str(path): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {
        path: (stat.st_size, stat.st_mtime_ns)
        for path, stat in stats.items()
        if not path.endswith(INDEX_FILE)
    }


def _flip_bytes(workdir: Path, step: int) -> None:
    """Damage the largest file of a checkpoint."""
    files = (path for path in (workdir / "checkpoints" / str(step)).rglob("*") if path.is_file())
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(byte ^ 0xFF for byte in content[middle : middle + 64])
    largest.write_bytes(content)


@pytest.fixture
def embeddings_made(monkeypatch) -> list[int]:
    """A list that gets one number whenever a pool is embedded."""
    made, build_index = [], pool_index._build_index

    def counting(*arguments):
        made.append(1)
        return build_index(*arguments)

    monkeypatch.setattr(pool_index, "_build_index", counting)
    return made


@pytest.mark.parametrize("hybrid", [False, True])
def test_a_docstring_of_the_pool_finds_its_function_first(trained, hybrid):
    first, second, *_ = search.open_search(trained, hybrid=hybrid)(PLANTED, 3)
    assert first.record["qualified_name"] == "moon_phase"
    assert first.score > second.score


def test_hybrid_scores_are_sums_of_reciprocal_ranks(trained):
    first = search.open_search(trained, hybrid=True)(PLANTED, 1)[0]
    rrf_k = read_settings(read_config(trained)).evaluation.rrf_k
    assert first.score == pytest.approx(1 / (rrf_k + 1) + 1 / (rrf_k + 1))


def test_hits_are_printed_with_name_place_and_the_line_of_def(trained, run):
    code, out, _ = run("--workdir", trained, "--top", 1, "moon", "phase")
    assert code == 0
    head, line = out.splitlines()
    rank, score, name, place = head.split()
    assert (rank, name, line) == ("1", "tools:moon_phase", "     def moon_phase(day):")
    assert -1 <= float(score) <= 1
    file, number = place.rsplit(":", 1)
    assert Path(file).read_text().splitlines()[int(number) - 1] == "def moon_phase(day):"


def test_json_holds_one_object_per_hit_best_first(trained, run):
    code, out, _ = run("--json", "--workdir", trained, "moon", "--top", 4, "phase")
    hits = json.loads(out)
    assert (code, len(hits), out.count("\n")) == (0, 4, 1)
    wanted = ["score", "query", "qualified_name", "package", "file", "line", "first_line", "key"]
    for hit in hits:
        assert set(wanted) <= set(hit)
    assert hits[0]["query"] == PLANTED
    assert hits[0]["key"].startswith("@cached(\n    size=3)\ndef moon_phase(day):\n")
    assert hits[0]["first_line"] == "def moon_phase(day):"
    scores = [hit["score"] for hit in hits]
    assert scores == sorted(scores, reverse=True)


def test_the_pool_is_all_splits_and_a_larger_top_shows_all_of_it(trained):
    hits = search.open_search(trained)("open the window", 1000)
    assert len(hits) == NUM_FUNCTIONS
    names = {(hit.record["package"], hit.record["qualified_name"]) for hit in hits}
    assert len(names) == NUM_FUNCTIONS


def test_without_metadata_what_there_is_is_printed(trained, run, monkeypatch, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "workdir")
    # Equal keys have equal scores: the lower row comes first.
    pairs = InMemoryPairs(["a", "b", "c"], ["", "\n  same\nkey", "same key"])
    monkeypatch.setattr(splits, "open_pairs", lambda *args, **kwargs: pairs)
    fingerprints = dict.fromkeys(("train", "test"), pairs.fingerprint)
    data = {"data_set": "memory", "fingerprints": fingerprints}
    (workdir / "data.json").write_text(json.dumps(data))
    _save_again(workdir)
    code, out, _ = run("--workdir", workdir, "--top", 2, "same key")
    assert code == 0
    assert [line.split() for line in out.splitlines()] == [
        ["1", "1.0000"],
        ["same"],
        ["2", "1.0000"],
        ["same", "key"],
    ]
    hits = json.loads(run("--workdir", workdir, "--json", "same key")[1])
    assert len(hits) == 6
    assert list(hits[0]) == ["score", "query", "first_line", "key"]
    assert [hit["query"] for hit in hits[:4]] == ["b", "c", "b", "c"]


def test_one_call_returns_the_hits_of_the_opened_run(trained):
    hits = search.search(trained, PLANTED, top=2)
    assert hits == search.open_search(trained)(PLANTED, 2)
    assert len(hits) == 2
    with pytest.raises(ValueError, match="must be at least 1"):
        search.search(trained, PLANTED, top=0)


@pytest.mark.parametrize("end", ["", EOFError, KeyboardInterrupt])
def test_without_a_query_it_asks_until_nothing_is_said(trained, run, monkeypatch, end):
    answers, prompts = iter(["moon phase", " open window ", end]), []

    def answer(prompt):
        prompts.append(prompt)
        said = next(answers)
        if isinstance(said, str):
            return said
        raise said

    monkeypatch.setattr("builtins.input", answer)
    code, out, error = run("--workdir", trained, "--top", 1)
    assert (code, error) == (0, "")
    assert prompts == ["search> "] * 3
    assert [line.strip() for line in out.splitlines()[1::2]] == [
        "def moon_phase(day):",
        "def open_window(name):",
    ]


def test_asked_for_json_it_prints_a_list_per_line_and_no_prompt(trained, run, monkeypatch):
    answers = iter(["moon phase", "open window", ""])
    prompts = []
    monkeypatch.setattr("builtins.input", lambda prompt: prompts.append(prompt) or next(answers))
    code, out, _ = run("--workdir", trained, "--json", "--top", 1)
    names = [json.loads(line)[0]["qualified_name"] for line in out.splitlines()]
    assert (code, names, set(prompts)) == (0, ["moon_phase", "open_window"], {""})


def test_an_index_is_used_again(workdir, embeddings_made):
    before = search.open_search(workdir)(PLANTED, 5)
    assert embeddings_made == []
    (workdir / INDEX_FILE).unlink()
    after = search.open_search(workdir)(PLANTED, 5)
    assert embeddings_made == [1]
    assert before == after


def test_a_newer_checkpoint_rebuilds_the_index(workdir, embeddings_made):
    before = search.open_search(workdir)(PLANTED, 5)
    _save(workdir, 3, seed=3)
    after = search.open_search(workdir)(PLANTED, 5)
    assert embeddings_made == [1]
    assert [hit.score for hit in before] != [hit.score for hit in after]
    search.open_search(workdir)
    assert embeddings_made == [1]


def test_other_parameters_of_the_same_step_rebuild_the_index(workdir, embeddings_made):
    shutil.rmtree(workdir / "checkpoints")
    _save(workdir, 2, seed=5)
    search.open_search(workdir)
    assert embeddings_made == [1]


def test_another_tokenizer_than_the_run_s_is_refused(workdir, embeddings_made):
    path = workdir / "tokenizer.json"
    path.write_text(train_tokenizer(["open a window"], vocabulary_size=256).to_str())
    with pytest.raises(ValueError, match=r"tokenizer\.json in .* has changed since the run was"):
        search.open_search(workdir)
    assert embeddings_made == []


def test_the_index_is_the_key_tower_on_the_tokens_that_were_trained_on(workdir, monkeypatch):
    monkeypatch.setattr(pool_index, "_CHUNK_ROWS", 3)
    saved = json.loads((workdir / "config.json").read_text())
    saved["model"]["shared"] = False
    saved["data"]["max_tokens"] = {"query": 6, "key": 128}
    (workdir / "config.json").write_text(json.dumps(saved))
    shutil.rmtree(workdir / "checkpoints")
    _save(workdir, 2, seed=2)
    settings = read_settings(read_config(workdir))
    data_dir = Path(settings.run.data_dir)
    data = prepare_data(settings.data, data_dir=data_dir, workdir=workdir)
    program = build_training(settings._replace(seed=2))
    params = program.init().params["towers"]

    def embedded(side):
        parts = [
            program.embed(params, side, functools.partial(table.side, side), table.num_rows)
            for table in data.tables.values()
        ]
        return np.concatenate(parts)

    queries, keys = embedded("query"), embedded("key")
    first_split = next(iter(data.sources.values()))
    [hit] = search.open_search(workdir)(first_split.read([0])[0]["query"], 1)
    with np.load(workdir / INDEX_FILE) as index:
        np.testing.assert_allclose(index["keys"], keys, atol=1e-6)
    assert hit.score == pytest.approx((keys @ queries[0]).max(), abs=1e-5)


@pytest.mark.parametrize("start", ["def ", "async def ", "  async  def "])
def test_the_first_line_is_that_of_the_def(start):
    assert _first_line(f"\n@cached\n{start}find(name):\n    pass") == (
        f"{start}find(name):".strip()
    )


def test_no_flipped_bit_of_an_index_is_an_error_or_believed(tmp_path):
    path, made_from = tmp_path / INDEX_FILE, {"step": 1}
    index = pool_index.PoolIndex(
        np.ones((3, 4), np.float32), [{"key": str(row)} for row in range(3)]
    )
    pool_index._write_index(path, made_from, index)
    whole = path.read_bytes()
    for place in range(0, 8 * len(whole), 3):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        found = pool_index._read_index(path, made_from)
        assert found is None or (
            np.array_equal(found.keys, index.keys) and found.rows == index.rows
        )


@pytest.mark.parametrize("damage", [lambda content: content[:-500], lambda content: b""])
def test_a_damaged_index_is_rebuilt(workdir, embeddings_made, damage):
    path = workdir / INDEX_FILE
    path.write_bytes(damage(path.read_bytes()))
    search.open_search(workdir)
    search.open_search(workdir)
    assert embeddings_made == [1]


def test_the_search_continues_if_the_index_cannot_be_stored(workdir, run):
    (workdir / INDEX_FILE).unlink()
    (workdir / INDEX_FILE).mkdir()
    code, out, error = run("--workdir", workdir, "--top", 1, PLANTED)
    assert code == 0
    assert "moon_phase" in out
    assert "cannot write " in error
    assert "; the next search will embed the pool again" in error
    assert not list(workdir.glob("*unfinished*"))


def test_the_index_holds_unit_vectors_of_every_row(trained):
    with np.load(trained / INDEX_FILE) as index:
        keys = index["keys"]
    assert (keys.shape, keys.dtype) == ((NUM_FUNCTIONS, 64), np.float32)
    # Float32 sums of 64 squares round to about 1e-7.
    np.testing.assert_allclose(np.linalg.norm(keys, axis=1), 1, rtol=1e-5)


def test_nothing_of_the_run_is_changed(workdir, run):
    before = _files(workdir.parent)
    assert run("--workdir", workdir, "--hybrid", PLANTED)[0] == 0
    (workdir / INDEX_FILE).unlink()
    assert run("--workdir", workdir, PLANTED)[0] == 0
    assert _files(workdir.parent) == before


def test_a_damaged_newest_checkpoint_is_passed_over_and_left_alone(workdir, embeddings_made):
    whole = search.open_search(workdir)(PLANTED, 5)
    _flip_bytes(workdir, 2)
    before = _files(workdir.parent)
    found = search.open_search(workdir)(PLANTED, 5)
    assert embeddings_made == [1], "the index of step 2 is not that of step 1"
    assert [hit.score for hit in found] != [hit.score for hit in whole]
    assert _files(workdir.parent) == before


def test_only_damaged_checkpoints_are_an_error(workdir, run):
    for step in (1, 2):
        _flip_bytes(workdir, step)
    assert "none of the checkpoints" in _error(run, "--workdir", workdir, PLANTED)


def test_a_folder_without_a_run_is_an_error(tmp_path, run):
    assert "there is no run in" in _error(run, "--workdir", tmp_path / "absent", PLANTED)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder_exists", [False, True])
def test_a_run_without_checkpoints_says_to_train_first(untrained, tmp_path, run, folder_exists):
    workdir = Path(shutil.copytree(untrained, tmp_path / "workdir"))
    if folder_exists:
        (workdir / "checkpoints").mkdir()
    error = _error(run, "--workdir", workdir, PLANTED)
    assert "not saved a checkpoint yet; train it first with python -m jaxcl.train --config" in error
    assert (workdir / "checkpoints").exists() == folder_exists


@pytest.mark.parametrize("content", [None, "", "[]", "{}", "5", '{"data_set": 3}'])
def test_the_checkpoint_replaces_a_lost_or_damaged_data_json(trained, workdir, content):
    wanted = search.search(trained, PLANTED, top=2)
    path = workdir / "data.json"
    path.unlink() if content is None else path.write_text(content)
    assert search.search(workdir, PLANTED, top=2) == wanted


def test_another_config_than_the_checkpoints_is_an_error(workdir, run):
    path = workdir / "config.json"
    config = json.loads(path.read_text())
    config["loss"]["masks"] = []
    path.write_text(json.dumps(config))
    assert "belongs to another config: loss.masks is" in _error(run, "--workdir", workdir, PLANTED)


def test_other_rows_than_were_trained_on_are_an_error(workdir, run):
    data = json.loads((workdir / "data.json").read_text())
    data["fingerprints"]["test"] = "others"
    (workdir / "data.json").write_text(json.dumps(data))
    _save_again(workdir)
    assert "no longer has the rows" in _error(run, "--workdir", workdir, PLANTED)


@pytest.mark.parametrize("query", ["", "  "])
def test_an_empty_query_is_an_error(trained, run, query):
    assert "the query is empty" in _error(run, "--workdir", trained, query)


def test_a_top_of_nothing_is_an_error(trained, run):
    assert "--top=0 must be at least 1" in _error(run, "--workdir", trained, "--top", 0, PLANTED)


def test_neither_the_mesh_nor_the_batch_of_the_run_matters(workdir):
    path = workdir / "config.json"
    settings = read_settings(read_config(workdir))
    config = json.loads(path.read_text())
    config["run"]["mesh"] = {"data": 3 * jax.device_count()}
    config["global_batch_size"] = 3
    path.write_text(json.dumps(config))
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore_latest(build_training(settings).abstract_state())
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(restored.step + 1, restored.state, record_of(workdir))
    assert search.open_search(workdir)(PLANTED, 1)[0].record["name"] == "moon_phase"


def _move_data_away(workdir: Path) -> None:
    """Remove the run's data set and data folder, as on another machine."""
    for name, change in {
        "data.json": lambda content: content.update(data_set="/no/such/data_set"),
        "config.json": lambda content: content["run"].update(data_dir="/no/such/folder"),
    }.items():
        content = json.loads((workdir / name).read_text())
        change(content)
        (workdir / name).write_text(json.dumps(content))


def test_a_copied_workdir_is_searched_from_its_index_without_its_data(trained, workdir):
    wanted = search.search(trained, PLANTED, top=3)
    _move_data_away(workdir)
    found = search.search(workdir, PLANTED, top=3)
    assert [hit.score for hit in found] == [hit.score for hit in wanted]
    assert [hit.record["key"] for hit in found] == [hit.record["key"] for hit in wanted]


def test_without_an_index_a_copied_workdir_says_that_its_rows_are_gone(workdir, run):
    _move_data_away(workdir)
    (workdir / INDEX_FILE).unlink()
    assert "are missing from /no/such/data_set" in _error(run, "--workdir", workdir, PLANTED)


@pytest.fixture
def other_model(monkeypatch, tmp_path):
    """A folder that loads as a small model, and a cache for its indices."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = small_model([PLANTED, PLANTED_CODE])
    monkeypatch.setattr(pool_index, "load", lambda path, trust: model)
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


def _own_config(workdir: Path) -> ConfigDict:
    data_set = json.loads((workdir / "data.json").read_text())["data_set"]
    return _config(Path(data_set), workdir.parent / "data")


def test_any_model_searches_the_pool_of_a_config(trained, other_model, embeddings_made):
    config = _own_config(trained)
    hits = search.search(other_model, PLANTED, top=1000, config=config)
    assert len(hits) == NUM_FUNCTIONS
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert hits == search.search(other_model, PLANTED, top=1000, config=config)
    assert embeddings_made == [1]
    assert list(other_model.iterdir()) == []
    assert len(list((other_model.parent / "cache" / "jaxcl" / "search").iterdir())) == 1


def test_each_pool_and_model_has_its_own_index(trained, other_model, embeddings_made, monkeypatch):
    config = _own_config(trained)
    search.open_search(other_model, config=config)
    config.data.splits = {"train": "train"}
    assert len(search.search(other_model, PLANTED, top=1000, config=config)) < NUM_FUNCTIONS
    monkeypatch.setattr(pool_index, "load", lambda path, trust: small_model([PLANTED_CODE]))
    search.open_search(other_model, config=config)
    assert embeddings_made == [1, 1, 1]


def test_the_model_flag_accepts_a_run(trained, run):
    wanted = run("--workdir", trained, "--top", 2, PLANTED)
    assert run("--model", trained, "--top", 2, PLANTED) == wanted


@pytest.mark.parametrize("flags", [[], ["--workdir", "a", "--model", "b"]])
def test_the_command_needs_exactly_one_model(run, flags):
    assert "give either --workdir with a run, or --model" in _error(run, *flags, PLANTED)


def test_a_model_without_data_needs_a_config(other_model, run):
    error = _error(run, "--model", other_model, PLANTED)
    assert "is not a run with its own data; name a file with --corpus" in error


def test_a_run_searches_a_corpus_with_its_own_settings(workdir, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    corpus = tmp_path / "docs.txt"
    corpus.write_text(f"open a window\n{PLANTED}\nclose a ledger\n")
    path = workdir / "config.json"
    config = json.loads(path.read_text())
    config["evaluation"]["rrf_k"] = 7
    config["loss"]["matryoshka_dims"] = [32, 64]
    path.write_text(json.dumps(config))
    _save_again(workdir)
    before = _files(workdir)
    hits = search.open_search(workdir, corpus=corpus, hybrid=True)(PLANTED, 100)
    assert len(hits) == 3
    assert hits[0].record == {"id": "1", "text": PLANTED}
    assert hits[0].score == pytest.approx(1 / (7 + 1) + 1 / (7 + 1))  # first by both methods
    assert search.open_search(workdir, corpus=corpus, dim=32)(PLANTED, 1)[0].record["id"] == "1"
    with pytest.raises(ValueError, match=r"was not trained at dim=16; use one of 32, 64"):
        search.open_search(workdir, corpus=corpus, dim=16)
    assert _files(workdir) == before
