"""Topics of a trained run: planted topics are found, and training reads the file."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from jaxcl import topics
from jaxcl.assignment.sourced import SourcedRows
from jaxcl.data.row_topics import read_topics
from jaxcl.data.sources import InMemoryPairs
from jaxcl.settings.changed import changed_config
from jaxcl.settings.config_files import load_config
from jaxcl.settings.read import read_settings
from tests.helpers import unit_vectors

PLANTED, SIZE, DIM = 6, 9, 16
ROWS = PLANTED * SIZE - 2


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A run with embeddings around the centres of planted topics; returns the topics."""
    planted = np.random.default_rng(0).permutation(np.repeat(np.arange(PLANTED), SIZE))[:ROWS]
    centres = unit_vectors(0, PLANTED, DIM, dtype=np.float32)
    sides = {
        side: np.asarray(centres[planted] + 0.2 * unit_vectors(seed, ROWS, DIM, dtype=np.float32))
        for seed, side in enumerate(("query", "key"), start=1)
    }
    pairs = InMemoryPairs([f"about  {row}" for row in range(ROWS)], ["key"] * ROWS)
    trained = SimpleNamespace(
        sources=lambda: {"train": pairs},
        embeddings=lambda *_: sides,
        check_texts=lambda command: None,
    )
    monkeypatch.setattr(topics, "open_run", lambda workdir, **_: {tmp_path: trained}[workdir])
    return SimpleNamespace(workdir=tmp_path, planted=planted, pairs=pairs)


def test_planted_topics_are_found_and_can_be_read(run, capsys):
    topics.main(["--workdir", str(run.workdir), "--topics", str(PLANTED)])
    out = run.workdir / "topics-train.npz"
    said = " ".join(capsys.readouterr().err.split())
    assert f"--config.data.topics={out}" in said
    assert f"searching for the order of {ROWS} rows" in said
    found = read_topics(out, num_rows=ROWS, source=run.pairs.fingerprint).topic
    assert np.bincount(found).tolist() == [SIZE] * (PLANTED - 1) + [SIZE - 2]
    pure = np.mean([np.bincount(run.planted[found == one]).max() for one in range(PLANTED)]) / SIZE
    assert pure > 0.85
    text = (run.workdir / "topics-train.examples.md").read_text()
    points = run_points(run)
    for one in range(PLANTED):
        likeness = points @ points[found == one].sum(0)
        central = [row for row in np.argsort(-likeness) if found[row] == one][:5]
        listed = text.split(f"## {one} (")[1].split("\n## ")[0].splitlines()[2:7]
        assert listed == [f"- about {row}" for row in central]


def test_the_flags_that_are_printed_train_by_topic(run, capsys):
    topics.main(["--workdir", str(run.workdir), "--topics", str(PLANTED)])
    said = " ".join(capsys.readouterr().err.split())
    flags = dict(re.findall(r"--config\.([\w.]+)=(\S+)", said))
    assert flags.keys() >= {"data.topics", "assignment.sourced.mix"}
    settings = read_settings(changed_config(load_config("code_search"), flags))
    sourced = settings.assignment.sourced
    assert sourced.by == "topic"
    SourcedRows([0, 0, 1, 1], batch_size=2, seed=0, mix=sourced.mix)  # which checks the name


def test_the_report_tells_topics_from_chance(run, tmp_path):
    report = topics.topics(run.workdir, tmp_path / "made" / "six.npz", num_topics=PLANTED)
    assert report["topics"] == PLANTED
    vectors = run_points(run)
    topic = np.load(tmp_path / "made" / "six.npz")["topic"]
    cosines, different = vectors @ vectors.T, ~np.eye(ROWS, dtype=bool)
    within = cosines[(topic[:, None] == topic) & different].mean()
    assert report["mean cosine within topics"] == pytest.approx(within, rel=1e-4)
    assert report["mean cosine of all rows"] == pytest.approx(cosines[different].mean(), rel=1e-4)
    assert within > cosines[different].mean() + 0.4
    alone = topics.topics(run.workdir, tmp_path / "alone.npz", num_topics=ROWS)
    assert alone["mean cosine within topics"] is None


@pytest.mark.slow
def test_out_and_seed_are_used(run):
    for seed in (0, 1):
        out = run.workdir / f"{seed}.npz"
        topics.main(
            ["--workdir", str(run.workdir), "--topics", "4", "--seed", str(seed), "--out", str(out)]
        )
        with np.load(out) as found:
            assert str(found["source"]) == run.pairs.fingerprint
            assert np.bincount(found["topic"]).tolist() == [13] * 4
    assert (np.load(out)["topic"] != np.load(run.workdir / "0.npz")["topic"]).any()


def run_points(run) -> np.ndarray:
    sides = topics.open_run(run.workdir).embeddings("train", run.pairs)
    points = sides["query"] + sides["key"]
    return points / np.linalg.norm(points, axis=1, keepdims=True)


@pytest.mark.parametrize("number", [0, ROWS + 1])
def test_an_invalid_number_is_a_one_line_error(run, capsys, number):
    with pytest.raises(SystemExit) as stopped:
        topics.main(["--workdir", str(run.workdir), "--topics", str(number)])
    assert stopped.value.code == 1
    assert f"--topics={number}, but the run has {ROWS} training rows" in capsys.readouterr().err
