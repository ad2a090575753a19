"""Mining with a trained run: the file follows the rule, and training reads it."""

import json
from pathlib import Path

import numpy as np
import pytest
from jaxcl.configs.code_search import get_config

from jaxcl.data.code_pairs import prepare_code_pairs
from jaxcl.data.python_functions import SourceRoot
from jaxcl.host.block_file import BlockFile
from jaxcl.mine import main, mine
from jaxcl.negatives.mining import MiningRule
from jaxcl.run import mined_blocks
from jaxcl.run.opened import open_run
from jaxcl.train import train

VERBS = ("open", "close", "count", "merge", "split", "drop")
NOUNS = ("socket", "ledger", "window", "matrix", "folder")
RULE = MiningRule(per_query=3, rank_range=(1, 12), relative_margin=0.02)


def small_config(site: Path, data_dir: Path, **changes):
    config = get_config("smoke")
    pairs = prepare_code_pairs(
        data_dir, roots=[SourceRoot(site)], test_packages=(), validation_fraction=0.2
    )
    small = {
        "data.name": str(pairs.directory),
        "data.splits": {"train": "train", "validation": "validation"},
        "data.vocabulary_size": 300,
        "model.dim": 16,
        "global_batch_size": 16,
        "steps": 6,
        "optimizer.warmup_steps": 2,
        "evaluation.methods": ("dense",),
        "run.data_dir": str(data_dir),
    }
    flat = {name: value for name, value in (small | changes).items() if name != "data.splits"}
    config.update_from_flattened_dict(flat)
    with config.unlocked():
        config.data.splits = type(config)(small["data.splits"])
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder of packages with functions, and a run that was trained on them."""
    folder = tmp_path_factory.mktemp("mine")
    for verb in VERBS:
        functions = "\n\n".join(
            f'def {verb}_{noun}(name):\n    """{verb.title()} the {noun} that has a name."""\n'
            f"    handle = find({noun!r})\n    handle.note({verb!r})\n    return handle.{verb}()\n"
            for noun in NOUNS
        )
        (folder / "site" / f"to_{verb}").mkdir(parents=True)
        (folder / "site" / f"to_{verb}" / "__init__.py").write_text(functions)
    train(small_config(folder / "site", folder / "data"), folder / "run")
    return folder


def embeddings(workdir):
    run = open_run(workdir)
    table = run.table("train", run.sources()["train"])
    sides = [run.encoder.embed(side, table) for side in ("query", "key")]
    return (*sides, table)


def test_mined_negatives_agree_with_a_dense_search(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(mined_blocks, "BLOCK_ROWS", 8)
    rule = RULE._replace(sampling="top")
    report = mine(folder / "run", tmp_path / "mined.npz", rule=rule)
    queries, keys, table = embeddings(folder / "run")
    scores = queries @ keys.T
    found = np.load(tmp_path / "mined.npz")
    assert len(found["rows"]) == table.num_rows > 16
    counts = []
    for row, similarities in enumerate(scores):
        others = np.flatnonzero(table.text != table.text[row])
        order = others[np.argsort(-similarities[others], kind="stable")]
        ceiling = similarities[row] - 0.02 * abs(similarities[row])
        places = [place for place in range(1, 12) if similarities[order[place]] <= ceiling][:3]
        there = found["rows"][row] >= 0
        assert found["ranks"][row][there].tolist() == places
        assert found["rows"][row][there].tolist() == order[places].tolist()
        np.testing.assert_allclose(
            found["teacher_scores"][row],
            [similarities[row], *similarities[order[places]], *[0] * (3 - len(places))],
            atol=1e-5,
        )
        counts.append(len(places))
    assert report["negatives"] == sum(counts)
    assert report["queries without negatives"] == counts.count(0)
    assert report["negatives more similar than the positive"] == 0
    assert json.loads((tmp_path / "mined.report.json").read_text()) == report
    assert (tmp_path / "mined.examples.md").read_text().count("rank ") > 5


def test_interrupted_it_resumes_and_finds_the_same(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(mined_blocks, "BLOCK_ROWS", 8)
    whole = mine(folder / "run", tmp_path / "whole.npz", rule=RULE, seed=1)
    # The first block has five files; the second is incomplete.
    appended, stop_after = BlockFile.append, 8

    def failing(self, rows):
        nonlocal stop_after
        stop_after -= 1
        if stop_after == 0:
            raise KeyboardInterrupt
        appended(self, rows)

    monkeypatch.setattr(BlockFile, "append", failing)
    with pytest.raises(KeyboardInterrupt):
        mine(folder / "run", tmp_path / "halves.npz", rule=RULE, seed=2)
    assert not (tmp_path / "halves.npz").exists()
    monkeypatch.setattr(BlockFile, "append", appended)
    seen = []
    monkeypatch.setattr(
        BlockFile, "append", lambda self, rows: (seen.append(len(rows)), appended(self, rows))
    )
    mine(folder / "run", tmp_path / "halves.npz", rule=RULE, seed=2)
    resumed = len(seen)
    mine(folder / "run", tmp_path / "again.npz", rule=RULE, seed=3)
    assert resumed == len(seen) - resumed - 5  # the first block was done
    mine(folder / "run", tmp_path / "same.npz", rule=RULE, seed=1)
    ours, theirs = np.load(tmp_path / "same.npz"), np.load(tmp_path / "whole.npz")
    for name in ours.files:
        np.testing.assert_array_equal(ours[name], theirs[name])
    assert (np.load(tmp_path / "halves.npz")["rows"] != theirs["rows"]).any()
    assert whole["queries"] == len(theirs["rows"])


def test_a_named_checkpoint_mines_into_the_workdir(folder):
    workdir = folder / "run"
    main(["--workdir", str(workdir / "checkpoints" / "6"), "--rank-range", "0:9", "--seed", "5"])
    assert (workdir / "mined-train.npz").exists()
    assert {path.name for path in (workdir / "checkpoints").iterdir()}.isdisjoint({"mining"})
    assert not list((workdir / "checkpoints").rglob("mined-*"))


@pytest.mark.slow
def test_the_next_run_trains_on_mined_negatives(folder, tmp_path, capsys):
    out = tmp_path / "mined.npz"
    places = ("--workdir", str(folder / "run"), "--out", str(out))
    main([*places, "--per-query", "2", "--rank-range", "0:9", "--masks", "text", "group"])
    assert f"--config.data.negatives={out}" in capsys.readouterr().err
    config = small_config(folder / "site", folder / "data", **{"data.negatives": str(out)})
    train(config, tmp_path / "next")
    _, _, table = embeddings(folder / "run")
    rows = np.load(out)["rows"]
    assert (table.group[rows] != table.group[:, None])[rows >= 0].all()
    arrays = dict(np.load(out))
    np.savez(out, **arrays | {"source": np.array("other rows")})
    with pytest.raises(ValueError, match=r"was made from other rows \(other rows\)"):
        train(config, tmp_path / "another")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank-range", "10-100"], "--rank-range=10-100 is not a range"),
        (["--rank-range", "90:99"], "none of rank 90"),
        (["--per-query", "0"], "per_query=0; set it to at least 1"),
        (["--split", "dev"], "split='dev' is unknown; the run has train, validation"),
        (["--masks", "group"], "including 'row' or 'text'"),
        (["--sampling", "best"], "'best' is unknown"),
        (["--workdir", "nowhere"], "there is no run in nowhere"),
    ],
)
def test_a_mistake_is_one_line(folder, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(["--workdir", str(folder / "run"), *arguments])
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert message in " ".join(said.split())
    assert "Traceback" not in said
