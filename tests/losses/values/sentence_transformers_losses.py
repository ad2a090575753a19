"""Writes the losses of sentence-transformers for random unit vectors; run once.

    pip install sentence-transformers torch && python sentence_transformers_losses.py

The JSON file next to it has the versions and the values; the tests need neither package.
"""

import json
from pathlib import Path

import numpy as np
import sentence_transformers
import torch
from sentence_transformers.sentence_transformer.losses import (
    CoSENTLoss,
    EmbedDistillLoss,
    GISTEmbedLoss,
    MarginMSELoss,
    MultipleNegativesRankingLoss,
)
from torch.nn.functional import normalize

ROWS, DIM, NEGATIVES = 7, 12, 3
ALL = ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")


def unit_vectors(seed: int, *shape: int) -> torch.Tensor:
    vectors = np.random.default_rng(seed).normal(size=shape)
    return torch.tensor(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))


def ranking(columns: list[torch.Tensor], **options) -> float:
    loss = MultipleNegativesRankingLoss(torch.nn.Identity(), scale=20.0, **options)
    return loss.compute_loss_from_embeddings(columns, None).item()


def gist(columns: list[torch.Tensor], guides: list[torch.Tensor], **options) -> float:
    """A guide or model that looks up given embeddings."""
    loss = GISTEmbedLoss.__new__(GISTEmbedLoss)
    torch.nn.Module.__init__(loss)
    defaults = {
        "temperature": 0.05,
        "similarity_fct": torch.nn.CosineSimilarity(dim=-1),
        "must_retokenize": False,
        "gather_across_devices": False,
        "contrast_anchors": True,
        "contrast_positives": True,
        "cross_entropy_loss": torch.nn.CrossEntropyLoss(),
        "margin_strategy": "absolute",
        "margin": 0.0,
    }
    for name, value in {**defaults, **options}.items():
        setattr(loss, name, value)
    loss.model = lambda features: {"sentence_embedding": features["model"]}
    loss.guide = lambda features: {"sentence_embedding": features["guide"]}
    features = [
        {"model": column, "guide": guide} for column, guide in zip(columns, guides, strict=True)
    ]
    return loss(features, None).item()


def labelled(loss: torch.nn.Module, columns: list[torch.Tensor], labels: torch.Tensor) -> float:
    return loss.compute_loss_from_embeddings(columns, labels).item()


def distilled(columns: list[torch.Tensor], teacher: list[torch.Tensor], metric: str) -> float:
    """The teacher's embeddings are given, so no teacher is loaded."""
    loss = EmbedDistillLoss.__new__(EmbedDistillLoss)
    torch.nn.Module.__init__(loss)
    loss.projection, loss.distance_metric = None, metric
    return loss.compute_loss_from_embeddings(columns, teacher).item()


def labelled_values(pair: list[torch.Tensor], negatives: torch.Tensor) -> dict[str, float]:
    """The losses that compare embeddings with scores, or with the embeddings of a teacher."""
    rng = np.random.default_rng(6)
    ratings = torch.tensor(rng.integers(0, 5, ROWS) / 4)
    teacher_scores = torch.tensor(rng.normal(size=(ROWS, 1 + NEGATIVES)))
    model = torch.nn.Identity()
    margin, one = MarginMSELoss(model), [*pair, negatives[:, 0]]
    teacher = [unit_vectors(seed, ROWS, DIM) for seed in (7, 8)]
    return {
        "cosent": labelled(CoSENTLoss(model, scale=20.0), pair, ratings),
        "cosent, scale": labelled(CoSENTLoss(model, scale=3.0), pair, ratings),
        "margin_mse": labelled(margin, [*pair, *negatives.unbind(1)], teacher_scores),
        "margin_mse, one": labelled(margin, one, teacher_scores[:, :2]),
        "embeddings, cosine": distilled(pair, teacher, "cosine"),
        "embeddings, mse": distilled(pair, teacher, "mse"),
    }


def main() -> None:
    pair = [unit_vectors(seed, ROWS, DIM) for seed in (0, 1)]
    with_negatives = [*pair, *unit_vectors(2, ROWS, NEGATIVES, DIM).unbind(1)]
    guides = [unit_vectors(seed, ROWS, 5) for seed in (3, 4)]
    values = {
        "query_to_doc": ranking(pair),
        "symmetric": ranking(pair, directions=ALL[:2], partition_mode="per_direction"),
        "joint, two": ranking(pair, directions=ALL[:2]),
        "joint, all": ranking(pair, directions=ALL),
        "explicit": ranking(with_negatives),
        "explicit, joint, all": ranking(with_negatives, directions=ALL),
        **{
            f"explicit, hardness of {mode}": ranking(
                with_negatives, hardness_mode=mode, hardness_strength=5.0
            )
            for mode in ("in_batch_negatives", "hard_negatives", "all_negatives")
        },
        "gist": gist(pair, guides),
        "gist, margin": gist(pair, guides, margin=0.2),
        "gist, relative margin": gist(pair, guides, margin=0.2, margin_strategy="relative"),
        "gist, keys alone": gist(pair, guides, contrast_anchors=False, contrast_positives=False),
        "gist, explicit": gist(
            [*pair, unit_vectors(2, ROWS, 1, DIM)[:, 0]],
            [*guides, unit_vectors(5, ROWS, 1, 5)[:, 0]],
            contrast_positives=False,
        ),
        "matryoshka": sum(
            weight * ranking([normalize(side[:, :dim], dim=-1) for side in pair])
            for dim, weight in ((12, 1.0), (8, 0.5), (3, 0.25))
        ),
    }
    record = {
        "sentence-transformers": sentence_transformers.__version__,
        "torch": torch.__version__,
        "values": values,
        "labelled": labelled_values(pair, unit_vectors(2, ROWS, NEGATIVES, DIM)),
    }
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
