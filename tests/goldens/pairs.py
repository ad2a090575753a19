"""The pairs that the golden runs train on: invented questions, answers and topics.

    python -m tests.goldens.pairs

rewrites `pairs.tsv`, next to this file. The content is a function of this program alone. Each row
has a split, a group, a name, a query and a key. Some keys and some queries occur in several rows,
and some rows occur twice, so that masks by text have something to do.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["PAIRS_FILE", "Pair", "make_pairs", "read_pairs"]

PAIRS_FILE = Path(__file__).with_name("pairs.tsv")

SPLITS = {"train": 500, "validation": 50, "test": 50}

TOPICS = {
    "baking": ("dough", "oven", "crust", "yeast", "flour", "glaze"),
    "sailing": ("mast", "rudder", "harbour", "anchor", "keel", "tide"),
    "gardening": ("seedling", "hedge", "compost", "trellis", "bulb", "frost"),
    "clocks": ("pendulum", "spring", "gear", "dial", "chime", "escapement"),
    "maps": ("contour", "legend", "compass", "border", "scale", "coastline"),
    "bridges": ("cable", "pillar", "arch", "deck", "toll", "river"),
}
QUESTIONS = (
    "how do I {verb} the {adjective} {noun}",
    "{verb} a {noun} when it is {adjective}",
    "what to do if the {noun} is {adjective}",
    "the best way to {verb} a {noun}",
)
ANSWERS = (
    "first {verb} the {noun} slowly, then wait until the {other} is no longer {adjective}",
    "the {adjective} {noun} is easy to {verb} with a {tool} next to the {other}",
    "use the {tool}: it can {verb} any {noun}, even one that is {adjective}",
    "do not {verb} the {noun} before the {other}; take a {tool} instead",
)
VERBS = ("move", "mend", "measure", "paint", "lift", "clean", "replace", "balance", "turn")
ADJECTIVES = ("cold", "heavy", "crooked", "loose", "narrow", "worn", "wet", "bright", "old")
TOOLS = ("brush", "lever", "ruler", "cloth", "clamp", "lamp", "ladder", "wedge")


class Pair(NamedTuple):
    """One row."""

    split: str
    group: str
    name: str
    query: str
    key: str


def make_pairs(seed: int = 0) -> list[Pair]:
    """All rows, split by split.

    In each split, three rows in twenty repeat the key, the query or both of an earlier row, in
    that row's group.
    """
    rng = random.Random(seed)
    pairs: list[Pair] = []
    for split, count in SPLITS.items():
        rows: list[Pair] = []
        for number in range(count):
            fresh = _fresh_pair(rng, split)
            earlier = rng.choice(rows) if rows and number % 20 in (7, 12, 17) else None
            if earlier is not None:
                fresh = {
                    7: fresh._replace(group=earlier.group, key=earlier.key),
                    12: fresh._replace(group=earlier.group, query=earlier.query),
                    17: earlier,
                }[number % 20]
            rows.append(fresh)
        pairs += rows
    return pairs


def _fresh_pair(rng: random.Random, split: str) -> Pair:
    group = rng.choice(sorted(TOPICS))
    noun, other = rng.sample(TOPICS[group], 2)
    words = {
        "noun": noun,
        "other": other,
        "verb": rng.choice(VERBS),
        "adjective": rng.choice(ADJECTIVES),
        "tool": rng.choice(TOOLS),
    }
    query, key = rng.choice(QUESTIONS), rng.choice(ANSWERS)
    return Pair(split, group, noun, query.format(**words), key.format(**words))


def read_pairs(path: Path = PAIRS_FILE) -> Iterator[Pair]:
    """The rows of the file, in order."""
    for line in path.read_text(encoding="utf-8").splitlines():
        yield Pair(*line.split("\t"))


if __name__ == "__main__":
    lines = ("\t".join(pair) + "\n" for pair in make_pairs())
    PAIRS_FILE.write_text("".join(lines), encoding="utf-8")
