"""Benchmarks run at tiny sizes and return finite values; no test depends on speed."""

import itertools
import json
import math
import os
import sys

import numpy as np
import pytest
import scipy.special

from jaxcl.bench import alternatives_jaxcl
from jaxcl.bench import bench_alternatives as alternatives
from jaxcl.bench import bench_assignment as assignment
from jaxcl.bench import bench_assignment_sizes as assignment_sizes
from jaxcl.bench import bench_embedding_bag as embedding_bag
from jaxcl.bench import bench_encode as encode
from jaxcl.bench import bench_grad_cache as grad_cache
from jaxcl.bench import bench_images as images
from jaxcl.bench import bench_lengths as lengths
from jaxcl.bench import bench_loss as loss
from jaxcl.bench import bench_nearest as nearest
from jaxcl.bench import bench_sentences as sentences
from jaxcl.bench import bench_static as static
from jaxcl.bench import bench_token_table as token_table
from jaxcl.bench import bench_train_step as train_step
from jaxcl.bench import bench_transformer_step as transformer_step
from jaxcl.bench.__main__ import BENCHMARKS, as_table, main
from jaxcl.bench.bench_embedding_bag import BagShape
from jaxcl.bench.bench_train_step import StepShape
from jaxcl.data.python_functions import SourceRoot
from jaxcl.models.embedding_bag import IMPLEMENTATIONS
from jaxcl.settings.changed import changed_config
from jaxcl.settings.config_files import load_config
from tests.run.encoded.folders import TEXTS, write_folder

_SHAPES = {
    "static": StepShape(
        model="static",
        options={"max_tokens": 9},
        dropout=0.4,
        dim=8,
        batch_size=16,
        max_tokens={"query": 4, "key": 9},
        mean_tokens={"query": 2, "key": 5},
        steps=2,
        num_rows=50,
        vocabulary_size=40,
    ),
    "transformer": StepShape(
        model="transformer",
        options={
            "max_tokens": 8,
            "hidden_dim": 12,
            "num_layers": 2,
            "num_heads": 3,
            "mlp_dim": 16,
            "compute_dtype": "float32",
        },
        dropout=0.1,
        dim=8,
        batch_size=16,
        max_tokens={"query": 8, "key": 8},
        mean_tokens={"query": 5, "key": 5},
        steps=2,
        num_rows=50,
        vocabulary_size=40,
    ),
}


def _is_figure(value: float) -> bool:
    return value > 0 and math.isfinite(value)


@pytest.fixture
def torch_python() -> str:
    """An interpreter with torch, which need not be in jaxcl's environment."""
    path = os.environ.get("JAXCL_TORCH_PYTHON")
    if not path:
        pytest.skip("JAXCL_TORCH_PYTHON names no interpreter with torch")
    return path


@pytest.mark.parametrize("model", ["static", pytest.param("transformer", marks=pytest.mark.slow)])
def test_the_step_and_the_loop_are_timed(model):
    record = train_step.measure(_SHAPES[model], rounds=2)
    assert set(record["rounds"]) == {"jaxcl step", "jaxcl loop"}
    assert all(len(rates) == 2 for rates in record["rounds"].values())
    assert all(map(_is_figure, itertools.chain.from_iterable(record["rounds"].values())))
    assert math.isfinite(record["facts"]["share of the loop not XLA's"])


@pytest.mark.parametrize("model", _SHAPES)
@pytest.mark.parametrize("variant", ["ragged", "padded", "einsum"])
def test_pytorch_computes_the_same_model(model, variant, torch_python):
    record = train_step.measure(
        _SHAPES[model], rounds=1, torch_python=torch_python, torch_variant=variant
    )
    assert record["facts"]["relative difference of the first loss"] < 1e-5
    assert record["facts"]["relative difference of the first gradient norm"] < 1e-5
    assert math.isfinite(record["rounds"]["PyTorch step"][0])


def test_another_model_in_pytorch_is_refused(torch_python, monkeypatch):
    twin_spec = train_step._twin_spec

    def without_heads(*arguments):
        return {**twin_spec(*arguments), "num_heads": 1}

    monkeypatch.setattr(train_step, "_twin_spec", without_heads)
    with pytest.raises(RuntimeError, match="not the same model"):
        train_step.measure(_SHAPES["transformer"], rounds=1, torch_python=torch_python)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_all_ways_to_the_loss_are_timed_and_agree(devices, monkeypatch):
    monkeypatch.setattr("jaxcl.bench.timing.memory_bytes", lambda: 2**23)
    record = loss.measure(16, 4, rounds=2, devices=devices)
    assert len(record["rounds"]) == 2 * (3 if devices == 1 else 4)
    assert all(map(_is_figure, itertools.chain.from_iterable(record["rounds"].values())))
    fits = {name.split(", ")[1]: n for name, n in record["facts"].items() if "largest" in name}
    assert fits["reference"] < fits["tiled"]


def test_ways_that_do_not_agree_are_refused(monkeypatch):
    monkeypatch.setattr(loss, "_local_pair", lambda q, k, **_: (q * k).sum(1))
    with pytest.raises(RuntimeError, match="open_clip's pair differs from the reference"):
        loss.measure(16, 4, rounds=1)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="--batch=15 does not divide over 8 devices"):
        loss.measure(15, 4, rounds=1, devices=8)


@pytest.mark.slow
def test_the_gradient_cache_is_timed_next_to_the_whole_batch(monkeypatch):
    monkeypatch.setattr("jaxcl.bench.timing.memory_bytes", lambda: 2**10)
    record = grad_cache.measure(batch=8, chunk=2, tokens=4, dim=8, layers=1, rounds=2)
    assert set(record["rounds"]) == {"whole batch", "chunks of 2"}
    assert all(map(_is_figure, itertools.chain.from_iterable(record["rounds"].values())))
    assert record["facts"]["chunks / whole, median"] > 0


def test_the_nearest_rows_are_timed_by_tile():
    record = nearest.measure(30, 4, count=3, tiles=[8, 16], rounds=2)
    assert {"tiles of 8", "tiles of 16"} <= set(record["rounds"])
    assert all(map(_is_figure, itertools.chain.from_iterable(record["rounds"].values())))


@pytest.mark.slow
def test_assignment_methods_are_measured_in_separate_processes():
    methods = ["random", "balanced k-means"]
    sizes = ["--rows=2000", "--dim=16", "--batch", "16", "--recall"]
    record = assignment.main([*sizes, "--methods", *methods])
    assert set(record["rounds"]) == {f"{method}, batch 16" for method in methods}
    assert all(_is_figure(seconds) for [seconds] in record["rounds"].values())
    closed = [record["facts"][f"gap closed, {method}, batch 16"] for method in methods]
    assert abs(closed[0]) < 0.05
    assert closed[1] > 0.1
    # Eight clusters of 256 are all rows, and eight of 128 are half of them.
    all_probed, light = (
        record["facts"][f"recall of the ten nearest, {name}"] for name in ("clustered", "light")
    )
    assert 0.99 < all_probed <= 1
    assert 0.2 < light < all_probed - 0.05


def test_each_number_of_rows_is_ordered_once_and_then_in_every_round(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "jaxcl.bench.bench_assignment_sizes.assign",
        lambda queries, keys, *, seed, **options: calls.append((len(queries), seed)),
    )
    record = assignment_sizes.main(["--rows", "20", "21", "--dim", "4", "--rounds", "2"])
    assert calls == [(num_rows, seed) for num_rows in (20, 21) for seed in (0, 1, 2)]
    assert {name: len(seconds) for name, seconds in record["rounds"].items()} == {
        "20 rows": 2,
        "21 rows": 2,
    }
    assert set(record["facts"]) == {f"s of the first call, {num} rows" for num in (20, 21)}


def test_no_round_is_an_error(capsys):
    with pytest.raises(SystemExit):
        assignment_sizes.main(["--rounds", "0"])
    assert "--rounds must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("sizes", [(9, 7, 10, 8), (7, 7, 7, 13), (8, 8, 8, 2), (5, 9, 9, 9)])
def test_parts_of_about_a_batch_become_batches(sizes):
    parts = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    order = assignment._in_batches(parts, len(sizes), 8)
    assert sorted(order.tolist()) == list(range(sum(sizes)))
    batches = [parts[order[first : first + 8]] for first in range(0, len(order) - 7, 8)]
    # Each batch except the last comes from one part, as far as possible.
    smallest = int(np.argmin(sizes))
    for part, batch in zip(np.delete(np.arange(len(sizes)), smallest), batches, strict=False):
        assert (batch == part).sum() == min(8, sizes[part])


def test_all_implementations_of_the_bag_are_timed():
    shape = BagShape(batch_size=3, width=5, mean_tokens=2, hidden_dim=4, vocabulary_size=7)
    record = embedding_bag.measure([shape], rounds=2)
    assert len(record["rounds"]) == 2 * len(IMPLEMENTATIONS)
    assert all(map(_is_figure, itertools.chain.from_iterable(record["rounds"].values())))


@pytest.fixture(scope="module")
def static_folder(tmp_path_factory):
    return str(write_folder("static", tmp_path_factory.mktemp("static")))


def test_encoding_is_timed(static_folder):
    record = encode.measure(static_folder, texts=TEXTS, side="key", rounds=2)
    assert list(record["rounds"]) == ["jaxcl"]
    assert all(map(_is_figure, record["rounds"]["jaxcl"]))
    assert _is_figure(record["facts"]["CPU ms a text, jaxcl"])


def test_sentence_transformers_encodes_the_same(static_folder, torch_python):
    record = encode.measure(
        static_folder, texts=TEXTS, side="key", rounds=1, torch_python=torch_python
    )
    assert record["facts"]["largest difference of a number"] < 1e-6
    assert _is_figure(record["rounds"]["sentence-transformers"][0])


def test_vectors_of_another_model_are_refused():
    with pytest.raises(RuntimeError, match=r"differ by up to 2\.0e-05; these are different models"):
        encode._agreement(np.float32([[1]]), np.float32([[1 + 2e-5]]))


def test_texts_of_the_standard_library_are_docstrings_and_functions(monkeypatch, tmp_path):
    body = [
        '    """Halve a number, whatever its kind."""',
        "    half = number / 2",
        "    return half",
    ]
    function = "\n".join(["def half(number):", *body, ""])
    (tmp_path / "numbers.py").write_text(function)
    monkeypatch.setattr(encode, "installed_roots", lambda: [SourceRoot(tmp_path, "stdlib")])
    docstring, source = encode.standard_library_texts(2)
    assert docstring == "Halve a number, whatever its kind."
    assert source.startswith("def half(number):")
    with pytest.raises(ValueError, match="--num-texts=3; the standard library has 2"):
        encode.standard_library_texts(3)


def test_the_json_has_the_machine_and_the_measurements(tmp_path, monkeypatch, capsys):
    shape = BagShape(batch_size=3, width=5, mean_tokens=2, hidden_dim=4, vocabulary_size=7)
    monkeypatch.setattr(embedding_bag, "DEFAULT_SHAPES", [shape])
    record = main(["embedding_bag", "--rounds", "1", "--json", str(tmp_path / "bag.json")])
    assert json.loads((tmp_path / "bag.json").read_text()) == record
    assert {"commit", "device", "cpu", "versions", "shapes", "summary"} <= set(record)
    assert as_table(record) in capsys.readouterr().out


def test_an_unknown_benchmark_is_an_error_that_lists_the_known(capsys):
    with pytest.raises(SystemExit):
        main(["no_such_benchmark"])
    message = capsys.readouterr().err
    assert all(name in message for name in BENCHMARKS)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--help"], "{alternatives,assignment,"),
        (["assignment", "--help"], "'bisection, exact, longer'"),
    ],
)
def test_help_is_of_all_or_of_a_benchmark(arguments, wanted, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert not stopped.value.code
    assert wanted in " ".join(capsys.readouterr().out.split())


def test_batches_of_more_rows_than_there_are_are_an_error(capsys):
    with pytest.raises(SystemExit):
        main(["assignment", "--rows", "20", "--dim", "4", "--batch", "8", "32"])
    assert "--batch [8, 32]: there are 20 rows" in capsys.readouterr().err


@pytest.mark.slow
def test_the_benchmark_of_token_tables_measures_all_stages():
    stages = ["build", "open", "files", "start", "resume"]
    record = token_table.measure(600, stages=stages, few_rows=560)
    assert [*record["rounds"]] == [
        *("build", "open", "first batch", "files read and split", "files split again"),
        *("run of 2 steps", "resumed for 2 more"),
    ]
    assert record["facts"]["distinct texts"] == 540  # every tenth key is the previous row's
    for stage in stages:
        assert record["facts"][f"{stage}: peak MiB with 560 rows"] > 100


_ALTERNATIVES = {"batch": 40, "dim": 8, "rows": 90, "count": 3, "step_batch": 4, "tokens": 9}


def test_the_loss_is_measured_in_a_process_of_its_own(monkeypatch):
    monkeypatch.setattr(alternatives, "PARTS", {"loss": ("reference",)})
    reference = alternatives._PROGRAMS[True]
    monkeypatch.setattr(alternatives, "_PROGRAMS", {True: reference, False: reference})
    record = alternatives.measure(
        part="loss", torch_python=sys.executable, rounds=2, **_ALTERNATIVES
    )
    assert set(record["rounds"]) == {"jaxcl", "reference"}
    assert all(map(_is_figure, itertools.chain.from_iterable(record["rounds"].values())))
    assert record["facts"]["peak MB, jaxcl"] > 0


def test_the_measured_loss_is_the_symmetric_loss(tmp_path):
    spec, arrays = alternatives._loss(_ALTERNATIVES)
    value, *norms = alternatives_jaxcl.prepare_loss(spec, arrays)()
    scores = arrays["queries"].astype(float) @ arrays["keys"].astype(float).T / spec["temperature"]
    expected = [scipy.special.logsumexp(scores, axis=axis) - np.diagonal(scores) for axis in (0, 1)]
    np.testing.assert_allclose(float(value), np.mean(expected), rtol=1e-5)
    assert all(map(_is_figure, map(float, norms)))


def test_programs_that_compute_something_else_are_refused():
    answers = {"jaxcl": [{"values": [1.0, 2.0]}], "faiss, flat": [{"values": [1.0, 2.1]}]}
    with pytest.raises(RuntimeError, match="faiss, flat"):
        alternatives._largest_difference(answers, 1e-4)
    answers["faiss, flat"] = [{"values": [1.0, 2.00001]}]
    assert 0 < alternatives._largest_difference(answers, 1e-4) < 1e-4


@pytest.mark.parametrize("part", alternatives.PARTS)
def test_the_alternatives_compute_the_same(part, torch_python, static_folder, monkeypatch):
    model = os.environ.get("JAXCL_MODEL")
    if part in ("step", "texts") and not model:
        pytest.skip("JAXCL_MODEL names no folder of a pretrained transformer")
    sizes = {**_ALTERNATIVES, "model": model}
    record = alternatives.measure(part=part, torch_python=torch_python, rounds=1, **sizes)
    assert set(record["rounds"]) == {"jaxcl", *alternatives.PARTS[part]}


def test_a_static_encoder_is_trained_and_ranked(smoke_pairs, monkeypatch):
    config = changed_config(
        load_config("code_search:smoke"),
        {
            **{"data.name": str(smoke_pairs), "run.data_dir": str(smoke_pairs.parents[1])},
            **{"data.vocabulary_size": 1000, "model.dim": 16},
        },
    )
    monkeypatch.setattr(static, "load_config", lambda name: config)
    record = static.measure(seeds=1, steps=4, max_pairs=600, torch_rates=(), torch_python=None)
    assert set(record["rounds"]) == {"jaxcl, validation", "jaxcl, test"}
    assert all(map(_is_figure, itertools.chain.from_iterable(record["rounds"].values())))


@pytest.mark.slow
def test_every_way_to_train_sentence_embeddings_is_evaluated(static_folder, tmp_path):
    numbers = [f"{one} {two} {three}" for one in "abc" for two in "def" for three in "ghi"]
    pairs = [{"sentence1": text, "sentence2": text[::-1]} for text in numbers]
    for name, rows in (("pairs", pairs), ("texts", [{"text": text} for text in numbers])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    others = np.random.default_rng(0).permutation(numbers)
    scored = [f"{text},{others[row]},{row}" for row, text in enumerate(numbers)]
    (tmp_path / "sts.csv").write_text("\n".join(["sentence1,sentence2,score", *scored]))
    record = sentences.measure(
        model=static_folder,
        pairs=str(tmp_path / "pairs.jsonl"),
        texts=str(tmp_path / "texts.jsonl"),
        sts=str(tmp_path / "sts.csv"),
        num_pairs=24,
        batch=8,
        learning_rate=1e-2,
        seeds=1,
        torch_python=None,
    )
    ways = [
        f"{kind}, {way} batches" for kind in ("simcse", "pairs") for way in ("random", "assigned")
    ]
    assert set(record["rounds"]) == {"frozen", *ways}
    values = [one for (one,) in record["rounds"].values()]
    assert all(-1 <= value <= 1 for value in values)
    assert len(set(values)) > 1  # training changes the similarities


def test_the_benchmark_of_images_measures_decoding_waiting_and_augmentations():
    record = images.measure(
        [16, 32], [1, 2], rounds=2, num_images=5, batch_size=4, num_steps=3, result=8
    )
    names = [f"{kind}, {n} threads" for kind in ("JPEG 16", "JPEG 32", "PNG 16") for n in (1, 2)]
    presets = [f"augmentation, {name}" for name in ("simclr", "moco_v2", "clip")]
    assert list(record["rounds"]) == names + presets
    assert all(rate > 0 for rates in record["rounds"].values() for rate in rates)
    shares = [record["facts"][f"{name}: share of a step spent waiting"] for name in names]
    assert all(0 <= share <= 1 for share in shares)
    assert record["facts"]["PNG 16: bytes per image"] > record["facts"]["JPEG 16: bytes per image"]


def test_several_widths_leave_less_padding_in_the_benchmark_of_lengths():
    changes = {"global_batch_size": 64, "data.vocabulary_size": 600}
    record = lengths.measure(["questions"], num_rows=200, devices=[2], changes=changes)
    (before,), (after,) = record["rounds"].values()
    assert 0 < after < 0.5 < before < 1
    assert record["facts"]["questions: widths of each key"].endswith(" 512")


_TRANSFORMER = {
    "rows": 3, "tokens": 5, "hidden": 8, "layers": 1, "heads": 2, "vocabulary": 11
}  # fmt: skip


def test_the_parts_of_a_transformer_s_step_are_timed():
    record = transformer_step.measure(torch_python=None, rounds=2, **_TRANSFORMER)
    assert {"encoder, jaxcl", "product xᵀ g, jaxcl", "dropout, jaxcl"} < set(record["rounds"])
    assert all(len(figures) == 2 for figures in record["rounds"].values())
    name = "product x W, jaxcl"
    operations = 2 * (3 * 5) * 8 * (4 * 8)  # 15 rows of width 8, 32 results each
    seconds = min(record["rounds"][name]) / 1e3
    rate = record["facts"][f"GFLOP per CPU second, {name}"]
    assert rate == pytest.approx(operations / seconds / 1e9)


def test_pytorch_has_the_same_parts_of_a_transformer_s_step(torch_python):
    record = transformer_step.measure(torch_python=torch_python, rounds=1, **_TRANSFORMER)
    parts = {name.removesuffix(", jaxcl") for name in record["rounds"] if "jaxcl" in name}
    assert set(record["rounds"]) == {f"{p}, {way}" for p in parts for way in ("jaxcl", "PyTorch")}
