"""The PyTorch twin of `jaxcl.bench.bench_train_step`: the same models, idiomatic PyTorch.

    python train_step_torch.py SPEC.json

It needs only torch and NumPy, not jaxcl, so that any interpreter with torch can run it. Each line
of its standard input is a command, and each answer is a line of JSON:

    losses N    losses and gradient norms of N updates without dropout, from the initial parameters
    run N       seconds of N training updates
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PADDING_ID = 0
SIDES = ("query", "key")


class StaticEncoder(nn.Module):
    """A weighted sum of token embeddings, with token dropout and unit norm.

    The sum has three variants: `"ragged"`, an embedding bag over the unmasked tokens of all rows;
    `"padded"`, an embedding bag over padded rows; `"einsum"`, all embeddings and a product.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], *, dropout: float, variant: str):
        super().__init__()
        self.table = nn.Parameter(torch.tensor(arrays["table"]))
        self.token_weight = nn.Parameter(torch.tensor(arrays["token_weight"]))
        self.position_weight = nn.Parameter(torch.tensor(arrays["position_weight"]))
        self.dropout = dropout
        self.bag: Callable = {"ragged": _ragged_bag, "padded": _padded_bag, "einsum": _einsum_bag}[
            variant
        ]

    def forward(self, tokens: Tensor) -> Tensor:
        mask = tokens != PADDING_ID
        if self.training and self.dropout:
            mask &= torch.rand(tokens.shape) >= self.dropout
        positions = self.position_weight[: tokens.shape[1]].expand(tokens.shape)
        return F.normalize(self.bag(self.table, self.token_weight, positions, tokens, mask), dim=-1)


def _ragged_bag(
    table: Tensor, weight: Tensor, positions: Tensor, tokens: Tensor, mask: Tensor
) -> Tensor:
    lengths = mask.sum(1)
    flat = tokens[mask]
    return F.embedding_bag(
        flat,
        table,
        lengths.cumsum(0) - lengths,
        mode="sum",
        per_sample_weights=(F.embedding(flat, weight[:, None])[:, 0] + positions[mask]).exp(),
    )


def _padded_bag(
    table: Tensor, weight: Tensor, positions: Tensor, tokens: Tensor, mask: Tensor
) -> Tensor:
    ids = torch.where(mask, tokens, PADDING_ID)
    return F.embedding_bag(
        ids,
        table,
        mode="sum",
        per_sample_weights=(F.embedding(ids, weight[:, None])[..., 0] + positions).exp() * mask,
        padding_idx=PADDING_ID,
    )


def _einsum_bag(
    table: Tensor, weight: Tensor, positions: Tensor, tokens: Tensor, mask: Tensor
) -> Tensor:
    weights = (F.embedding(tokens, weight[:, None])[..., 0] + positions).exp() * mask
    return torch.einsum("bt,bth->bh", weights, F.embedding(tokens, table))


class TransformerEncoder(nn.Module):
    """Pre-LN self-attention, mean pooling, a projection and unit norm."""

    def __init__(
        self, arrays: Mapping[str, np.ndarray], *, num_layers: int, num_heads: int, dropout: float
    ):
        super().__init__()
        self.token_table = nn.Embedding.from_pretrained(
            torch.tensor(arrays["token_table"]), freeze=False
        )
        self.position_table = nn.Parameter(torch.tensor(arrays["position_table"]))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(_under(arrays, f"blocks/{layer}"), num_heads=num_heads, dropout=dropout)
            for layer in range(num_layers)
        )
        self.norm = _layer_norm(arrays, "norm")
        self.projection = _linear(arrays, "projection")

    def forward(self, tokens: Tensor) -> Tensor:
        mask = tokens != PADDING_ID
        hidden = self.token_table(tokens) + self.position_table[: tokens.shape[1]]
        hidden = self.dropout(hidden)
        for block in self.blocks:
            hidden = block(hidden, mask[:, None, None, :])
        weights = mask.to(hidden.dtype)
        pooled = torch.einsum("bt,bth->bh", weights, self.norm(hidden))
        vectors = self.projection(pooled / weights.sum(1, keepdim=True).clamp(min=1))
        return F.normalize(vectors, dim=-1)


class Block(nn.Module):
    """Self-attention and an MLP, each with a preceding norm, dropout and a residual."""

    def __init__(self, arrays: Mapping[str, np.ndarray], *, num_heads: int, dropout: float):
        super().__init__()
        self.attention_norm = _layer_norm(arrays, "attention_norm")
        self.mlp_norm = _layer_norm(arrays, "mlp_norm")
        self.projections = _linear(arrays, "projections")
        self.output = _linear(arrays, "output")
        self.widen = _linear(arrays, "widen")
        self.narrow = _linear(arrays, "narrow")
        self.dropout = nn.Dropout(dropout)
        self.num_heads = num_heads

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        hidden = hidden + self.dropout(self.attend(self.attention_norm(hidden), mask))
        widened = F.gelu(self.widen(self.mlp_norm(hidden)), approximate="tanh")
        return hidden + self.dropout(self.narrow(widened))

    def attend(self, hidden: Tensor, mask: Tensor) -> Tensor:
        b, t, h = hidden.shape
        heads = self.projections(hidden).view(b, t, 3, self.num_heads, h // self.num_heads)
        queries, keys, values = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return self.output(mixed.transpose(1, 2).reshape(b, t, h))


def _under(arrays: Mapping[str, np.ndarray], folder: str) -> dict[str, np.ndarray]:
    prefix = f"{folder}/"
    return {name[len(prefix) :]: arrays[name] for name in arrays if name.startswith(prefix)}


def _linear(arrays: Mapping[str, np.ndarray], name: str) -> nn.Linear:
    kernel = arrays[f"{name}/kernel"]
    linear = nn.Linear(*kernel.shape)
    linear.weight.data = torch.tensor(kernel.T.copy())  # PyTorch keeps [out, in]
    linear.bias.data = torch.tensor(arrays[f"{name}/bias"])
    return linear


def _layer_norm(arrays: Mapping[str, np.ndarray], name: str) -> nn.LayerNorm:
    scale = arrays[f"{name}/scale"]
    norm = nn.LayerNorm(scale.shape, eps=1e-6)
    norm.weight.data = torch.tensor(scale)
    norm.bias.data = torch.tensor(arrays[f"{name}/bias"])
    return norm


class Training:
    """A model and its optimizer, with methods that compute gradients and update the weights.

    Args:
      spec: the name and options of the model, and the settings of the optimizer.
      arrays: the initial parameters, by path.
      dropout: the dropout rate, of tokens (`static`) or of activations (`transformer`).
    """

    def __init__(
        self, spec: Mapping[str, Any], arrays: Mapping[str, np.ndarray], *, dropout: float
    ):
        towers = _under(arrays, "towers/both")
        self.encoder: nn.Module
        if spec["model"] == "static":
            self.encoder = StaticEncoder(towers, dropout=dropout, variant=spec["variant"])
        else:
            self.encoder = TransformerEncoder(
                towers,
                num_layers=spec["num_layers"],
                num_heads=spec["num_heads"],
                dropout=dropout,
            )
        self.log_temperature = nn.Parameter(torch.tensor(arrays["log_temperature"]))
        self.bounds = np.log(spec["temperature_bounds"]).tolist()
        self.clip_norm = spec["clip_norm"]
        self.parameters = [*self.encoder.parameters(), self.log_temperature]
        self.optimizer = torch.optim.Adam(
            self.parameters, lr=spec["learning_rate"], **{spec["adam"]: True}
        )

    def step(self, batch: Mapping[str, Tensor]) -> None:
        """Make one update."""
        self.differentiate(batch)
        self.update()

    def checked_step(self, batch: Mapping[str, Tensor]) -> tuple[float, float]:
        """Make one update; return the loss before the update and the norm of the gradient."""
        loss = self.differentiate(batch)
        # In float64: PyTorch's own float32 norm of a large table is off by 0.2%.
        squares = [parameter.grad.double().square().sum() for parameter in self.parameters]
        self.update()
        return float(loss), float(sum(squares)) ** 0.5

    def differentiate(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Compute the gradients of the parameters; return the loss."""
        queries, keys = (self.encoder(batch[side]) for side in SIDES)
        scores = queries @ keys.T / self.log_temperature.exp()
        labels = torch.arange(len(scores))
        loss = (F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)) / 2
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        """Clip the gradients, and update the parameters."""
        nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimizer.step()
        with torch.no_grad():
            self.log_temperature.clamp_(*self.bounds)


def main(spec_path: str) -> None:
    """Answer commands until standard input ends."""
    with open(spec_path) as file:
        spec = json.load(file)
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(spec["seed"])
    arrays = dict(np.load(spec["arrays"]))
    batches = [
        {side: torch.tensor(tokens).long() for side, tokens in zip(SIDES, pair, strict=True)}
        for pair in zip(*(arrays.pop(f"batches/{side}") for side in SIDES), strict=True)
    ]
    training = Training(spec, arrays, dropout=spec["dropout"])
    position = 0
    _answer({"torch": torch.__version__, "threads": torch.get_num_threads()})
    for command, count in _commands():
        if command == "losses":
            plain = Training(spec, arrays, dropout=0.0)
            done = [plain.checked_step(batches[i % len(batches)]) for i in range(count)]
            losses, norms = zip(*done, strict=True)
            _answer({"losses": losses, "gradient_norms": norms})
        elif command == "run":
            start = time.perf_counter()
            for _ in range(count):
                training.step(batches[position % len(batches)])
                position += 1
            _answer({"seconds": time.perf_counter() - start})
        else:
            raise ValueError(f"command {command!r} is unknown; use losses or run")


def _commands() -> Iterator[tuple[str, int]]:
    for line in sys.stdin:
        command, count = line.split()
        yield command, int(count)


def _answer(answer: Mapping[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
