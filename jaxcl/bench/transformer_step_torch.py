"""The parts of `jaxcl.bench.bench_transformer_step` in PyTorch.

    python transformer_step_torch.py SPEC.json

It imports only torch and transformers. SPEC.json has the sizes. Each line of input, `PART COUNT`,
is answered with the CPU seconds of a call.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F


def main(spec_file: str) -> None:
    """Prepare all parts and answer requests."""
    with open(spec_file) as file:
        spec = json.load(file)
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    parts = _parts(spec)
    print(json.dumps({"torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        name, count = line.rsplit(maxsplit=1)
        start = time.process_time()
        for _ in range(int(count)):
            parts[name]()
        print(json.dumps({"seconds": (time.process_time() - start) / int(count)}), flush=True)


def _parts(spec: dict[str, int]) -> dict[str, Callable[[], Any]]:
    return _parts_of_model(spec) | _parts_of_layers(spec)


def _backward(function: Callable) -> Callable[[], Any]:
    return lambda: (function().square().sum() / 2).backward()


def _parts_of_model(spec: dict[str, int]) -> dict[str, Callable[[], Any]]:
    from transformers import BertConfig, BertModel

    rows, tokens = spec["rows"], spec["tokens"]
    config = BertConfig(
        vocab_size=spec["vocabulary"],
        hidden_size=spec["hidden"],
        num_hidden_layers=spec["layers"],
        num_attention_heads=spec["heads"],
        intermediate_size=4 * spec["hidden"],
    )
    model = BertModel(config, add_pooling_layer=False).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    ids = torch.randint(spec["vocabulary"], (rows, tokens))
    mask = torch.ones(rows, tokens, dtype=torch.long)
    vectors = [torch.randn(rows, spec["hidden"], requires_grad=True) for _ in range(2)]

    def encoder() -> Any:
        return model(input_ids=ids, attention_mask=mask).last_hidden_state

    def loss() -> Any:
        queries, keys = (F.normalize(one) for one in vectors)
        scores, labels = queries @ keys.T * 20, torch.arange(rows)
        return F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return {
        "encoder, forward": torch.no_grad()(encoder),
        "encoder": _backward(encoder),
        "loss": _backward(loss),
        "clipping and AdamW": update,
    }


def _parts_of_layers(spec: dict[str, int]) -> dict[str, Callable[[], Any]]:
    b, t, h, n = (spec[name] for name in ("rows", "tokens", "hidden", "heads"))
    wide = 4 * h
    lengths = torch.ones(b, 1, 1, t, dtype=torch.bool).expand(b, 1, t, t)
    hidden = torch.randn(b, t, h, requires_grad=True)
    large = torch.randn(b, t, wide, requires_grad=True)
    sides = [torch.randn(b, t, h, requires_grad=True) for _ in range(3)]
    kernel = torch.randn(wide, h)
    rows, gradient = torch.randn(b * t, h), torch.randn(b * t, wide)
    norm = torch.nn.LayerNorm(h)
    forward = torch.no_grad()

    def attention(seen: Any) -> Callable:
        def attend() -> Any:
            heads = (side.view(b, t, n, h // n).transpose(1, 2) for side in sides)
            mixed = F.scaled_dot_product_attention(*heads, attn_mask=seen)
            return mixed.transpose(1, 2).reshape(b, t, h)

        return attend

    return {
        "attention with a mask, forward": forward(attention(lengths)),
        "attention with a mask": _backward(attention(lengths)),
        "attention without, forward": forward(attention(None)),
        "attention without": _backward(attention(None)),
        "product x W": forward(lambda: F.linear(rows, kernel)),
        "product g Wᵀ": forward(lambda: gradient @ kernel),
        "product xᵀ g": forward(lambda: gradient.T @ rows),
        "GELU": _backward(lambda: F.gelu(large)),
        "layer norm": _backward(lambda: norm(hidden)),
        "dropout": _backward(lambda: F.dropout(hidden, 0.1)),
    }


if __name__ == "__main__":
    main(sys.argv[1])
