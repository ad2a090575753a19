"""The benchmark `files`: its rows, its stages and its record."""

import json

import pytest

from jaxcl.bench import bench_files, files_stages
from jaxcl.bench.__main__ import BENCHMARKS


def test_generated_rows_are_distinct_and_repeat(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        bench_files.generate_pairs(tmp_path / name, 300, seed=seed)
    records = [json.loads(line) for line in (tmp_path / "a").read_text().splitlines()]
    assert len(records) == 300
    for side in ("query", "key"):
        assert len({record[side] for record in records}) == 300
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_every_stage_is_measured(tmp_path, monkeypatch):
    assert "files" in BENCHMARKS

    def in_this_process(path, data_dir):
        return files_stages.run_stages(path, data_dir)

    monkeypatch.setattr(bench_files, "_run_stages", in_this_process)
    record = bench_files.measure(rows=300, rounds=2, folder=tmp_path)
    assert len(record["rounds"]) == 4
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in record["rounds"].values())
    assert len(record["facts"]) == 8
    cpu = [figure for name, figure in record["facts"].items() if name.startswith("CPU s at most")]
    assert len(cpu) == 4
    assert min(cpu) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_fails_is_an_error_with_its_message(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_files.sys, "executable", "false")
    with pytest.raises(RuntimeError, match=r"^false -m jaxcl.bench.files_stages .* failed: "):
        bench_files.measure(rows=3, rounds=1, folder=tmp_path)
