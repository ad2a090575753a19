"""The other programs of `jaxcl.bench.bench_alternatives`: PyTorch, sentence-transformers and faiss.

    python alternatives_torch.py SPEC.json

It does not import jaxcl, so that any interpreter with torch, sentence-transformers and faiss can
run it. SPEC.json names what to measure; `measured_process.py` describes the answers.
"""

import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from measured_process import serve  # a file of the same folder

_CHUNK = 1_024
"""Rows of a chunk, for the losses that compute the scores chunk by chunk."""


def main(spec_file: str) -> None:
    """Prepare one measurement and serve it."""
    with open(spec_file) as file:
        spec = json.load(file)
    prepare = {"loss": prepare_loss, "nearest": prepare_nearest}
    arrays = dict(np.load(spec["arrays"]))
    faiss = spec["part"] == "nearest"
    packages = ("faiss-cpu",) if faiss else ("torch", "sentence-transformers")
    versions = {name: importlib.metadata.version(name) for name in packages}
    serve(prepare.get(spec["part"], prepare_update)(spec, arrays), versions)


def prepare_loss(spec: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Callable:
    """Return a function that computes the symmetric loss with the gradients of both sides."""
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(os.cpu_count() or 1)
    sides = [torch.tensor(arrays[side]).requires_grad_() for side in ("queries", "keys")]
    queries, keys = sides
    labels = torch.arange(len(queries))
    scale = 1 / spec["temperature"]

    def dense() -> float:
        scores = queries @ keys.T * scale
        loss = (F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)) / 2
        loss.backward()
        return loss.item()

    def chunks() -> float:
        total = 0.0
        for first in range(0, len(queries), _CHUNK):
            rows = slice(first, first + _CHUNK)
            forwards = F.cross_entropy(
                queries[rows] @ keys.T * scale, labels[rows], reduction="sum"
            )
            backwards = F.cross_entropy(
                keys[rows] @ queries.T * scale, labels[rows], reduction="sum"
            )
            loss = (forwards + backwards) / (2 * len(queries))
            loss.backward()
            total += loss.item()
        return total

    def cached() -> float:
        return cached_loss.calculate_loss([[queries], [keys]], with_backward=True).item()

    if spec["way"] == "sentence-transformers, cached loss":
        from sentence_transformers.sentence_transformer import losses
        from sentence_transformers.util import dot_score

        cached_loss = losses.CachedMultipleNegativesRankingLoss(
            torch.nn.Sequential(torch.nn.Identity()),
            scale=scale,
            similarity_fct=dot_score,  # the rows have unit norm
            mini_batch_size=_CHUNK,
            directions=("query_to_doc", "doc_to_query"),
            partition_mode="per_direction",
        )
    ways = {
        "PyTorch, dense": dense,
        "PyTorch, chunks": chunks,
        "sentence-transformers, cached loss": cached,
    }

    def call() -> list[float]:
        for side in sides:
            side.grad = None
        loss = ways[spec["way"]]()
        return [loss, *(side.grad.norm().item() for side in sides)]

    return call


def prepare_nearest(spec: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Callable:
    """Return a function that searches the flat index of faiss."""
    import faiss

    table = arrays["table"]

    def call() -> list[float]:
        index = faiss.IndexFlatIP(table.shape[1])
        index.add(table)
        similarities, _ = index.search(table, spec["count"])
        return [float(np.linalg.norm(similarities))]

    return call


def prepare_update(spec: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Callable:
    """Return a function that runs one update: forward, loss, gradient, clipping, AdamW."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    model = SentenceTransformer(spec["model"], device="cpu")
    model.train(spec["dropout"])
    symmetric: dict[str, Any] = {
        "scale": 1 / spec["temperature"],
        "directions": ("query_to_doc", "doc_to_query"),
        "partition_mode": "per_direction",
    }
    if "cached" in spec["way"]:
        loss_of = losses.CachedMultipleNegativesRankingLoss(
            model, mini_batch_size=spec["chunk"], **symmetric
        )
    else:
        loss_of = losses.MultipleNegativesRankingLoss(model, **symmetric)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=spec["learning_rate"], weight_decay=spec["weight_decay"], fused=True
    )

    def features(side: str) -> dict[str, Any]:
        lengths = torch.tensor(arrays[f"inputs/{side}/length"])
        ids = torch.tensor(arrays[f"inputs/{side}/tokens"])[:, : lengths.max()].long()
        mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
        return {"input_ids": ids, "attention_mask": mask.long()}

    inputs = {side: features(side) for side in ("query", "key")}

    def call() -> list[float]:
        loss = loss_of([dict(inputs[side]) for side in ("query", "key")], labels=None)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), spec["clip_norm"])
        optimizer.step()
        return [loss.item(), norm.item()]

    return call


if __name__ == "__main__":
    main(sys.argv[1])
