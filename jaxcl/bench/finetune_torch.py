"""The PyTorch side of the benchmarks `finetune` and `static`, on the same batches as jaxcl.

It does not import jaxcl, so any interpreter with sentence-transformers can run it:

    python finetune_torch.py SPEC.json

SPEC.json holds the model, the batches, the learning rate of each step, the texts to embed and the
.npz file for the embeddings. The model is a folder, or a tokenizer and a width for a
`StaticEmbedding` with random weights. The script prints the CPU seconds to standard output.
"""

import json
import os
import resource
import sys
import time

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer


def main(spec_file: str) -> None:
    """Train, embed, and print one line of JSON."""
    with open(spec_file) as file:
        spec = json.load(file)
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(spec["seed"])
    model = _model(spec)
    start = time.perf_counter(), _cpu_seconds()
    losses = _train(model, spec)
    trained = time.perf_counter(), _cpu_seconds()
    embeddings = {
        name: model.encode(texts, normalize_embeddings=True, batch_size=64)
        for name, texts in spec["texts"].items()
    }
    np.savez(spec["output"], **embeddings)
    print(
        json.dumps(
            {
                "losses": losses,
                "seconds": trained[0] - start[0],
                "CPU seconds": trained[1] - start[1],
                "embedding seconds": time.perf_counter() - trained[0],
            }
        )
    )


def _model(spec: dict) -> SentenceTransformer:
    if "tokenizer" not in spec:
        model = SentenceTransformer(spec["model"], device="cpu")
        model.max_seq_length = spec["max_tokens"]
        return model
    tokenizer = Tokenizer.from_file(spec["tokenizer"])
    embedding = StaticEmbedding(tokenizer, embedding_dim=spec["dim"])
    return SentenceTransformer(modules=[embedding], device="cpu")


def _train(model: SentenceTransformer, spec: dict) -> list[float]:
    loss_of = MultipleNegativesRankingLoss(
        model,
        scale=1 / spec["temperature"],
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    matrices = [one for one in model.parameters() if one.ndim > 1]
    vectors = [one for one in model.parameters() if one.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": spec["weight_decay"]},
            {"params": vectors, "weight_decay": 0.0},
        ]
    )
    model.train()
    losses = []
    for rate, batch in zip(spec["learning_rates"], spec["batches"], strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        sides = [
            {name: one for name, one in model.preprocess(batch[side]).items() if one is not None}
            for side in ("query", "key")
        ]
        loss = loss_of(sides, labels=None)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec["clip_norm"])
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main(sys.argv[1])
