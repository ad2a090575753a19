"""Write `vectors.npz`: the embeddings of sentence-transformers for the folders of `folders.py`.

    python tests/run/encoded/make_vectors.py

This script needs torch and sentence-transformers; the tests do not.
"""

import tempfile
from pathlib import Path

import numpy as np
import sentence_transformers
import transformers
from folders import FOLDERS, HERE, TEXTS, write_folder


def main():
    vectors = {}
    for name in FOLDERS:
        with tempfile.TemporaryDirectory() as folder:
            model = sentence_transformers.SentenceTransformer(
                str(write_folder(name, Path(folder))), device="cpu"
            )
            vectors[f"{name}/query"] = model.encode_query(TEXTS)
            vectors[f"{name}/key"] = model.encode_document(TEXTS)
            if name == "prompts":
                vectors[f"{name}/task"] = model.encode(TEXTS, prompt_name="task")
                vectors[f"{name}/given"] = model.encode(TEXTS, prompt="message : ")
            similar = model.similarity(vectors[f"{name}/query"], vectors[f"{name}/key"])
            vectors[f"{name}/similarity"] = similar.numpy()
    versions = {"sentence-transformers": sentence_transformers, "transformers": transformers}
    listed = ", ".join(f"{name} {package.__version__}" for name, package in versions.items())
    np.savez(HERE / "vectors.npz", versions=np.array(listed), **vectors)


if __name__ == "__main__":
    main()
