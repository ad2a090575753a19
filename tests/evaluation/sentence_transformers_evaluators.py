"""Evaluate a folder with sentence-transformers' own evaluators of pairs of texts.

    python tests/evaluation/sentence_transformers_evaluators.py FOLDER PAIRS.json FIGURES.json

`PAIRS.json` has the lists `first` and `second` of texts, their `scores`, and `labels` of
0 and 1 for some of the first pairs. Needs sentence-transformers, and not jaxcl.
"""

import json
import sys
from pathlib import Path

from sentence_transformers import SentenceTransformer
from sentence_transformers.evaluation import (
    BinaryClassificationEvaluator,
    EmbeddingSimilarityEvaluator,
)


def main() -> None:
    folder, pairs, figures = map(Path, sys.argv[1:])
    model = SentenceTransformer(str(folder), device="cpu")
    given = json.loads(pairs.read_text())
    texts, labels = (given["first"], given["second"]), given["labels"]
    found = EmbeddingSimilarityEvaluator(*texts, given["scores"])(model)
    labelled = (side[: len(labels)] for side in texts)
    found |= BinaryClassificationEvaluator(*labelled, labels)(model)
    figures.write_text(json.dumps({name: float(value) for name, value in found.items()}))


if __name__ == "__main__":
    main()
