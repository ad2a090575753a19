"""The examples in the README run as they are."""

import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.bench.__main__ import BENCHMARKS
from jaxcl.data.sources import open_pairs
from jaxcl.losses import infonce_loss
from jaxcl.run.training import build_training
from jaxcl.settings.derived import data_set_names, sources_by
from jaxcl.settings.read import read_settings
from tests.helpers import relative_error, unit_vectors
from tests.models.pretrained.tiny import DIM, write_tiny_bert

ROOT = Path(__file__).parents[1]


def snippet(heading: str, number: int = 0, *, file: str = "README.md") -> str:
    section = (ROOT / file).read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.S)[number]


def first_column(file: str, heading: str) -> list[str]:
    """The code in the first column of the table with this first heading."""
    table = (ROOT / file).read_text().split(f"\n| {heading} |")[1].split("\n\n")[0]
    return re.findall(r"\n\| `(.*?)`", table)


def test_the_loss_in_ones_own_step_is_that_of_the_whole_batch():
    def encode(params, inputs):
        return inputs * params

    names = {"f": encode, "g": encode}
    exec(snippet("Use only the losses, or only batch assignment"), names)
    params, x, y = np.float32(0.5), *(unit_vectors(seed, 16, 4, dtype="float32") for seed in (0, 1))
    found = names["value_and_gradients"](params, x, y)
    wanted = jax.value_and_grad(lambda p: infonce_loss(x * p, y * p, temperature=0.05).mean())(
        params
    )
    assert max(map(relative_error, found, wanted)) < 1e-5


def test_an_exported_model_is_loaded_and_embeds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_tiny_bert(tmp_path / "models" / "mine")
    names = {}
    exec(snippet("Fine-tune a pretrained model on your pairs"), names)
    assert names["keys"].shape == (2, DIM)
    assert len(capsys.readouterr().out.strip("[]\n").split()) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pairs_of_ones_own_are_prepared_and_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prepare.py").write_text(snippet("TFDS data sets", file="jaxcl/data/README.md"))
    runpy.run_path("prepare.py", run_name="__main__")
    pairs = open_pairs(
        "my_pairs:1.0.0", "train", data_dir="data", query_field="question", key_field="answer"
    )
    assert len(pairs) == 5_000
    row = pairs.read([7])[0]
    number = int(row["query"].split()[2])
    assert row["key"] == f"it is {number**2}"


@pytest.mark.parametrize(
    "code",
    [
        snippet("Use only the losses, or only batch assignment", 1),
        snippet("In your own training loop", file="jaxcl/assignment/README.md"),
    ],
)
def test_batches_are_assigned_from_two_arrays(code):
    rng = np.random.default_rng(0)
    queries, keys = (rng.normal(size=(600, 16)).astype(np.float32) for _ in range(2))
    batches: list[np.ndarray] = []
    names = {"queries": queries, "keys": keys, "batches": batches}
    exec(code.replace("...  # train", "batches.append(rows)  # train"), names)
    # Blocks of the order are batches, in every epoch, and the rest is the short batch.
    blocks = {frozenset(block) for block in names["order"][:512].reshape(-1, 256).tolist()}
    for first in range(0, len(batches), 3):
        epoch = batches[first : first + 3]
        assert sorted(np.concatenate(epoch).tolist()) == list(range(600))
        assert {frozenset(batch.tolist()) for batch in epoch[:2]} == blocks


def test_hard_negatives_of_two_arrays_are_mined():
    queries, keys = (np.asarray(unit_vectors(seed, 40, 8, dtype="float32")) for seed in (0, 1))
    found = {"queries": queries, "keys": keys, "positives": [[row, 0] for row in range(40)]}
    exec(snippet("Mine hard negatives", file="jaxcl/negatives/README.md"), found)
    assert len(found["triplets"]) > 40
    scores = queries @ keys.T
    for query, positive, key in found["triplets"]:
        assert positive == query
        lowest = min(scores[query, query], scores[query, 0])
        assert scores[query, key] <= lowest - 0.05 * abs(lowest) + 1e-6


def test_a_bank_is_read_and_updated_in_ones_own_loop():
    queries, keys = (unit_vectors(seed, 8, 256, dtype="float32") for seed in (0, 1))
    numbers = jnp.arange(8)
    names = {"queries": queries, "keys": keys, "rows": numbers, "groups": 0 * numbers}
    exec(snippet("In your own training loop", file="jaxcl/negatives/README.md"), names)
    assert np.isfinite(names["loss"]).all()
    np.testing.assert_array_equal(names["bank"].vectors[:8], keys)


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_links_lead_to_files():
    readmes = [path for path in ROOT.rglob("*.md") if not {".git", ".pytest_cache"} & {*path.parts}]
    links = [
        (readme, link)
        for readme in readmes
        for link in re.findall(r"\]\(([^)#:]+)\)", readme.read_text())
    ]
    assert len(links) > 10
    assert [(str(path), link) for path, link in links if not (path.parent / link).exists()] == []


def broken_anchors(readme: Path) -> list[str]:
    """The links of a Markdown file to headings that do not exist."""

    def anchors(path: Path) -> set[str]:
        text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.S | re.M)
        headings = re.findall(r"^#+ (.*)$", text, re.M)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    links = re.findall(r"\]\(([^)#:]*)#([^)]+)\)", readme.read_text())
    return [
        f"{path}#{to}"
        for path, to in links
        if to not in anchors(readme.parent / path if path else readme)
    ]


def test_links_lead_to_headings():
    readmes = [path for path in ROOT.rglob("*.md") if not {".git", ".pytest_cache"} & {*path.parts}]
    broken = {str(path.relative_to(ROOT)): broken_anchors(path) for path in readmes}
    assert {path: links for path, links in broken.items() if links} == {}


def test_a_link_to_a_missing_heading_is_found(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(
        "# The pair's matrix\n[a](#the-pairs-matrix) [b](#matrix) [c](README.md#matrix)\n"
    )
    assert broken_anchors(readme) == ["#matrix", "README.md#matrix"]


def test_the_map_of_folders_is_the_tree():
    section = (ROOT / "README.md").read_text().split("## Folders\n")[1].split("```")[1]
    inside, _, outside = section.partition("\nconfigs/")
    commands, folders = re.findall(r"(\w+\.py)", inside), re.findall(r"(\w+)/(?= |\n)", inside)
    package = ROOT / "jaxcl"
    parts = {path.name for path in package.iterdir() if path.suffix == ".py"}
    assert set(commands) == parts - {"__init__.py", "__main__.py"}
    present = {path.name for path in package.iterdir() if (path / "__init__.py").exists()}
    assert set(folders) == (present | {"jaxcl", "pretrained"}) - {"configs"}
    assert set(re.findall(r"(\w+)/", "configs/" + outside)) == {
        *("configs", "launch", "tests", "jaxcl")
    }


def test_the_table_of_negatives_names_every_module():
    modules = (ROOT / "jaxcl" / "negatives").glob("[!_]*.py")
    table = (ROOT / "jaxcl/negatives/README.md").read_text().split("\n\n")[2]
    assert set(re.findall(r"`(\w+\.py)`", table)) == {module.name for module in modules}


def test_every_benchmark_is_in_the_table_of_benchmarks():
    assert first_column("jaxcl/bench/README.md", "name") == list(BENCHMARKS)


def test_a_config_of_two_data_sets_is_one_that_can_be_built():
    names = {}
    exec(snippet("Sources", file="jaxcl/assignment/README.md"), names)
    settings = read_settings(names["get_config"]("smoke"))
    assert data_set_names(settings.data) == ("first", "wiki")
    assert sources_by(settings) == "data_set"
    assert build_training(settings).mesh.size == 8
