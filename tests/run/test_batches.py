"""Runs that reassign batches: each row once per epoch, and the same rows after any restart."""

import contextlib
import functools
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxcl.configs.code_search import get_config
from ml_collections import ConfigDict

from jaxcl.assignment import (
    METHODS,
    Assigned,
    AssignedRows,
    GapReport,
    SourcedRows,
    count_conflicts,
    make_order,
    uniform_rows,
    visited,
)
from jaxcl.data.code_pairs import prepare_code_pairs
from jaxcl.data.loader import training_batches
from jaxcl.data.prepare import RunData, prepare_data
from jaxcl.data.python_functions import SourceRoot
from jaxcl.run.batches import RunBatches, _batches_of_next_epoch, _num_measured
from jaxcl.run.checkpoint import Checkpoints
from jaxcl.run.metric_writer import read_metrics
from jaxcl.run.opened import open_run
from jaxcl.settings.read import read_settings
from jaxcl.step.train_state import TrainState
from jaxcl.topics import topics
from jaxcl.train import train
from tests.helpers import bits, training_of, unclocked, unit_vectors

TOPICS = ("socket network port", "ledger money account", "window screen pixel", "folder disk path")
TOPICS += ("matrix vector tensor", "recipe oven flour", "planet orbit comet", "violin cello flute")
TOPICS += ("garden seed soil", "river lake ocean", "doctor nurse clinic", "engine wheel brake")
VERBS = ("open", "close", "count", "merge", "split", "drop", "find", "paint", "lend", "weigh")
ROWS, BATCH, BLOCK, STEPS, EVERY, DIM = 107, 16, 8, 17, 3, 16
CHOICES = [3, 6, 9, 12, 15]  # epochs end within steps 6 and 13
GCBS = "assignment.gcbs."
SMALL = {
    "data.vocabulary_size": 600,
    "model.dim": DIM,
    "global_batch_size": BATCH,
    "steps": STEPS,
    "optimizer.learning_rate": 2e-2,
    "optimizer.warmup_steps": 1,
    "evaluation.methods": ("dense",),
    "evaluation.batch_size": 64,
    "assignment.name": "gcbs",
    f"{GCBS}picture": True,
    f"{GCBS}refresh_every": EVERY,
    f"{GCBS}block_size": BLOCK,
    f"{GCBS}preset": "full",
    f"{GCBS}neighbours": 8,
    "run.log_every": 1,
    "run.checkpoint_every": 4,
}
BANK = {f"{GCBS}embeddings": "bank", "negatives.bank.kind": "instance", f"{GCBS}picture": False}
SHARES = tuple((group, 1.0 + group % 3) for group in range(10))
SOURCED = {"assignment.name": "sourced"}
RUNS: dict[str, dict[str, Any]] = {
    "bisection": {},
    "rcm_device": {f"{GCBS}method": "rcm_device", **BANK},
    "rcm": {f"{GCBS}method": "rcm"},  # without matplotlib
    "single": {
        "assignment.sourced.mix": "single",
        "assignment.sourced.temperature": 2.0,
        **SOURCED,
    },
    "mixed": {"assignment.sourced.weights": SHARES, **SOURCED},
}


of_each_method = pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=[] if name == "bisection" else [pytest.mark.slow])
        for name in METHODS
    ],
)


class Choice(NamedTuple):
    """A refreshed state, the embeddings that the method ordered, and their order."""

    state: TrainState
    sides: list[np.ndarray]
    temperature: float
    keep_apart: Any
    order: np.ndarray


class Run(NamedTuple):
    """A finished run, with the rows of each step."""

    config: ConfigDict
    workdir: Path
    data: RunData
    rows: np.ndarray
    choices: list[Choice]
    said: str


def functions(topic: str) -> Iterator[str]:
    first, second, third = topic.split()
    # Repeated tokens of a text are dropped, so the last query equals the first.
    for verb, more in (*((verb, "") for verb in VERBS), (VERBS[0], f" and {third}")):
        query = f"{verb.title()} the {first} of {second} and {third}{more}."
        name = f"{verb}_{first}_again" if more else f"{verb}_{first}"
        body = f"{second} = find_{first}(name)\n    {third} = {second}.{verb}('{more}')"
        yield f'def {name}(name):\n    """{query}"""\n    {body}\n    return {third}\n'


@pytest.fixture(scope="module")
def configured(tmp_path_factory):
    """A config, with changes, over functions of twelve topics with one group each."""
    folder = tmp_path_factory.mktemp("reassign")
    for topic in TOPICS:
        package = folder / "site" / topic.split()[0]
        package.mkdir(parents=True)
        package.joinpath("__init__.py").write_text("\n\n".join(functions(topic)))
    whole = {"test_packages": (), "validation_fraction": 0.0}
    pairs = prepare_code_pairs(folder / "data", roots=[SourceRoot(folder / "site")], **whole)
    places = {"data.name": str(pairs.directory), "run.data_dir": str(folder / "data")}

    def config(**changes) -> ConfigDict:
        made = get_config("smoke")
        made.update_from_flattened_dict(SMALL | places)
        made.update_from_flattened_dict(changes)
        with made.unlocked():
            made.data.splits = ConfigDict({"train": f"train[:{ROWS}]"})
            made.data.splits.validation = f"train[{ROWS}:]"
        return made

    return config


@pytest.fixture(scope="module")
def run_of(configured, tmp_path_factory):
    """A function that returns a run of `RUNS` by name, trained on first use."""
    find = importlib.util.find_spec

    def without_matplotlib(name, *package):
        return None if name == "matplotlib" else find(name, *package)

    @functools.cache
    def run(name: str) -> Run:
        config, workdir = configured(**RUNS[name]), tmp_path_factory.mktemp(name)
        with watched() as (patch, rows, choices, said):
            if name == "rcm":
                patch.setattr("importlib.util.find_spec", without_matplotlib)
            train(config, workdir)
        data = data_of(config, workdir)
        return Run(config, workdir, data, np.stack(rows), choices, said.getvalue())

    return run


@contextlib.contextmanager
def watched():
    """Record the steps of a run without changing it."""
    rows, states, choices, said = [], [], [], io.StringIO()
    refresh = RunBatches.refresh

    def batches(*arguments, **options):
        for batch in training_batches(*arguments, **options):
            rows.append(np.asarray(batch["row"]))
            yield batch

    def refreshing(self, state):
        states.append(jax.tree.map(np.array, state._replace(key=0)))  # the buffers are donated
        return refresh(self, state)

    def ordering(*arguments, **options):
        order = make_order(*arguments, **options)

        def noted(queries, keys, temperature, key, keep_apart, *, report):
            ordered = order(queries, keys, temperature, key, keep_apart, report=report)
            sides = [np.array(side[:ROWS]) for side in (queries, keys)]
            choices.append(Choice(states[-1], sides, float(temperature), keep_apart, ordered.rows))
            return ordered

        return noted

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr("jaxcl.train.training_batches", batches)
        patch.setattr("jaxcl.run.batches.make_order", ordering)
        patch.setattr(RunBatches, "refresh", refreshing)
        yield patch, rows, choices, said


def data_of(config: ConfigDict, workdir: Path) -> RunData:
    return prepare_data(
        read_settings(config).data, data_dir=Path(config.run.data_dir), workdir=workdir
    )


def newest_state(config: ConfigDict, workdir: Path) -> TrainState:
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.restore_latest(training_of(config).abstract_state(ROWS)).state


@of_each_method
def test_each_method_trains_on_each_row_once_per_epoch(run_of, method):
    run = run_of(method)
    assert len(run.rows) == STEPS == sum("loss" in record for record in unclocked(run.workdir))
    visits = run.rows.ravel()
    for begin in range(0, visits.size, ROWS):
        epoch = visits[begin : begin + ROWS]
        assert len(set(epoch)) == len(epoch)
    for step, rows in enumerate(run.rows):
        uniform = uniform_rows(step, num_rows=ROWS, batch_size=BATCH, seed=0)
        assert (rows == uniform).all() == (step < EVERY), step


@of_each_method
def test_a_run_trains_on_the_batches_of_its_newest_order(run_of, method):
    run = run_of(method)
    visits, text = run.rows.ravel(), run.data.tables["train"].text
    sizes = {"batch_size": BATCH, "block_size": BLOCK, "seed": 0}
    for choice, step in zip(run.choices, CHOICES, strict=True):
        seen, position = np.zeros(ROWS, bool), step * BATCH
        seen[visits[position - position % ROWS : position]] = True
        assert 0 < seen.sum() < ROWS
        rows_of = AssignedRows(Assigned(choice.order, seen, step), **sizes, keep_apart=(text,))
        for later in range(step, min(step + EVERY, STEPS)):
            np.testing.assert_array_equal(run.rows[later], rows_of(later))


@pytest.mark.slow
def test_a_run_killed_during_reassignment_ends_as_if_uninterrupted(run_of, tmp_path):
    class Killed(Exception):
        pass

    def killing(*arguments, step, **options):  # which comes after the order
        if step == CHOICES[2]:
            raise Killed
        return visited(*arguments, step=step, **options)

    whole = run_of("bisection")
    with watched() as (patch, _, choices, _):
        patch.setattr("jaxcl.run.batches.visited", killing)
        with pytest.raises(Killed):
            train(whole.config, tmp_path)
    assert len(choices) == 3
    assert CHOICES[1] < int(newest_state(whole.config, tmp_path).step) < CHOICES[2]
    train(whole.config, tmp_path)
    ours, theirs = (newest_state(whole.config, folder) for folder in (tmp_path, whole.workdir))
    assert jax.tree.map(bits, ours) == jax.tree.map(bits, theirs)
    assert unclocked(tmp_path) == unclocked(whole.workdir)
    assert (tmp_path / "results.json").read_text() == (whole.workdir / "results.json").read_text()


def test_a_reassignment_encodes_all_rows_with_the_current_model(run_of):
    run = run_of("bisection")
    embed, table = training_of(run.config).embed, run.data.tables["train"]
    for choice in run.choices:
        for side, found in zip(("query", "key"), choice.sides, strict=True):
            read = functools.partial(table.side, side)
            wanted = embed(choice.state.params["towers"], side, read, ROWS)
            np.testing.assert_array_equal(found, wanted)
        log_temperature = choice.state.params["log_temperature"]
        assert choice.temperature == pytest.approx(np.exp(log_temperature), rel=1e-6)
    assert len({choice.sides[0].tobytes() for choice in run.choices}) == len(CHOICES)


def test_an_assignment_from_the_bank_uses_its_vectors(run_of):
    run = run_of("rcm_device")
    for choice, step in zip(run.choices, CHOICES, strict=True):
        for side, found in zip(("query", "key"), choice.sides, strict=True):
            bank = choice.state.memory["bank"][side]
            np.testing.assert_array_equal(found, bank.vectors[:ROWS])
            assert found.any(1).sum() == min(step * BATCH, ROWS)


@pytest.mark.parametrize("method", METHODS)
def test_each_reassignment_is_measured(run_of, method):
    records = [one for one in read_metrics(run_of(method).workdir) if "assignment/gap" in one]
    assert [record["step"] for record in records] == CHOICES
    names = {*GapReport._fields, "train_loss_before", "gap_before", "closed_before"}
    names = {f"assignment/{name}" for name in names}
    names |= set() if method == "rcm" else {"machine/assignment_mebibytes"}
    times = {f"time/assignment_{what}seconds" for what in ("", "encode_", "order_")}
    for record in records:
        assert set(record) == {"step"} | names | times
        assert min(record[name] for name in times) > 0
    # The batches before the first assignment are random. The bank is half empty then; an assignment
    # from it still closes more of the gap than none.
    least = 0.1 if method != "rcm_device" else 0.0
    assert records[0]["assignment/closed"] > records[0]["assignment/closed_before"] + least
    for record in records:
        shares = (record[f"assignment/{name}"] for name in ("closed", "closed_before"))
        closed, before = (f"{round(100 * share)}%" for share in shares)
        seconds = f"{record['time/assignment_seconds']:.1f} s"
        line = f"reassigned the batches after step {record['step']} in {seconds}: they close "
        line += f"{closed} of the gap to the loss over all rows (before: {before}); their loss is "
        ours, theirs = record["assignment/train_loss"], record["assignment/train_loss_before"]
        line += f"{ours - theirs:.2f} higher" if ours >= theirs else f"{theirs - ours:.2f} lower"
        assert f"{line}\n" in run_of(method).said


@pytest.mark.parametrize("method", METHODS)
def test_a_reassignment_reports_progress_and_compiles_once(run_of, method):
    said = run_of(method).said
    stages = {
        f"compiling the search for up to {ROWS} rows": int(method != "rcm"),
        f"searching for the order of {ROWS} rows": len(CHOICES) * (method != "rcm"),
        f"compared {ROWS} of {ROWS} rows with all others": len(CHOICES) * (method == "rcm"),
    }
    assert {line: said.count(line) for line in stages} == stages


def test_pictures_are_drawn_where_they_are_wanted_and_can_be(run_of):
    drawn = sorted((run_of("bisection").workdir / "assignment").iterdir())
    assert [path.name for path in drawn] == [f"step-{step:06d}.png" for step in CHOICES]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    for method, times in (("bisection", 0), ("rcm_device", 0), ("rcm", 1)):
        assert run_of(method).said.count("pip install 'jaxcl[pictures]'") == times
        assert (run_of(method).workdir / "assignment").exists() == (method == "bisection")


@pytest.mark.parametrize(
    ("mix", "options"), [("single", {"temperature": 2.0}), ("mixed", {"weights": dict(SHARES)})]
)
def test_batches_by_source_are_trained_on(run_of, mix, options):
    run = run_of(mix)
    group = run.data.tables["train"].group
    rows_of = SourcedRows(group, batch_size=BATCH, seed=0, mix=mix, **options)
    np.testing.assert_array_equal(run.rows, [rows_of(step) for step in range(STEPS)])
    counts = [len(set(group[rows])) for rows in run.rows]
    assert (max(counts) == 1) if mix == "single" else (min(counts) > 3)


def sourced_batches(config: ConfigDict, tmp_path: Path):
    data = data_of(config, tmp_path)
    program = training_of(config)
    return RunBatches(program, data, tmp_path).rows_of(program.init(ROWS)), data


def test_batches_may_be_of_one_topic_each(configured, tmp_path):
    topic = np.random.default_rng(0).integers(-2, 4, ROWS)
    np.savez(tmp_path / "topics.npz", topic=topic)
    by = {"data.topics": str(tmp_path / "topics.npz"), "assignment.sourced.by": "topic"}
    config = configured(**SOURCED, **by, **{"assignment.sourced.mix": "single"})
    rows_of, _ = sourced_batches(config, tmp_path)
    found = [set(topic[rows_of(step)]) for step in range(40)]
    assert all(len(topics) == 1 for topics in found)
    assert set.union(*found) == set(topic)


def test_batches_mix_data_sets_by_weight(configured, tmp_path):
    by = {"assignment.sourced.by": "data_set"}
    config = configured(
        **SOURCED, **by, **{"assignment.sourced.weights": (("first", 3.0), ("b", 1.0))}
    )
    followed(config)
    rows_of, data = sourced_batches(config, tmp_path)
    source = data.sources["train"].data_set_of_row
    assert set(source[:ROWS]) == {0}
    assert set(source[ROWS:]) == {1}
    assert [int(source[rows_of(step)].sum()) for step in range(8)] == [BATCH // 4] * 8


@pytest.mark.parametrize("temperature", [1.0, 2.0, float("inf")])
def test_batches_mix_data_sets_by_temperature(configured, tmp_path, temperature):
    by = {"assignment.sourced.by": "data_set", "assignment.sourced.temperature": temperature}
    config = configured(**SOURCED, **by)
    followed(config)
    rows_of, data = sourced_batches(config, tmp_path)
    source = data.sources["train"].data_set_of_row
    sizes = np.bincount(source)
    share = sizes[1] ** (1 / temperature) / (sizes ** (1 / temperature)).sum()
    counts = [int(source[rows_of(step)].sum()) for step in range(8)]
    assert set(counts) <= {int(BATCH * share), int(BATCH * share) + 1}
    assert abs(sum(counts) - 8 * BATCH * share) < 1  # before step 8, a power of two


def followed(config: ConfigDict) -> None:
    """Append more rows of the data set to the training rows, as a data set "b"."""
    held_out = ROWS + 15
    with config.unlocked():
        config.data.splits.validation = f"train[{held_out}:]"
        config.data.concatenated.b = ConfigDict(
            {
                "name": config.data.name,
                "splits": {"train": f"train[{ROWS}:{held_out}]"},
                "group_field": "group",
            }
        )


@pytest.mark.parametrize(
    ("by", "weights", "message"),
    [
        ("data_set", (("c", 1.0),), "weights has c, but the data sets are first, b; give each"),
        ("data_set", (("first", 1.0),), "weights has first, but the data sets are first, b"),
        ("data_set", ((0, 1.0), ("b", 1.0)), "weights has 0, b, but the data sets are first, b"),
        ("group", (("b", 1.0),), "by='group', sources are numbers; only data sets have names"),
        ("group", ((0, 1.0), (0, 2.0)), "has a source twice"),
    ],
)
def test_weights_of_sources_that_are_not_there_are_named(
    configured, tmp_path, by, weights, message
):
    sourced = {"assignment.sourced.by": by, "assignment.sourced.weights": weights}
    config = configured(**SOURCED, **sourced)
    followed(config)
    with pytest.raises(ValueError, match=message):
        sourced_batches(config, tmp_path)


@pytest.mark.slow
def test_a_run_of_two_data_sets_finds_topics_for_the_next(configured, tmp_path):
    out = tmp_path / "topics.npz"
    short = {"steps": 4, "run.checkpoint_every": 2}
    config = configured(**SOURCED, **short, **{"assignment.sourced.by": "data_set"})
    followed(config)
    train(config, tmp_path / "first")
    topics(tmp_path / "first", out, num_topics=5)
    run = open_run(tmp_path / "first")
    source = run.sources()["train"]
    table = run.table("train", source)
    assert table.num_rows == len(source) > ROWS
    for side, found in run.embeddings("train", source).items():
        values = [record[side] for record in source.read(np.arange(table.num_rows))]
        np.testing.assert_array_equal(found, run.encoder.encode(side, values))

    by = {"assignment.sourced.by": "topic", "assignment.sourced.mix": "single"}
    config = configured(**SOURCED, **short, **by, **{"data.topics": str(out)})
    with pytest.raises(ValueError, match="was made from other rows"):  # only the first data set
        train(config, tmp_path / "other")
    followed(config)
    with watched() as (_, rows, *_):
        train(config, tmp_path / "next")
    topic = np.load(out)["topic"]
    rows_of = SourcedRows(topic, batch_size=BATCH, seed=0, mix="single")
    np.testing.assert_array_equal(rows, [rows_of(step) for step in range(4)])
    np.savez(out, **{**np.load(out), "topic": topic[::-1]})
    with pytest.raises(ValueError, match=r"the file of data\.topics has changed"):
        train(config, tmp_path / "next")


def with_memory(state: TrainState, step: int, **parts) -> TrainState:
    """The state at another step, with some parts of its memory replaced."""
    old = state.step, state.memory
    new = jnp.int32(step), state.memory | parts
    step, memory = jax.tree.map(lambda leaf, was: jax.device_put(leaf, was.sharding), new, old)
    return state._replace(step=step, memory=memory)


def planted(state: TrainState, vectors: np.ndarray) -> TrainState:
    """The state before the sixth step, with these vectors in the bank for both sides."""
    banks = state.memory["bank"]
    slots = np.zeros(banks["key"].vectors.shape, np.float32)
    slots[:ROWS] = vectors
    return with_memory(state, 5, bank={side: banks[side]._replace(vectors=slots) for side in banks})


def epoch_of(rows_of, epoch: int) -> tuple[int, np.ndarray]:
    """The position in its first batch at which an epoch begins, and the rows of the epoch."""
    first, begin = divmod(epoch * ROWS, BATCH)
    rows = [rows_of(first + number) for number in range(-(-(begin + ROWS) // BATCH))]
    return begin, np.concatenate(rows)[begin : begin + ROWS]


def test_rows_of_equal_text_keep_out_of_each_others_batch(configured, run_of, tmp_path):
    run = run_of("bisection")
    text = run.data.tables["train"].text
    assert len(set(text)) < ROWS - 5
    assert all(np.array_equal(choice.keep_apart, [text]) for choice in run.choices)
    state = newest_state(run.config, run.workdir)

    def conflicts(keep_apart: tuple[str, ...]) -> Iterator[int]:
        config = configured(**{f"{GCBS}keep_apart": keep_apart})
        rows_of = RunBatches(training_of(config), run.data, tmp_path).rows_of(state)
        for begin, rows in (epoch_of(rows_of, epoch) for epoch in range(3, 8)):
            yield count_conflicts(rows, text, batch_size=BATCH, first_position=begin)

    assert [*conflicts(("text",))] == [0] * 5
    assert sum(conflicts(())) > 0


def test_rows_kept_apart_are_not_part_of_the_gap(configured, tmp_path):
    config = configured(**BANK, **{f"{GCBS}method": "rcm", f"{GCBS}keep_apart": ("group",)})
    program, data = training_of(config), data_of(config, tmp_path)
    group = data.tables["train"].group
    # Rows are equal within a group and orthogonal between groups.
    state = planted(program.init(ROWS, group), np.eye(DIM)[group])
    _, metrics = RunBatches(program, data, tmp_path).refresh(state)
    least, most = (np.log(1 + (ROWS - size) * np.exp(-1 / 0.05)) for size in (11, 8))
    assert 0.99 * least < metrics["assignment/global_loss"] < 1.01 * most


@pytest.mark.slow
def test_any_number_of_devices_assigns_and_continues_with_the_same_batches(configured, tmp_path):
    config = configured(**BANK)
    data = data_of(config, tmp_path)
    group = data.tables["train"].group

    def program_on(count: int):
        program = training_of(config, devices=jax.devices()[:count])
        return program._replace(embed=None)  # not needed with the bank

    # Six batches of one draw are measured; the assignment closes .4 to .8 of their gap.
    draws = [np.asarray(unit_vectors(seed, ROWS, DIM, dtype=jnp.float32)) for seed in range(8)]
    chosen, rows, closed, closed_before = [], [], [], []
    for count, noises in ((1, draws), (8, draws[-1:])):
        program = program_on(count)
        assert program.mesh.size == count
        batches = RunBatches(program, data, tmp_path)
        for noise in noises:
            state = planted(program.init(ROWS, group), np.eye(DIM)[group] + 0.6 * noise)
            state, metrics = batches.refresh(state)
            closed.append(metrics["assignment/closed"])
            closed_before.append(metrics["assignment/closed_before"])
        chosen.append(jax.tree.map(bits, state.memory["assignment"]))
        rows.append([batches.rows_of(state)(step) for step in range(5, 30)])
    assert chosen[0] == chosen[1]
    assert np.mean(closed) > 0.5 > np.mean(closed_before) + 0.3
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(5, state)
        checkpoints.wait()
        program = program_on(4)
        state = checkpoints.restore_latest(program.abstract_state(ROWS, group)).state
    assert state.memory["assignment"]["order"].sharding.mesh.size == 4
    rows_of = RunBatches(program, data, tmp_path).rows_of(state)
    np.testing.assert_array_equal([*rows, [rows_of(step) for step in range(5, 30)]], [rows[0]] * 3)


@pytest.mark.parametrize("epochs", [0.4, 1.0, 1.7])
def test_batches_are_reassigned_after_a_number_of_epochs(configured, tmp_path, epochs):
    config = configured(**BANK, **{f"{GCBS}refresh_epochs": epochs, "steps": 60})
    batches = RunBatches(training_of(config), data_of(config, tmp_path), tmp_path)
    apart = round(epochs * ROWS)
    turns = range(1, 59 * BATCH // apart + 1)
    wanted = [-(-turn * apart // BATCH) for turn in turns]
    assert [step for step in range(61) if batches.due(step)] == wanted


def test_epochs_that_never_pass_are_an_error(configured, tmp_path):
    config = configured(**BANK, **{f"{GCBS}refresh_epochs": 9.0, "steps": 60})
    program, data = training_of(config), data_of(config, tmp_path)
    with pytest.raises(
        ValueError, match=r"=9\.0 is never reached: the 60 steps, without the last, are 8\.8 epochs"
    ):
        RunBatches(program, data, tmp_path)


def test_blocks_are_random_at_first_and_whole_at_last(configured, tmp_path):
    shares = {f"{GCBS}random_initial": 1.0, f"{GCBS}random_final": 0.0, f"{GCBS}keep_apart": ()}
    config = configured(steps=1_000, **shares)
    program, data = training_of(config), data_of(config, tmp_path)
    order = np.random.default_rng(0).permutation(ROWS).astype(np.int32)
    state = program.init(ROWS)
    kept = {name: np.array(leaf) for name, leaf in state.memory["assignment"].items()}
    kept["order"][:ROWS], kept["step"] = order, np.int32(0)
    state = with_memory(state, 0, assignment=kept)
    rows_of = RunBatches(program, data, tmp_path).rows_of(state)
    block = np.argsort(order) // BLOCK

    def whole_blocks(epoch: int) -> list[bool]:
        begin, rows = epoch_of(rows_of, epoch)
        first = -begin % BLOCK
        last = first + (ROWS - first) // BLOCK * BLOCK
        return [len(set(found)) == 1 for found in block[rows[first:last]].reshape(-1, BLOCK)]

    assert not any(whole_blocks(0))
    assert 3 < sum(whole_blocks(500 * BATCH // ROWS)) < 10
    assert all(whole_blocks(995 * BATCH // ROWS))


def test_a_run_with_reassigned_batches_can_be_opened(run_of):
    run = open_run(run_of("bisection").workdir)
    assert run.table("train", run.sources()["train"]).num_rows == ROWS


@pytest.mark.parametrize(
    ("num_rows", "batch_size", "count"),
    [(19_691, 64, 16), (19_691, 1_024, 16), (474, 64, 7), (100, 64, 1), (10**7, 8_192, 2)],
)
def test_the_gap_is_measured_of_many_batches_where_they_are_small(num_rows, batch_size, count):
    assert _num_measured(num_rows, batch_size) == count
    assert _num_measured(10**7, 2**20) == 1  # a large batch is measured whole


@pytest.mark.parametrize(("step", "most", "steps"), [(3, 6, 6), (3, 2, 2), (20, 3, 3)])
def test_batches_that_are_measured_are_of_the_next_epoch_in_any_order(step, most, steps):
    def rows(step):  # ordered by number
        visits = np.arange(step * BATCH, (step + 1) * BATCH) % ROWS
        return np.sort(visits).astype(np.int32)

    found = _batches_of_next_epoch(rows, step, num_rows=ROWS, batch_size=BATCH, most=most)
    assert found.shape == (steps, BATCH)
    assert len(np.unique(found)) == found.size
    epoch = step * BATCH // ROWS + 1
    wanted = [
        rows(one).tolist()
        for one in range(STEPS * 3)
        if one * BATCH // ROWS == ((one + 1) * BATCH - 1) // ROWS == epoch
    ]
    chosen = np.sort(found, axis=1).tolist()
    assert all(batch in wanted for batch in chosen)
    assert max(wanted.index(batch) for batch in chosen) >= len(wanted) // 2  # not only the first
    assert (np.diff(found, axis=1) < 0).any(axis=1).all(), "the first rows of a batch are no draw"
