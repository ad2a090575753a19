"""The GPU benchmark runs on a CPU at tiny sizes, and survives crashes of its jobs."""

import functools
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.bench.gpu import command, jobs, kernel_parity, loss_speed, step_speed
from jaxcl.bench.gpu.exact import exact_infonce
from jaxcl.bench.gpu.jobs import PARTS, jobs_of
from jaxcl.bench.gpu.measure import relative_error as reported_error
from jaxcl.bench.gpu.record import Record
from jaxcl.bench.gpu.recorder import Recorder
from jaxcl.bench.gpu.sizes import FULL, TINY, Cell, Encoder, as_json, step_flops
from jaxcl.bench.gpu.supervise import run_job
from jaxcl.bench.gpu.table import as_table
from jaxcl.bench.gpu.worker import Spec
from jaxcl.cost.program_cost import matrix_flops
from jaxcl.ops.pairs import pallas_gpu, tiled
from jaxcl.typing import SIDES
from tests.helpers import relative_error, unit_vectors

ROOT = Path(__file__).parents[1]
FOLDER = Path(command.__file__).parent


def spec_for(program: str, path: Path) -> Spec:
    return Spec(program, "cpu", TINY, seed=3, results=path, seconds=600.0)


def events(path: Path, kind: str) -> dict[str, dict]:
    lines = map(json.loads, path.read_text().splitlines())
    return {line["name"]: line for line in lines if line["event"] == kind}


@pytest.mark.slow
@pytest.mark.smoke
def test_all_parts_run_on_a_cpu(smoke_pairs, tmp_path, capsys):
    file = tmp_path / "gpu.json"
    record = command.main(["--minutes", "10", f"--pairs={smoke_pairs}"], file)
    assert json.loads(file.read_text()) == json.loads(json.dumps(record))
    assert {job["part"] for job in record["jobs"].values()} == {0, *PARTS}
    assert {job["status"] for job in record["jobs"].values()} == {"complete"}
    done = [one for one in record["results"] if one["status"] == "ok"]
    assert {one["part"] for one in done} == {0, *PARTS}
    assert not [one for one in record["results"] if one["status"] == "failure"]
    for one in done:
        assert all(time > 0 for time in one.get("ms", one.get("s", [])))
        assert all(0 <= error < 0.1 for error in one.get("errors", {}).values())
    assert capsys.readouterr().out.endswith(as_table(record) + "\n")


@pytest.fixture
def torch_python() -> str:
    path = os.environ.get("JAXCL_TORCH_PYTHON")
    if not path:
        pytest.skip("JAXCL_TORCH_PYTHON names no interpreter with torch")
    return path


def test_pytorch_is_measured_next_to_jax(torch_python, tmp_path):
    options = ["--minutes=20", "--only=3,4", "--torch", f"--torch-python={torch_python}"]
    record = command.main(options, tmp_path / "gpu.json")
    names = [one["name"] for one in record["results"] if one["status"] == "ok"]
    for expected in ("PyTorch, compiled", "CachedMultipleNegativesRankingLoss"):
        assert any(expected in name for name in names)


@pytest.mark.parametrize("sabotaged", ["forward", "backward"])
def test_a_sabotaged_kernel_has_no_time(sabotaged, tmp_path, monkeypatch):
    kernel = getattr(tiled, sabotaged)

    def slightly_wrong(*arguments, **options):
        return jax.tree.map(lambda leaf: 1.03 * leaf, kernel(*arguments, **options))

    monkeypatch.setattr(tiled, sabotaged, slightly_wrong)
    path = tmp_path / "results.jsonl"
    spec = spec_for("loss_speed", path)
    gradients = [one for one in loss_speed.measurements(spec) if one.gradients]
    monkeypatch.setattr(loss_speed, "measurements", lambda _: gradients)
    loss_speed.measure_all(Recorder(path, seconds=600.0), spec)
    name = "B = 64, d = 8: tiled, tile 32, forward + backward"
    failure = events(path, "failure")[name]
    assert failure["kind"] == "check"
    assert "CheckFailed: differs from the reference by more than" in failure["error"]
    timed = events(path, "result")
    assert name not in timed
    assert "ms" in timed["B = 64, d = 8: reference, forward + backward"]
    record = record_of(path)
    [line] = [
        line for line in as_table(record.content).splitlines() if line.startswith(f"  {name}")
    ]
    assert line.split(name)[1].strip() == "(failed its check)"
    assert next(one["name"] for one in record.failures()) == name


def record_of(path: Path) -> Record:
    head = {"commit": "c", "cpu": "p", "nvidia_smi": None}
    record = Record(None, head)
    [_, job] = jobs_of({3}, torch=False)
    for line in path.read_text().splitlines():
        event = json.loads(line)
        if event["event"] != "begin":
            record.add(job, event)
    return record


def test_interpreted_kernels_pass_the_parity_check(monkeypatch):
    # JAX has no public name for it yet.
    params = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.params")
    monkeypatch.setattr(pallas_gpu, "INTERPRET", params.InterpretGPUParams())
    sides = [unit_vectors(seed, 128, 64, dtype=jnp.bfloat16) for seed in (0, 1)]
    exact = functools.partial(exact_infonce, *sides, loss_speed.TEMPERATURE, dtype="float64")
    errors = kernel_parity._check("pallas_gpu", sides, exact, True, True)["errors"]
    assert errors["loss"] < 1e-6
    assert max(errors.values()) < 6e-3


def test_the_exact_loss_by_hand():
    sides = jnp.eye(2, dtype=jnp.float32)
    found = exact_infonce(sides, sides, 0.5, dtype="float64")
    # Scores are 2 and 0; each row has the loss log(e² + e⁰) − 2.
    assert math.isclose(found["loss"], math.log(math.exp(2) + 1) - 2, rel_tol=1e-12)
    other = 1 / (1 + math.exp(2))  # the probability of the wrong key
    np.testing.assert_allclose(found["queries"], [[-other, other], [other, -other]], rtol=1e-12)
    np.testing.assert_allclose(found["keys"], found["queries"], rtol=1e-12)
    # With respect to the temperature: the mean of other · (0 − 2) · (−1 / 0.5).
    assert math.isclose(found["temperature"], 4 * other, rel_tol=1e-12)


@pytest.mark.parametrize("entries", [30, pytest.param(10_000, marks=pytest.mark.slow)])
def test_the_exact_loss_is_that_of_autodiff_at_any_chunk(entries, monkeypatch):
    monkeypatch.setattr("jaxcl.bench.gpu.exact._ENTRIES", entries)
    jax.clear_caches()
    queries, keys = (unit_vectors(seed, 12, 5, dtype=jnp.float32) for seed in (0, 1))

    def loss(queries, keys, temperature):
        scores = queries @ keys.T / temperature
        both = jax.nn.log_softmax(scores, 1) + jax.nn.log_softmax(scores, 0)
        return -jnp.diagonal(both).mean() / 2

    value, gradients = jax.value_and_grad(loss, (0, 1, 2))(queries, keys, jnp.float32(0.1))
    found = exact_infonce(queries, keys, 0.1, dtype="float32")
    for name, wanted in zip(
        ("loss", "queries", "keys", "temperature"), (value, *gradients), strict=True
    ):
        assert relative_error(found[name], wanted) < 1e-5


def test_errors_that_are_nan_fail_every_check():
    one = np.ones(2)
    assert math.isnan(reported_error(np.array([1.0, np.nan]), one))
    assert math.isnan(reported_error(one, np.zeros(2)))
    assert math.isnan(reported_error(np.ones(3), one))
    assert reported_error(np.zeros(2), one) == 1


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_the_flops_of_a_step_are_its_encoders_products(chunk_size):
    cell = Cell(Encoder("small", 2, 12, 3, 20, vocabulary_size=9), 5, 4, chunk_size)
    towers = step_speed.encoder_towers(cell)
    params = jax.eval_shape(towers.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((4, 5), jnp.int32)
    encode = jax.make_jaxpr(lambda params, tokens: towers.encode(params, "key", {"tokens": tokens}))
    encoders = len(SIDES) * matrix_flops(encode(params, tokens))
    pooling = len(SIDES) * 2 * 4 * 5 * 12  # the mean over tokens is written as a product
    scores = 2 * 4**2 * 12
    assert step_flops(cell) == 3 * (encoders - pooling + scores)


_JOB = """
import os, subprocess, sys, time, json
sys.path.insert(0, {folder!r})
from recorder import CheckFailed, DeviceLost, Recorder

spec = json.load(open(sys.argv[1]))
lost = []
recorder = Recorder(
    spec["results"], seconds=spec["seconds"], done=spec["done"], is_alive=lambda: not lost
)

def crash():
    print("last words", flush=True)
    os.kill(os.getpid(), 9)

def hang():
    child = subprocess.Popen(["sleep", "600"])
    print("grandchild", child.pid, flush=True)
    time.sleep(600)

def lose_device():
    lost.append(True)
    raise RuntimeError("illegal address")

def fail():
    raise ValueError("of one measurement")

known = dict(crash=crash, hang=hang, lose_device=lose_device, fail=fail)
try:
    for name in spec["names"]:
        recorder.measure(name, known.get(name, lambda: {{"ms": [1.0]}}))
except DeviceLost:
    sys.exit(3)
"""


def run_script(tmp_path, names, *, seconds=60.0, script=_JOB):
    (tmp_path / "job.py").write_text(script.format(folder=str(FOLDER)))
    seen = []
    outcome = run_job(
        [sys.executable, str(tmp_path / "job.py"), str(tmp_path / "spec.json")],
        {"names": names},
        tmp_path,
        seconds=seconds,
        measurement_seconds=3.0,
        environment=os.environ,
        on_event=seen.append,
    )
    return outcome, {event["name"]: event for event in seen}


def test_a_crash_a_hang_and_a_lost_device_cost_one_measurement_each(tmp_path):
    names = ["first", "crash", "second", "fail", "lose_device", "hang", "third"]
    outcome, found = run_script(tmp_path, names)
    assert outcome.status == "complete"
    assert list(found) == names
    assert [name for name in names if found[name]["event"] == "result"] == [
        "first",
        "second",
        "third",
    ]
    assert found["crash"]["kind"] == found["hang"]["kind"] == "process"
    assert "died of SIGKILL" in found["crash"]["error"]
    assert "last words" in found["crash"]["error"]
    assert "no result after 3 s" in found["hang"]["error"]
    assert "illegal address" in found["lose_device"]["error"]
    assert 'raise ValueError("of one measurement")' in found["fail"]["error"]
    grandchild = int(outcome.log.split("grandchild ")[1].split()[0])
    assert not is_running(grandchild)


def is_running(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_job_keeps_to_its_time_limit_and_keeps_its_results(tmp_path):
    start = time.monotonic()
    outcome, found = run_script(tmp_path, ["first", "hang", "second"], seconds=2.5)
    assert time.monotonic() - start < 10
    assert outcome.status == "cut short"
    assert found["first"]["event"] == "result"
    assert found["hang"]["kind"] == "time"
    assert "second" not in found


def test_a_job_that_cannot_start_fails_once_with_its_text(tmp_path):
    outcome, found = run_script(tmp_path, [], script="raise ImportError('no such module')")
    assert outcome.status == "failed"
    assert outcome.log.count("ImportError: no such module") == 1
    assert not found


def test_sigterm_ends_the_job_and_keeps_the_record(tmp_path):
    file = tmp_path / "gpu.json"
    with subprocess.Popen(
        [sys.executable, "-m", "jaxcl.bench", "gpu", "--minutes=5", "--only=1", f"--json={file}"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"},
        text=True,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "bf16 product: time" in line:
                break
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
    record = json.loads(file.read_text())
    assert record["interrupted"] == "SIGTERM"
    assert record["results"][0]["name"] == "bf16 product"
    assert "interrupted: SIGTERM" in rest


_BLOCKED = (
    *("grain", "tensorflow_datasets", "tokenizers", "orbax", "bm25s", "tensorboardX"),
    *("array_record", "torch", "transformers", "jaxcl.host.progress"),
)
_WITHOUT = f"""
import sys, importlib

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if any(name == one or name.startswith(one + ".") for one in {_BLOCKED}):
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocker())
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def import_without(*names):
    return subprocess.run(
        [sys.executable, "-c", _WITHOUT, *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.smoke
def test_parts_1_to_5_need_little():
    programs = {job.program for job in jobs_of(range(1, 6), torch=False)}
    names = [f"jaxcl.bench.gpu.{name}" for name in ("command", "worker", *programs)]
    assert len(names) == 2 + 6
    result = import_without("jaxcl.bench.__main__", *names)
    assert result.returncode == 0, result.stderr


def test_a_heavy_import_would_be_seen():
    assert "tokenizers is blocked" in import_without("jaxcl.run.training").stderr


_PARENT = """
import sys
from jax._src import xla_bridge
from jaxcl.bench import __main__
from jaxcl.bench.gpu import command
command.jobs_of = lambda *_, **__: []
__main__.main(["gpu", "--minutes=1", "--json", sys.argv[1]])
assert not xla_bridge.backends_are_initialized()
import jax
jax.devices()
assert xla_bridge.backends_are_initialized()
"""


def test_the_parent_starts_no_device(tmp_path):
    subprocess.run(
        [sys.executable, "-c", _PARENT, str(tmp_path / "gpu.json")], cwd=ROOT, check=True
    )


def test_a_dry_run_names_every_job_and_its_limit(capsys):
    command.main(["--minutes=2", "--only=1,2", "--dry-run", "--sizes=full"])
    plan = capsys.readouterr().out
    assert "part 1, smoke: up to" in plan
    assert "part 2, parity: up to" in plan
    assert "part 3" not in plan
    assert "BERT base, 256 tokens, batch 8,192, chunks of 128" in plan


def test_an_unknown_part_is_an_error_that_lists_the_known(capsys):
    with pytest.raises(SystemExit):
        command.main(["--minutes=2", "--only=1,7"])
    assert "unknown parts 7; use some of 1, 2, 3, 4, 5, 6" in capsys.readouterr().err


def test_limits_share_the_time_by_weight():
    [first, second, *_] = these = jobs._JOBS
    limits = command._limits(these, 100.0)
    assert math.isclose(sum(limits), 100.0)
    assert math.isclose(limits[0] / limits[1], first.weight / second.weight)


def test_rates_are_printed_with_the_ceiling_of_their_framework():
    machine, loss = jobs_of({3}, torch=False)
    record = Record(None, {})
    record.add(machine, {"event": "machine", "device_kind": "NVIDIA H100 80GB HBM3"})
    ceiling = {"event": "result", "name": "bf16 product", "ms": [1.0, 2.0, 9.0], "flops": 1e12}
    record.add(machine, ceiling)
    result = {"event": "result", "name": "loss", "ms": [4.0], "flops": 5e11, "pairs": 8}
    found = record.add(loss, result)
    assert found["tflops"] == 5e11 / 4e-3 / 1e12
    assert math.isclose(found["share_of_product"], (5e11 / 4e-3) / (1e12 / 2e-3))
    assert math.isclose(found["mfu"], 5e11 / 4e-3 / 989e12)
    assert found["pairs_per_s"] == 8 / 4e-3


def test_the_sizes_of_pytorch_s_scripts_are_json():
    for sizes in (FULL, TINY):
        cells = json.loads(json.dumps(as_json(sizes)))["cells"]
        assert [cell["name"] for cell in cells] == [cell.name for cell in sizes.cells]
