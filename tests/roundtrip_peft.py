"""Load a folder with adapters with sentence-transformers and with peft.

    python tests/roundtrip_peft.py FOLDER TEXTS.json OUTPUT.npz

`TEXTS.json` is a list of texts. `OUTPUT.npz` receives their vectors as queries and as documents by
sentence-transformers, and the weights that peft merges. Needs sentence-transformers and peft, and
not jaxcl.
"""

import json
import sys
from pathlib import Path

import numpy as np
from peft import PeftModel
from sentence_transformers import SentenceTransformer
from transformers import AutoModel


def main() -> None:
    folder, texts, output = map(Path, sys.argv[1:])
    given = json.loads(texts.read_text())
    model = SentenceTransformer(str(folder), device="cpu")
    vectors = {
        "query": model.encode_query(given, batch_size=4),
        "document": model.encode_document(given, batch_size=4),
    }
    config = json.loads((folder / "adapter_config.json").read_text())
    base = AutoModel.from_pretrained(config["base_model_name_or_path"])
    merged = PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
    weights = {name: tensor.numpy() for name, tensor in merged.state_dict().items()}
    np.savez(output, **vectors, **{f"weights/{name}": one for name, one in weights.items()})


if __name__ == "__main__":
    main()
