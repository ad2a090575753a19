"""PyTorch's side of part 4: sentence-transformers' losses on a randomly initialised BERT.

    python step_speed_torch.py SPEC.json

Nothing is downloaded: the configuration and a vocabulary of numbers are written to a folder.
"""

import functools
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common_torch import DEVICE, PeakMemory, checked, run, synchronize, time_calls
from recorder import Recorder
from sentence_transformers import SentenceTransformer, models
from sentence_transformers.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from transformers import BertConfig, BertModel, BertTokenizerFast

DROPOUT = 0.1
SCALE = 20.0  # 1 / 0.05

Cell = dict[str, Any]
Features = dict[str, torch.Tensor]


def measure_all(recorder: Recorder, spec: dict[str, Any]) -> None:
    """Time every cell, eager and then compiled."""
    for compiled in (False, True):
        for cell in spec["sizes"]["cells"]:
            loss = "Cached" * bool(cell["chunk_size"]) + "MultipleNegativesRankingLoss"
            name = f"{cell['name']}: {loss}" + ", compiled" * compiled
            recorder.measure(name, functools.partial(_measure, cell, spec, compiled))


def _measure(cell: Cell, spec: dict[str, Any], compiled: bool) -> dict[str, Any]:
    torch.compiler.reset()
    torch.manual_seed(spec["seed"])
    errors = _check(cell, spec)
    memory = PeakMemory()
    model = _model(cell, dropout=DROPOUT)
    loss = _loss(model, cell["chunk_size"])
    if compiled:
        model[0].auto_model.compile(dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True)

    def step(*sides: Features) -> None:
        with torch.autocast(DEVICE, torch.bfloat16):
            value = loss([dict(side) for side in sides], None)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()

    batches = [_batch(cell, cell["batch_size"]) for _ in range(4)]
    start = time.perf_counter()
    step(*batches[0])
    synchronize()
    facts = {"compile_s": time.perf_counter() - start, **memory.facts()}
    timed = time_calls(step, batches, spec["sizes"])
    return {**facts, "errors": errors, "flops": cell["flops"], "pairs": cell["batch_size"], **timed}


def _check(cell: Cell, spec: dict[str, Any]) -> dict[str, float]:
    """Compare autocast with float32, and the cached loss with the uncached loss, on a few rows.

    There is no dropout. Under autocast, the losses round their scores to bfloat16. A random
    encoder's embeddings are so similar that the loss's gradient is then mostly rounding error. So
    the encoder's gradient is compared for a random weighting of the embeddings, and the loss by
    value.
    """
    rows = spec["sizes"]["check_rows"]
    model = _model(cell, dropout=0.0)
    sides = _batch(cell, rows)
    weights = torch.randn(rows, cell["encoder"]["hidden_dim"], device=DEVICE)

    def differentiated(value: torch.Tensor) -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        value.backward()
        gradients = [one.grad.flatten() for one in model.parameters() if one.grad is not None]
        return torch.cat(gradients)

    def evaluated(autocast: bool) -> dict[str, torch.Tensor]:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            embeddings = model(dict(sides[0]))["sentence_embedding"]
            loss = _loss(model, None)([dict(side) for side in sides], None).detach()
        gradient = differentiated((embeddings.float() * weights).sum())
        return {"loss": loss, "embeddings": embeddings.detach(), "gradient": gradient}

    def cached(chunk: int | None) -> dict[str, torch.Tensor]:
        value = _loss(model, chunk)([dict(side) for side in sides], None)
        return {"loss, cached": value.detach(), "gradient, cached": differentiated(value)}

    exact, rounded = evaluated(False), evaluated(True)
    errors: dict[str, float] = {}
    for name, tolerance in {"loss": 5e-2, "embeddings": 2e-2, "gradient": 1e-1}.items():
        errors |= checked({name: rounded[name]}, {name: exact[name]}, tolerance=tolerance)
    if cell["chunk_size"]:
        errors |= checked(cached(rows // 2), cached(None), tolerance=1e-3)
    return errors


def _model(cell: Cell, *, dropout: float) -> SentenceTransformer:
    encoder = cell["encoder"]
    config = BertConfig(
        vocab_size=encoder["vocabulary_size"],
        hidden_size=encoder["hidden_dim"],
        num_hidden_layers=encoder["num_layers"],
        num_attention_heads=encoder["num_heads"],
        intermediate_size=encoder["mlp_dim"],
        max_position_embeddings=max(cell["num_tokens"], 16),
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=0.0,  # jaxcl's encoder has no attention dropout either
    )
    with tempfile.TemporaryDirectory() as folder:
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        words += [f"w{number}" for number in range(encoder["vocabulary_size"] - len(words))]
        (Path(folder) / "vocab.txt").write_text("\n".join(words))
        BertTokenizerFast(str(Path(folder) / "vocab.txt")).save_pretrained(folder)
        BertModel(config, add_pooling_layer=False).save_pretrained(folder)
        transformer = models.Transformer(folder, max_seq_length=cell["num_tokens"])
    modules = [transformer, models.Pooling(encoder["hidden_dim"]), models.Normalize()]
    return SentenceTransformer(modules=modules, device=DEVICE).train()


def _loss(model: SentenceTransformer, chunk_size: int | None) -> torch.nn.Module:
    if chunk_size is None:
        return MultipleNegativesRankingLoss(model, scale=SCALE)
    return CachedMultipleNegativesRankingLoss(model, scale=SCALE, mini_batch_size=chunk_size)


def _batch(cell: Cell, rows: int) -> tuple[Features, Features]:
    shape, vocabulary = (rows, cell["num_tokens"]), cell["encoder"]["vocabulary_size"]
    mask = torch.ones(shape, dtype=torch.long, device=DEVICE)

    def side() -> Features:
        return {
            "input_ids": torch.randint(5, vocabulary, shape, device=DEVICE),
            "attention_mask": mask,
            "token_type_ids": torch.zeros_like(mask),
        }

    return side(), side()


if __name__ == "__main__":
    run(measure_all)
