"""The sizes to measure on a GPU (`FULL`), and in a rehearsal on a CPU (`TINY`).

Standard library only: the parent and the PyTorch scripts read these without starting JAX.
"""

from typing import Any, NamedTuple

__all__ = ["FULL", "TINY", "Cell", "Encoder", "Sizes", "as_json", "step_flops"]


class Encoder(NamedTuple):
    """The shape of a BERT encoder."""

    name: str
    num_layers: int
    hidden_dim: int
    num_heads: int
    mlp_dim: int
    vocabulary_size: int = 30_522


class Cell(NamedTuple):
    """One training step: an encoder, a batch, and how many rows are encoded at a time.

    Attributes:
      encoder: the model, shared by queries and keys.
      num_tokens: tokens of every text; none is padding.
      batch_size: pairs.
      chunk_size: rows per chunk of the gradient cache; `None` encodes all rows at once.
    """

    encoder: Encoder
    num_tokens: int
    batch_size: int
    chunk_size: int | None

    @property
    def name(self) -> str:
        chunks = f", chunks of {self.chunk_size:,}" if self.chunk_size else ""
        return f"{self.encoder.name}, {self.num_tokens} tokens, batch {self.batch_size:,}{chunks}"


class Sizes(NamedTuple):
    """The sizes of all parts.

    Attributes:
      name: "full" or "tiny".
      rounds: timed rounds; their median is reported.
      round_seconds: minimum seconds per round, reached by repeating short calls.
      product_size: rows of the square bf16 product that is the ceiling of arithmetic.
      copy_mebibytes: the array whose copy is the ceiling of memory traffic.
      losses: names of the losses that are checked.
      smoke_rows: pairs that each loss is checked on.
      smoke_dim: width of these pairs' embeddings.
      assigned_rows: pairs of the assignment in the smoke part.
      parity_batches: batch sizes at which kernels are compared with the exact loss.
      parity_dims: widths of the embeddings in this comparison.
      loss_batches: batch sizes of the timed losses.
      loss_dims: widths of the embeddings of the timed losses.
      tiles: tile sizes of the tiled loss, the most promising first.
      cells: timed training steps, the most valuable first.
      check_rows: pairs on which a training step is checked first.
      search_rows: rows of the nearest-neighbour tables, each with its number of queries.
      assignments: rows and preset of the timed assignments.
      search_dim: width of the embeddings in searches and assignments.
      search_count: neighbours per query.
      assigned_batch: rows of a batch in the assignments.
      smoke_options: additional options of the run of the smoke config.
      default_config: whether the default config is trained in addition to its `smoke` variant.
    """

    name: str
    rounds: int
    round_seconds: float
    product_size: int
    copy_mebibytes: int
    losses: tuple[str, ...]
    smoke_rows: int
    smoke_dim: int
    assigned_rows: int
    parity_batches: tuple[int, ...]
    parity_dims: tuple[int, ...]
    loss_batches: tuple[int, ...]
    loss_dims: tuple[int, ...]
    tiles: tuple[int, ...]
    cells: tuple[Cell, ...]
    check_rows: int
    search_rows: tuple[tuple[int, int], ...]
    assignments: tuple[tuple[int, str], ...]
    search_dim: int
    search_count: int
    assigned_batch: int
    smoke_options: tuple[str, ...]
    default_config: bool


_MINILM = Encoder("MiniLM", num_layers=6, hidden_dim=384, num_heads=12, mlp_dim=1_536)
_BERT = Encoder("BERT base", num_layers=12, hidden_dim=768, num_heads=12, mlp_dim=3_072)
_TOY = Encoder("toy", num_layers=1, hidden_dim=16, num_heads=2, mlp_dim=32, vocabulary_size=64)

FULL = Sizes(
    name="full",
    rounds=7,
    round_seconds=0.03,
    product_size=16_384,
    copy_mebibytes=2_048,
    losses=(
        *("infonce", "sigmoid", "supervised", "decoupled", "hard"),
        *("running_estimate", "distillation"),
    ),
    smoke_rows=1_000,  # no tile divides it
    smoke_dim=96,
    assigned_rows=4_096,
    parity_batches=(1_024, 8_192),
    parity_dims=(256, 768),
    loss_batches=(8_192, 32_768, 131_072),
    loss_dims=(256, 768),
    tiles=(4_096, 16_384, 8_192, 2_048, 1_024),
    cells=(
        Cell(_MINILM, 64, 1_024, None),
        Cell(_BERT, 64, 1_024, None),
        Cell(_BERT, 256, 1_024, 128),
        Cell(_MINILM, 64, 8_192, 1_024),
        Cell(_BERT, 64, 8_192, 512),
        Cell(_MINILM, 256, 1_024, 512),
        Cell(_MINILM, 256, 8_192, 512),
        Cell(_BERT, 256, 8_192, 128),
    ),
    check_rows=32,
    search_rows=((100_000, 100_000), (1_000_000, 65_536)),
    assignments=((100_000, "light"), (100_000, "full"), (1_000_000, "light")),
    search_dim=256,
    search_count=32,
    assigned_batch=1_024,
    smoke_options=(),
    default_config=True,
)
"""For one GPU with about 80 GB."""

TINY = Sizes(
    name="tiny",
    rounds=2,
    round_seconds=0.0,
    product_size=64,
    copy_mebibytes=1,
    losses=("infonce",),
    smoke_rows=37,
    smoke_dim=8,
    assigned_rows=256,
    parity_batches=(128,),
    parity_dims=(64,),
    loss_batches=(64,),
    loss_dims=(8,),
    tiles=(32,),
    cells=(Cell(_TOY, 8, 8, 4),),
    check_rows=8,
    search_rows=((300, 100),),
    assignments=((256, "light"),),
    search_dim=16,
    search_count=4,
    assigned_batch=16,
    smoke_options=(
        "--config.steps=4",
        "--config.global_batch_size=16",
        "--config.model.dim=16",
        "--config.data.vocabulary_size=500",
        "--config.data.code_pairs.max_pairs=120",
    ),
    default_config=False,
)
"""For a rehearsal on a CPU: every part runs, in seconds."""


def step_flops(cell: Cell) -> float:
    """The floating-point operations that the mathematics of one training step requires.

    These are all matrix products of both sides' encoders and of the scores, counted three times:
    forward, and backward to both factors. Recomputation by a gradient cache is not counted.

    Example:
      >>> step_flops(Cell(Encoder("one", 1, 2, 1, 3), 5, 7, None))  # 3 · (70 · 96 + 14 · 8 + 196)
      21084.0
    """
    encoder, tokens = cell.encoder, cell.num_tokens
    hidden = encoder.hidden_dim
    per_token = encoder.num_layers * (8 * hidden**2 + 4 * hidden * encoder.mlp_dim)
    per_token += encoder.num_layers * 4 * tokens * hidden  # attention's two products
    texts = 2 * cell.batch_size
    scores = 2 * cell.batch_size**2 * hidden
    return 3.0 * (texts * tokens * per_token + texts * 2 * hidden**2 + scores)


def as_json(sizes: Sizes) -> dict[str, Any]:
    """The sizes as a PyTorch script reads them: dictionaries, each cell with its name and FLOPs."""
    cells = [
        {
            "name": cell.name,
            "flops": step_flops(cell),
            **cell._asdict(),
            "encoder": cell.encoder._asdict(),
        }
        for cell in sizes.cells
    ]
    return {**sizes._asdict(), "cells": cells}
