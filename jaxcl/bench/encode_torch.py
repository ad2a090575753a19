"""The PyTorch side of `jaxcl.bench.bench_encode`: encode texts with sentence-transformers."""

import json
import sys
import time

import numpy as np
import sentence_transformers
import torch


def main(spec_path: str) -> None:
    """Answer commands from standard input until it ends."""
    with open(spec_path) as file:
        spec = json.load(file)
    torch.set_num_threads(spec["threads"])
    model = sentence_transformers.SentenceTransformer(spec["model"], device="cpu")
    encode = {"query": model.encode_query, "key": model.encode_document}[spec["side"]]
    print(json.dumps({"sentence-transformers": sentence_transformers.__version__}), flush=True)
    for line in sys.stdin:
        command, count = line.split()
        texts = spec["texts"][: int(count)]
        start, cpu_start = time.perf_counter(), time.process_time()
        vectors = encode(texts, batch_size=spec["batch_size"], show_progress_bar=False)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        if command == "save":
            np.save(spec["vectors"], vectors)
        print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
