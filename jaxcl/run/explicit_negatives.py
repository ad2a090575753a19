"""Check the explicit negatives of a run's data against its settings, and describe them."""

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np

from jaxcl.data.row_negatives import RowNegatives
from jaxcl.data.text_negatives import TextNegatives
from jaxcl.losses import ExplicitNegatives
from jaxcl.run.build_loss import batch_needs
from jaxcl.settings.sections import Settings

__all__ = ["check_explicit_negatives", "negatives_summary", "negatives_warnings"]

_FromData: TypeAlias = RowNegatives | TextNegatives | None

_MANY = 16
"""Number of negatives per row above which a run warns about their cost."""


def check_explicit_negatives(settings: Settings, negatives: _FromData) -> None:
    """Raise a `ValueError` if the settings do not match the negatives of the training rows.

    Args:
      settings: the settings of the run.
      negatives: the negatives, as in `RunData`.
    """
    loss, name = settings.parts.loss, settings.loss.name
    mines = settings.negatives.mined.refresh_every is not None
    if "teacher_scores" in batch_needs(settings) and negatives is None:
        raise ValueError(
            f"the loss {name!r} needs a teacher's scores for the negatives of each row; give the "
            "rows negatives and teacher_scores, or set data.negatives to an .npz that has both"
        )
    if not isinstance(negatives, TextNegatives):
        return
    leave_out = "set data.negatives_per_row=0 to leave them out"
    if ExplicitNegatives not in loss.negatives:
        raise ValueError(
            f"the training rows have negatives, but the loss {name!r} takes no explicit "
            f"negatives; {leave_out}"
        )
    if mines:
        raise ValueError(
            "the training rows have negatives, and negatives.mined.refresh_every mines others; "
            f"set it to None, or {leave_out}"
        )
    if settings.negatives.guide == "data":
        raise ValueError(
            "data.guides has embeddings of the training rows, but not of their negatives; set "
            f"negatives.guide='momentum', or {leave_out}"
        )


def negatives_warnings(settings: Settings, negatives: _FromData) -> Iterator[str]:
    """Yield a warning for each likely problem with the negatives of the training rows."""
    if not isinstance(negatives, TextNegatives):
        return
    if settings.data.negatives_per_row is None and negatives.per_row > _MANY:
        yield (
            f"each row of a batch is padded to {negatives.per_row} negatives, the length of the "
            f"longest list, but the mean is {negatives.counts.mean():.1f}; padding is encoded too, "
            "so set data.negatives_per_row to a smaller number"
        )
    loss, masks = settings.parts.loss, settings.loss.masks
    compares_rows = "ids" in loss.masks and "labels" not in loss.columns
    if negatives.num_own and compares_rows and "text" not in masks:
        yield (
            f"{negatives.num_own:,} negatives have the same text as a positive or the query of "
            "their row; add 'text' to loss.masks to leave them out"
        )


def negatives_summary(negatives: _FromData) -> str:
    """Summarise the negatives of the training rows as the end of a sentence; `""` without any."""
    if not isinstance(negatives, TextNegatives):
        return ""
    counts = np.minimum(negatives.counts, negatives.per_row)
    positive = counts[counts > 0]
    return (
        f"; negatives: {len(positive):,} training rows have {positive.mean():.1f} on average, "
        f"{negatives.texts.num_rows:,} distinct texts"
    )
