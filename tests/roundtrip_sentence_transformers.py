"""Load an exported folder with sentence-transformers, embed texts, and save the folder again.

    python tests/roundtrip_sentence_transformers.py FOLDER TEXTS.json VECTORS.npz SAVED [IMAGES.npz]

`TEXTS.json` is a list of texts. `VECTORS.npz` receives their vectors as queries and as documents,
and those of the images, uint8 arrays `[h, w, 3]`, if they are given. Needs sentence-transformers,
and not jaxcl.
"""

import json
import sys
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer


def main() -> None:
    folder, texts, vectors, saved, *images = map(Path, sys.argv[1:])
    model = SentenceTransformer(str(folder), device="cpu")
    given = json.loads(texts.read_text())
    computed = {
        "query": model.encode_query(given, batch_size=4),
        "document": model.encode_document(given, batch_size=4),
    }
    for file in images:
        from PIL import Image

        with np.load(file) as arrays:
            pictures = [Image.fromarray(array) for array in arrays.values()]
        computed["image"] = model.encode(pictures)
    np.savez(vectors, **computed)
    model.save_pretrained(str(saved))


if __name__ == "__main__":
    main()
