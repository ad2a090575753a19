"""The metrics file: every step once, every value exact, even after kills."""

import contextlib
import errno
import json
import math
import os
import struct

import jax
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jaxcl.run.metric_writer import MetricWriter, read_metrics


def write(workdir, steps, *, begins_at=0, **metrics):
    with contextlib.closing(MetricWriter(workdir, step=begins_at)) as writer:
        for step in steps:
            writer.write(step, metrics or {"loss": step / 10})


def steps(workdir):
    return [record["step"] for record in read_metrics(workdir)]


def test_records_are_read_as_they_were_written(tmp_path):
    with contextlib.closing(MetricWriter(tmp_path, step=0)) as writer:
        writer.write(1, {"loss": 2.5, "time/pairs_per_second": 100.0})
        writer.write(2, {"loss": 1.5})
        writer.write(2, {"dev/recall": 0.5})
    assert read_metrics(tmp_path) == [
        {"step": 1, "loss": 2.5, "time/pairs_per_second": 100.0},
        {"step": 2, "loss": 1.5},
        {"step": 2, "dev/recall": 0.5},
    ]


VALUES = [
    0.1 + 0.2, 1 / 3, math.pi * 1e-300, 5e-324, 1.7976931348623157e308, -0.0, 2.0**-149, 1e16 + 2,
    math.inf, -math.inf,
]  # fmt: skip


def test_values_round_trip_bit_for_bit(tmp_path):
    write(tmp_path, [1], **{f"m{i}": value for i, value in enumerate(VALUES)}, nothing=math.nan)
    write(tmp_path, [], begins_at=1)  # rewritten when the run resumes
    (record,) = read_metrics(tmp_path)
    found = [record[f"m{i}"] for i in range(len(VALUES))]
    assert [value.hex() for value in found] == [value.hex() for value in VALUES]
    assert math.isnan(record["nothing"])


def test_nothing_was_measured_before_the_first_record(tmp_path):
    assert read_metrics(tmp_path) == []
    write(tmp_path, [])
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("resumed_at", [0, 1, 3, 4, 5, 9])
def test_a_resumed_run_drops_records_after_its_step(tmp_path, resumed_at):
    write(tmp_path, [1, 2, 3, 4, 5])
    write(tmp_path, [], begins_at=resumed_at)
    assert steps(tmp_path) == [step for step in [1, 2, 3, 4, 5] if step <= resumed_at]


def test_a_run_resumed_twice_records_every_step_once(tmp_path):
    write(tmp_path, [1, 2, 3, 4])
    write(tmp_path, [3, 4, 5], begins_at=2)
    write(tmp_path, [5, 6], begins_at=4)
    uninterrupted = tmp_path / "uninterrupted"
    uninterrupted.mkdir()
    write(uninterrupted, [1, 2, 3, 4, 5, 6])
    assert read_metrics(tmp_path) == read_metrics(uninterrupted)


def test_a_line_cut_short_anywhere_is_left_out(tmp_path):
    write(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    first, second = path.read_text().splitlines()
    for length in range(len(second)):
        path.write_text(f"{first}\n{second[:length]}")
        assert read_metrics(tmp_path) == [json.loads(first)]


def test_a_record_after_a_truncated_line_is_a_separate_line(tmp_path):
    write(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-5])
    write(tmp_path, [2, 3], begins_at=1)
    assert steps(tmp_path) == [1, 2, 3]


def test_a_record_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    with contextlib.closing(MetricWriter(tmp_path, step=0)) as writer:
        writer.write(1, {"loss": 0.5})
        assert steps(tmp_path) == [1]


def test_no_record_is_lost_when_a_resuming_process_is_killed(tmp_path, monkeypatch):
    write(tmp_path, [1, 2, 3])

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricWriter(tmp_path, step=2)
    assert steps(tmp_path) == [1, 2, 3]


def test_tensorboard_events_hold_the_same_names(tmp_path):
    write(tmp_path, [1], loss=0.5, gradient_norm=2.0)
    (events,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    content = events.read_bytes()
    assert b"loss" in content
    assert b"gradient_norm" in content


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    write(tmp_path, [1, 2])
    assert list(tmp_path.iterdir()) == []


class FullDisk:
    """A file on that device."""

    def write(self, _):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("full", ["metrics", "events"])
def test_a_full_disk_is_an_error_that_says_what_to_do(tmp_path, full):
    writer = MetricWriter(tmp_path, step=0)
    files = writer._file, writer._events._py_recordio_writer._writer
    if full == "metrics":
        writer._file = FullDisk()
    else:
        writer._events._py_recordio_writer._writer = FullDisk()
    for step in range(1, 50):  # more than the queue holds
        with pytest.raises(OSError, match=r"metrics.jsonl \(No space left on device\); when that"):
            writer.write(step, {"loss": 1.0})
    for file in files:
        file.close()


def test_tensorboard_reads_the_same(tmp_path):
    write(tmp_path, [1, 2])
    [file] = (tmp_path / "tensorboard").iterdir()
    data, events = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    assert events[0].file_version == "brain.Event:2"
    assert events[1].session_log.status == SessionLog.START
    assert [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value] == [
        (1, "loss", pytest.approx(0.1)),
        (2, "loss", pytest.approx(0.2)),
    ]


@pytest.mark.parametrize(
    "line", [b"\xff\xfe", b"[]", b"5", b"{}", b'{"step": "one"}', b"[" * 9_999]
)
def test_a_damaged_line_is_set_aside_and_stops_nothing(tmp_path, capsys, line):
    write(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    first, second = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, line, second]) + b"\n")
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    with contextlib.closing(MetricWriter(tmp_path, step=2)):
        pass
    assert path.read_bytes().splitlines() == [first, second]
    assert (tmp_path / "metrics.damaged").read_bytes() == line + b"\n"
    assert "1 damaged lines" in " ".join(capsys.readouterr().err.split())
