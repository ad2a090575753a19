"""Writes descriptions of Debian packages as training pairs and a BEIR folder, as example data.

    python -m jaxcl.bench.debian --output debian

The query is the short description of a package ("fast image viewer"), and its document is the long
description. Runs on Debian or Ubuntu with a network, without root, in about a minute: apt's lists
are downloaded to a temporary folder. It writes

    pairs.jsonl                   training rows: "query" and "positive"
    evaluation/corpus.jsonl       the long descriptions of all packages
    evaluation/queries.jsonl      the short descriptions of held-out packages
    evaluation/qrels/dev.tsv      their documents, for choosing settings
    evaluation/qrels/test.tsv     the same for other packages, for the final results

All packages built from one source package are in the same split, chosen by a hash of its name.
"""

import collections
import hashlib
import json
import subprocess
import tempfile
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxcl.host.command import run_command
from jaxcl.host.command_flags import CommandParser
from jaxcl.host.files import write_whole
from jaxcl.host.paths import local_path
from jaxcl.host.progress import say

__all__ = ["Description", "descriptions", "main", "write_folder"]

_FEWEST_WORDS = (3, 8)
"""The minimum number of words of a short and of a long description."""
_HELD_OUT_PERCENT = {"dev": 5, "test": 5}


class Description(NamedTuple):
    """The description of a package.

    Attributes:
      package: the name of the package.
      source: the name of the source package that it is built from.
      short: the first line of the description.
      long: the rest of the description, joined to one line.
    """

    package: str
    source: str
    short: str
    long: str


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = CommandParser("jaxcl.bench.debian", __doc__)
    parser.add_argument("--output", required=True, metavar="DIR", type=local_path)
    parser.add_argument(
        "--percent", type=int, default=100, help="share of the source packages (default: 100)"
    )
    run_command(parser, _run, argv)


def _run(arguments: Namespace) -> None:
    if not 1 <= arguments.percent <= 100:
        raise ValueError(f"--percent={arguments.percent} is not a percentage; give 1 to 100")
    with tempfile.TemporaryDirectory() as folder:
        packages, translations = _apt_lists(Path(folder))
    chosen = [
        one
        for one in descriptions(packages, translations)
        if _percentile("share", one.source) < arguments.percent
    ]
    sizes = write_folder(arguments.output, chosen)
    say(", ".join(f"{count:,} {name}" for name, count in sizes.items()))


def descriptions(packages: str, translations: str) -> list[Description]:
    """Join the short descriptions in apt's lists with the long descriptions.

    Args:
      packages: the content of `Packages` files.
      translations: the content of `Translation-en` files.

    Returns:
      One description per package, without descriptions that are too short.
    """
    long_ones = {}
    for stanza in _stanzas(translations):
        _, _, text = stanza.get("Description-en", "").partition("\n")
        long_ones[stanza.get("Description-md5")] = " ".join(
            word for word in text.split() if word != "."
        )
    by_package = {}
    for stanza in _stanzas(packages):
        name = stanza.get("Package", "")
        source = stanza.get("Source", name).split()[0] if name else ""
        short = " ".join(stanza.get("Description", "").split())
        one = Description(name, source, short, long_ones.get(stanza.get("Description-md5"), ""))
        if all(
            len(text.split()) >= fewest
            for text, fewest in zip((one.short, one.long), _FEWEST_WORDS, strict=True)
        ):
            by_package[name] = one
    return list(by_package.values())


def write_folder(folder: Path, found: Sequence[Description]) -> dict[str, int]:
    """Write the pairs and the BEIR folder.

    Equal long descriptions become one document. The documents of all packages with the same short
    description are relevant to that query.

    Args:
      folder: the folder, created if necessary.
      found: the descriptions.

    Returns:
      Name of each part -> its size.

    Raises:
      ValueError: if a part would be empty.
    """
    names: dict[str, str] = {}
    for one in found:
        names.setdefault(one.long, one.package)
    queries = _queries_by_split(found)
    pairs = _training_pairs(queries)
    sizes = {"pairs": len(pairs), "documents": len(names)}
    sizes |= {f"{split} queries": len(queries[split]) for split in _HELD_OUT_PERCENT}
    if not all(sizes.values()):
        raise ValueError(f"{len(found)} descriptions give only {sizes}; take more packages")
    evaluation = folder / "evaluation"
    (evaluation / "qrels").mkdir(parents=True, exist_ok=True)
    _write_lines(folder / "pairs.jsonl", pairs)
    corpus = [{"_id": name, "text": long} for long, name in names.items()]
    _write_lines(evaluation / "corpus.jsonl", corpus)
    held_out = [short for split in _HELD_OUT_PERCENT for short in queries[split]]
    texts = [{"_id": _query_id(short), "text": short} for short in held_out]
    _write_lines(evaluation / "queries.jsonl", texts)
    for split in _HELD_OUT_PERCENT:
        lines = ["query-id\tcorpus-id\tscore\n"]
        for short, documents in queries[split].items():
            lines += [f"{_query_id(short)}\t{names[long]}\t1\n" for long in documents]
        write_whole(evaluation / "qrels" / f"{split}.tsv", "".join(lines))
    return sizes


def _queries_by_split(entries: Sequence[Description]) -> dict[str, dict[str, dict[str, None]]]:
    """Split -> short description -> its distinct long descriptions, in order."""
    queries: dict[str, dict[str, dict[str, None]]] = {
        split: collections.defaultdict(dict) for split in (*_HELD_OUT_PERCENT, "train")
    }
    for one in entries:
        queries[_split_of(one.source)][one.short][one.long] = None
    for short in set(queries["dev"]) & set(queries["test"]):
        queries["test"][short] |= queries["dev"].pop(short)
    for split in _HELD_OUT_PERCENT:  # the documents of other packages are relevant too
        for short in set(queries[split]) & set(queries["train"]):
            queries[split][short] |= queries["train"].pop(short)
    return queries


def _training_pairs(queries: Mapping[str, Mapping[str, Iterable[str]]]) -> list[dict[str, str]]:
    held_out = {
        long for split in _HELD_OUT_PERCENT for texts in queries[split].values() for long in texts
    }
    return [
        {"query": short, "positive": long}
        for short, texts in queries["train"].items()
        for long in texts
        if long not in held_out
    ]


def _apt_lists(folder: Path) -> tuple[str, str]:
    """The content of the lists of packages, and of their long descriptions in English."""
    for part in ("lists/partial", "cache/archives/partial"):
        (folder / part).mkdir(parents=True)
    options: dict[str, Path | str] = {
        "Dir::State::lists": folder / "lists",
        "Dir::Cache": folder / "cache",
    }
    # The long descriptions are in the translations, which container images turn off.
    options["Acquire::Languages"] = "en"
    flags = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    say("downloading the lists of packages")
    try:
        subprocess.run(["apt-get", *flags, "update"], check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ValueError("there is no apt-get; run this on Debian or Ubuntu") from error
    except subprocess.CalledProcessError as error:
        raise ValueError(f"apt-get update failed: {error.stderr.strip()[-400:]}") from error
    kinds = ("*_Packages*", "*_Translation-en*")
    packages, translations = (
        "\n".join(_content(path) for path in sorted((folder / "lists").glob(kind)))
        for kind in kinds
    )
    return packages, translations


def _content(path: Path) -> str:
    helper = ["/usr/lib/apt/apt-helper", "cat-file", str(path)]
    return subprocess.run(helper, check=True, capture_output=True).stdout.decode(errors="replace")


def _stanzas(text: str) -> Iterator[dict[str, str]]:
    """The fields of each paragraph of a control file."""
    for paragraph in text.split("\n\n"):
        fields: dict[str, str] = {}
        name = ""
        for line in paragraph.splitlines():
            if line.startswith((" ", "\t")):
                fields[name] = f"{fields.get(name, '')}\n{line}"
            else:
                name, _, value = line.partition(":")
                fields[name] = value.strip()
        yield fields


def _split_of(source: str) -> str:
    first = 0
    for split, percent in _HELD_OUT_PERCENT.items():
        if first <= _percentile("split", source) < first + percent:
            return split
        first += percent
    return "train"


def _percentile(what: str, name: str) -> float:
    """A number from 0 to 100 that depends only on `what` and the name."""
    digest = hashlib.blake2b(f"{what} {name}".encode(), digest_size=8).digest()
    return 100 * int.from_bytes(digest, "big") / 2**64


def _query_id(short: str) -> str:
    return "q" + hashlib.blake2b(short.encode(), digest_size=6).hexdigest()


def _write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_whole(path, "".join(lines))


if __name__ == "__main__":
    main()
