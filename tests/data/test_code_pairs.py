"""Code pairs: the split of each function, and the reuse of prepared rows."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow_datasets as tfds
from absl import logging
from tensorflow_datasets.core.utils import tqdm_utils

from jaxcl.data import code_pairs, prepared_folder
from jaxcl.data.code_pairs import prepare_code_pairs, split_functions
from jaxcl.data.python_functions import PythonFunction, SourceRoot
from jaxcl.data.sources import DESCRIPTION_FILE, open_pairs

FUNCTION = '''\
def {name}(text):
    """Counts the {name} words."""
    {name} = text.split()
    return len({name})
'''
LETTERS = "abcdefghijklmnopqrst"


def function(package: str, name: str, **changes) -> PythonFunction:
    values = {
        "package": package,
        "module": f"{package}.words",
        "qualified_name": name,
        "name": name,
        "file": f"{package}/words.py",
        "path": f"/site/{package}/words.py",
        "line": 1,
        "docstring_paragraph": f"Counts the {name} words.",
        "source": f"def {name}(text):\n    return len(text)",
    }
    return PythonFunction(**values | changes)


def split(functions, **changes):
    options = {"test_packages": ("held",), "validation_fraction": 0.0, "split_seed": 0}
    return split_functions(functions, **options | changes)


def write_packages(root: Path) -> tuple[SourceRoot, ...]:
    """Write `held` (2 functions) and `seen` (20 files of one function, one per letter)."""
    for package, files in {"held": ("x", "y"), "seen": LETTERS}.items():
        (root / package).mkdir(parents=True)
        for name in files:
            (root / package / f"{name}.py").write_text(FUNCTION.format(name=f"{package}_{name}"))
    return (SourceRoot(root),)


@pytest.fixture
def roots(tmp_path):
    return write_packages(tmp_path / "site")


@pytest.fixture
def prepare(tmp_path, roots):
    def prepare_with(**changes):
        options = {"roots": roots, "test_packages": ("held",), "validation_fraction": 0.25}
        return prepare_code_pairs(tmp_path / "data", **options | changes)

    return prepare_with


def read_all(info, split_name, **options):
    pairs = open_pairs(info.directory, split_name, **options)
    return pairs.read(range(len(pairs)))


def test_a_duplicate_is_kept_in_test_and_dropped_from_train():
    same_code = "def f( text ):\n\n    return len(text)"
    functions = [
        function("aaa", "own"),
        function("aaa", "copied_code", source=same_code),
        function("aaa", "copied_query", docstring_paragraph="COUNTS all words."),
        function("held", "code", source=same_code.replace(" ", "  ")),
        function("held", "query", docstring_paragraph="Counts all words."),
    ]
    splits, num_duplicates = split(functions)
    assert [row.name for row in splits["test"]] == ["code", "query"]
    assert [row.name for row in splits["train"]] == ["own"]
    assert num_duplicates == 2


def test_without_the_test_packages_first_the_duplicate_would_be_dropped_from_test():
    functions = [
        function("aaa", "copy", source="same"),
        function("aaa", "own"),
        function("held", "original", source="same"),
        function("held", "other"),
    ]
    first, _ = split(functions)
    assert [row.name for row in first["test"]] == ["original", "other"]
    kept = code_pairs._without_duplicates(functions, first_packages=())
    assert [row.name for row in kept] == ["copy", "own", "other"]


def test_validation_is_by_file_and_about_the_share_asked_for():
    functions = [
        function("seen", f"f{i}_{j}", file=f"seen/{i}.py", line=j, source=f"{i}+{j}")
        for i in range(400)
        for j in (1, 2)
    ]
    functions.append(function("held", "other"))
    splits, _ = split(functions, validation_fraction=0.25)
    files = {name: {row.file for row in splits[name]} for name in ("train", "validation")}
    assert not files["train"] & files["validation"]
    assert abs(len(files["validation"]) - 400 * 0.25) < 4 * (400 * 0.25 * 0.75) ** 0.5
    other, _ = split(functions, validation_fraction=0.25, split_seed=1)
    assert {row.file for row in other["validation"]} != files["validation"]


def test_the_order_given_does_not_matter():
    functions = [function(p, f"f{i}", source=f"{p}{i}") for p in ("held", "seen") for i in range(9)]
    functions = [row._replace(docstring_paragraph=row.source) for row in functions]
    for options in ({}, {"max_pairs": 12}):
        assert split(functions, **options) == split(functions[::-1], **options)


def test_max_pairs_draws_from_every_split_and_a_larger_draw_holds_the_smaller():
    functions = [
        function(p, f"{p}{i}", source=f"{p}{i}") for p in ("held", "seen") for i in range(50)
    ]
    few, _ = split(functions, max_pairs=20)
    more, _ = split(functions, max_pairs=40)
    assert sum(map(len, few.values())) == 20
    assert set(few) == {"train", "test"}
    assert all(set(few[name]) < set(more[name]) for name in few)


def test_pairs_are_read_back_as_written(prepare, tmp_path):
    info = prepare()
    assert info.packages == ("held", "seen")
    assert info.num_files == 2 + 20
    assert info.split_sizes["train"] + info.split_sizes["validation"] == 20
    assert read_all(
        info,
        "test",
        group_field="group",
        metadata_fields=("package", "module", "qualified_name", "name", "file", "line"),
    ) == [
        {
            "query": f"Counts the held_{name} words.",
            "key": f"def held_{name}(text):\n    held_{name} = text.split()\n"
            f"    return len(held_{name})",
            "group": 0,
            "package": "held",
            "module": f"held.{name}",
            "qualified_name": f"held_{name}",
            "name": f"held_{name}",
            "file": str(tmp_path / "site" / "held" / f"{name}.py"),
            "line": 1,
        }
        for name in ("x", "y")
    ]
    train = read_all(info, "train", metadata_fields=("file",), group_field="group")
    assert [row["file"] for row in train] == sorted(row["file"] for row in train)
    assert {row["group"] for row in train} == {1}
    assert tfds.builder_from_directory(info.directory).info.splits["train"].num_examples == len(
        train
    )


def test_an_unchanged_environment_is_not_parsed_again(prepare, monkeypatch):
    info = prepare()
    written = (info.directory / DESCRIPTION_FILE).stat().st_mtime_ns
    monkeypatch.setattr(code_pairs, "_parse", None)  # calling it would raise
    assert prepare() == info
    assert (info.directory / DESCRIPTION_FILE).stat().st_mtime_ns == written
    with pytest.raises(TypeError):
        prepare(split_seed=1)


def test_every_option_and_every_changed_file_gives_another_directory(prepare, tmp_path):
    infos = [
        prepare(),
        prepare(split_seed=1),
        prepare(validation_fraction=0.5),
        prepare(max_pairs=15),
        prepare(test_packages=("seen",)),
    ]
    (tmp_path / "site" / "seen" / "a.py").write_text(FUNCTION.format(name="new"))
    infos.append(prepare())
    assert len({info.directory for info in infos}) == len(infos)
    assert len({info.fingerprint for info in infos}) == len(infos)
    new = "Counts the new words."
    has_new = [
        new in {row["query"] for s in info.split_sizes for row in read_all(info, s)}
        for info in infos
    ]
    assert has_new == [False] * 5 + [True]


def test_the_same_packages_elsewhere_are_split_alike_but_point_to_their_own_files(
    prepare, tmp_path
):
    here, there = prepare(), prepare(roots=write_packages(tmp_path / "other"))
    assert here.fingerprint == there.fingerprint
    assert here.directory != there.directory
    assert read_all(here, "validation") == read_all(there, "validation")
    for info, place in ((here, "site"), (there, "other")):
        [file, _] = [row["file"] for row in read_all(info, "test", metadata_fields=("file",))]
        assert file == str(tmp_path / place / "held" / "x.py")


KILLED = """
import os, sys
from pathlib import Path
from jaxcl.data import code_pairs, prepared_folder
from jaxcl.data.python_functions import SourceRoot

def die(*args, **options):
    os._exit(9)

setattr(prepared_folder, sys.argv[3], die)
code_pairs.prepare_code_pairs(
    sys.argv[1], roots=(SourceRoot(Path(sys.argv[2])),), test_packages=("held",),
    validation_fraction=0.25,
)
"""


@pytest.mark.parametrize("killed_at", ["_write_description", "put_in_place"])
def test_a_killed_preparation_is_done_again(prepare, tmp_path, killed_at):
    arguments = [tmp_path / "data", tmp_path / "site", killed_at]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, arguments)], env=environment)
    assert killed.returncode == 9
    [left] = (tmp_path / "data" / "code_pairs").iterdir()
    assert list(left.rglob("*.array_record*"))  # it was killed after writing the records
    info = prepare()
    assert len(read_all(info, "test")) == 2
    assert not left.exists()


@pytest.mark.parametrize(
    "damage", ["shard cut", "shard gone", "description cut", "[]", "{}", "5", "fingerprint"]
)
def test_damaged_pairs_are_prepared_again(prepare, damage):
    info = prepare()
    [shard] = info.directory.glob("*-test.array_record*")
    description = info.directory / DESCRIPTION_FILE
    if damage == "shard cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "shard gone":
        shard.unlink()
    elif damage == "description cut":
        description.write_text(description.read_text()[:40])
    elif damage == "fingerprint":
        description.write_text(description.read_text().replace(info.fingerprint, "0" * 64))
    else:
        description.write_text(damage)
    assert prepare() == info
    assert len(read_all(info, "test")) == 2
    assert json.loads(description.read_text())["fingerprint"] == info.fingerprint
    assert [path.name for path in info.directory.parent.iterdir()] == [info.directory.name]


def _prepare_at_the_barrier(barrier, data_dir, site, results):
    prepared_folder.put_in_place, put = (  # both have written, neither has renamed
        lambda *args, **options: (barrier.wait(30), put(*args, **options)),
        prepared_folder.put_in_place,
    )
    info = prepare_code_pairs(data_dir, roots=(SourceRoot(site),), test_packages=("held",))
    results.put((str(info.directory), info.fingerprint))


def test_two_processes_may_prepare_at_once(tmp_path, roots):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    arguments = (barrier, tmp_path / "data", roots[0].path, results)
    processes = [context.Process(target=_prepare_at_the_barrier, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    found = {results.get(timeout=30) for _ in processes}
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    [(directory, _)] = found
    assert len(open_pairs(directory, "test")) == 2
    assert list((tmp_path / "data" / "code_pairs").iterdir()) == [Path(directory)]


def test_skipped_files_are_reported_and_remembered(prepare, tmp_path):
    (tmp_path / "site" / "seen" / "broken.py").write_text("def (")
    (tmp_path / "site" / "seen" / "null.py").write_text("\0")
    expected = {"null bytes": 1, "syntax error": 1}
    assert prepare().skipped == expected
    assert prepare().skipped == expected


def test_a_file_that_changes_meanwhile_stops_the_preparation(prepare, tmp_path, monkeypatch):
    parse = code_pairs._parse

    def change_and_parse(*args):
        (tmp_path / "site" / "seen" / "a.py").write_text("a = 1")
        return parse(*args)

    monkeypatch.setattr(code_pairs, "_parse", change_and_parse)
    with pytest.raises(RuntimeError, match="run again"):
        prepare()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_packages": ("sean",)}, r"'sean' is not installed; did you mean \['seen'\]"),
        (
            {"test_packages": ("zzz",)},
            r"'zzz' is not installed; the packages are \['held', 'seen'\]",
        ),
        ({"test_packages": "held"}, "must be a sequence of names"),
        ({"test_packages": ("held", "seen")}, "none of the .* pairs is left for train"),
        ({"validation_fraction": 1.0}, "below 1"),
        ({"max_pairs": 0}, "must be positive"),
        ({"roots": ()}, "no documented Python function"),
    ],
)
def test_a_wrong_option_is_explained(prepare, options, message):
    with pytest.raises(ValueError, match=message):
        prepare(**options)


def test_packages_without_functions_are_an_error(prepare, tmp_path):
    (tmp_path / "bare" / "held").mkdir(parents=True)
    (tmp_path / "bare" / "held" / "a.py").write_text("a = 1\n")
    with pytest.raises(ValueError, match="no documented Python function"):
        prepare(roots=(SourceRoot(tmp_path / "bare"),))


def test_a_data_dir_that_cannot_be_written_is_named(roots, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data_dir='.*file' cannot be written .* set data_dir"):
        prepare_code_pairs(tmp_path / "file", roots=roots, test_packages=("held",))


def test_tfds_is_silent_meanwhile_and_as_before_afterwards(prepare, capfd):
    bars, verbosity = tqdm_utils._active, logging.get_verbosity()
    tfds.enable_progress_bar()
    try:
        prepare()
        assert tqdm_utils._active
        assert logging.get_verbosity() == verbosity
    finally:
        tfds.display_progress_bar(bars)
    captured = capfd.readouterr()
    assert captured.out == ""
    # jaxcl's own lines: collecting, parsed, found, written
    assert len(captured.err.splitlines()) == 4


def test_found_and_skipped_functions_are_reported(prepare, capsys):
    info = prepare()
    said = capsys.readouterr().err
    assert f"of {info.num_files} Python files" in said
    assert f"; they are kept in {info.directory}" in said
    assert f"{sum(info.split_sizes.values())} pairs from {info.num_files} files" in said
    assert f"{info.num_duplicates} duplicates dropped" in said
    for reason, count in info.skipped.items():
        assert f"{count} {reason}" in said
