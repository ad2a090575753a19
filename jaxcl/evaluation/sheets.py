"""Contact sheets of a run with images: its training images, and its hits and errors.

In WORKDIR/sheets, each as a PNG and an HTML page:

    views        at the start: images and their augmented views
    neighbours   at each evaluation: queries of the validation split and their nearest keys
    negatives    at each evaluation: wrong keys that are nearer to a query than its own key

Process 0 writes them, and they never affect training.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.data.prepare import RunData
from jaxcl.data.table import Table
from jaxcl.evaluation.held_out import Ranked
from jaxcl.evaluation.known_positives import KnownPositives
from jaxcl.evaluation.retrieval import dense_scores
from jaxcl.host.paths import AnyPath
from jaxcl.host.progress import say
from jaxcl.ops.mesh import fetch
from jaxcl.run.contact_sheet import Cell, write_sheet
from jaxcl.run.training import Training
from jaxcl.run.vector_search import best_rows
from jaxcl.settings.derived import shows_sheets
from jaxcl.settings.sections import Settings
from jaxcl.step.encode_rows import keys_of_side, keys_of_view
from jaxcl.step.train_state import TrainState
from jaxcl.typing import SIDES, Float, Int, PyTree, UInt8

__all__ = ["FOLDER", "Sheets", "augmented_images", "hardest_negatives"]

FOLDER = "sheets"
"""The folder of the sheets in the workdir."""

_ROWS = 8
_NEIGHBOURS = 6
_MOST_QUERIES = 4096
_SCORES_AT_ONCE = 2**24


class Sheets:
    """Writes the sheets of a run, or nothing if they are off.

    A sheet that cannot be written causes one warning, and the run continues.

    Args:
      settings: the settings of the run.
      data: the data of the run.
      workdir: the workdir of the run.
    """

    def __init__(self, settings: Settings, data: RunData, workdir: AnyPath) -> None:
        self._settings, self._data = settings, data
        self._folder = workdir / FOLDER
        self._on = shows_sheets(settings)
        self._announced = False

    def views(self, training: Training, state: TrainState) -> None:
        """Write the sheet of augmented views; every process must call this.

        Each row is augmented as it would be in the next step.
        """
        if not self._on:
            return
        key_data, step = fetch(jax.random.key_data(state.key)), int(state.step)
        if jax.process_index() != 0:
            return
        table = self._data.tables["train"]
        rows = np.arange(min(_ROWS, table.num_rows))
        shown: list[list[Cell]] = [[] for _ in rows]
        for side in SIDES:
            values = _Values.of(self._data, self._settings, "train", side, rows)
            originals = values.cells()
            views = None
            if getattr(self._settings.data.modality, side) == "image":
                key = jax.random.wrap_key_data(jnp.asarray(key_data))
                views = augmented_images(training, key, step, table, side, rows)
            for number, cells in enumerate(shown):
                cells.append(
                    originals[number]._replace(caption=f"{side} {originals[number].caption}")
                )
                if views is not None:
                    cells.append(Cell(f"{side}, augmented", views[number]))
        self._write("views", f"Rows of the training split and their views, step {step:,}", shown)

    def evaluated(self, step: int, ranked: Ranked) -> None:
        """Write the sheets of an evaluation; does nothing except on process 0."""
        if not self._on or jax.process_index() != 0:
            return
        queries, keys, known = ranked
        some = np.unique(np.linspace(0, len(queries) - 1, min(_ROWS, len(queries))).astype(int))
        scores = dense_scores(queries[some], keys)
        nearest = [best_rows(of_query, _NEIGHBOURS) for of_query in scores]
        cells = functools.partial(_Values.of, self._data, self._settings, "validation")
        shown = []
        others = [_others(known, row) for row in some.tolist()]
        for number, row in enumerate(some.tolist()):
            rows = np.array([row, *nearest[number]])
            key_cells = cells("key", rows).cells(scores[number][rows])
            marks = ["own" if key == row or key in others[number] else None for key in rows]
            marked = [cell._replace(mark=mark) for cell, mark in zip(key_cells, marks, strict=True)]
            (query,) = cells("query", np.array([row])).cells()
            shown.append([query, *marked])
        title = "Queries of the validation split, their own keys, and the nearest keys"
        self._write("neighbours", f"{title}, step {step:,}", shown)
        asked, hard, margins = hardest_negatives(queries, keys, known, count=_ROWS)
        parts = (cells("query", asked), cells("key", asked), cells("key", hard))
        columns = [part.cells() for part in parts]
        shown = [
            [
                query,
                own._replace(mark="own"),
                wrong._replace(mark="negative", caption=f"{margin:+.3f} {wrong.caption}"),
            ]
            for query, own, wrong, margin in zip(*columns, margins.tolist(), strict=True)
        ]
        title = "Queries, their own keys, and the hardest negatives with their margins"
        if len(queries) > _MOST_QUERIES:
            title += f", of {_MOST_QUERIES:,} of {len(queries):,} queries"
        self._write("negatives", f"{title}, step {step:,}", shown)

    def _write(self, name: str, title: str, rows: Sequence[Sequence[Cell]]) -> None:
        try:
            write_sheet(self._folder, name, title, rows)
        except OSError as error:
            say(f"warning: the sheets of this run are not written: {error}")
            self._on = False
        else:
            if not self._announced:
                say(f"sheets of images are written to {self._folder}")
            self._announced = True


def augmented_images(
    training: Training,
    key: jax.Array,
    step: int,
    table: Table,
    side: str,
    rows: Int[np.ndarray, " b"],
) -> UInt8[np.ndarray, "b h w 3"] | None:
    """The augmented views that a train step makes of some rows; `None` without augmentation.

    Args:
      training: the run.
      key: the random key of the run's state.
      step: the number of completed steps.
      table: the training rows.
      side: a side with images.
      rows: numbers of the rows.
    """
    augment = training.towers.augment.get(side)
    if augment is None:
        return None
    with jax.default_device(jax.local_devices()[0]):
        keys = keys_of_side(jax.random.fold_in(key, step), SIDES.index(side), jnp.asarray(rows))
        assert keys is not None  # it is `None` only without a random key
        views: PyTree = jax.jit(jax.vmap(augment))(table.side(side, rows), keys_of_view(keys))
    return as_uint8(np.asarray(views["image"]))


def as_uint8(images: np.ndarray) -> UInt8[np.ndarray, "*n h w 3"]:
    """Images in [0, 1], rounded to 256 levels; uint8 images are returned unchanged."""
    if images.dtype == np.uint8:
        return images
    return np.round(255 * np.clip(images, 0, 1)).astype(np.uint8)


def hardest_negatives(
    queries: Float[np.ndarray, "n d"],
    keys: Float[np.ndarray, "n d"],
    known: KnownPositives,
    *,
    count: int,
) -> tuple[Int[np.ndarray, " r"], Int[np.ndarray, " r"], Float[np.ndarray, " r"]]:
    """Find the queries with the largest margin of a wrong key over their own key.

    With more than 4,096 queries, only 4,096 are ranked, spread evenly over the rows.

    Args:
      queries: the embeddings of the queries.
      keys: the embeddings of the keys; key i belongs to query i.
      known: the keys that answer each query.
      count: the maximum number of queries to return.

    Returns:
      The queries, the nearest wrong key of each, and the margins `s_wrong - s_own`, the largest
      first. Queries without a wrong key are left out.
    """
    asked = np.linspace(0, len(queries) - 1, min(_MOST_QUERIES, len(queries))).astype(np.int64)
    wrong = np.zeros(len(asked), np.int64)
    margins = np.full(len(asked), -np.inf)
    tile = max(1, _SCORES_AT_ONCE // len(keys))
    for first in range(0, len(asked), tile):
        part = slice(first, min(first + tile, len(asked)))
        rows, places = asked[part], np.arange(part.stop - first)
        scores = dense_scores(queries[rows], keys).astype(np.float64)
        own = scores[places, rows].copy()
        scores[places, rows] = -np.inf
        for number, others in known.part(rows).others(slice(None), rows).items():
            scores[number, others] = -np.inf
        wrong[part] = scores.argmax(1)
        margins[part] = scores.max(1) - own
    order = best_rows(margins, count)
    order = order[np.isfinite(margins[order])]
    return asked[order], wrong[order], margins[order]


def _others(known: KnownPositives, row: int) -> set[int]:
    others = known.others(slice(row, row + 1), np.array([row]))
    return set(others[0].tolist()) if others else set()


class _Values(NamedTuple):
    """The images and texts of one side of some rows.

    Attributes:
      images: one per row; `None` for a side without images.
      captions: a text per row.
    """

    images: UInt8[np.ndarray, "b h w 3"] | None
    captions: Sequence[str]

    @classmethod
    def of(
        cls, data: RunData, settings: Settings, split: str, side: str, rows: Int[np.ndarray, " b"]
    ) -> "_Values":
        """Read the rows of a split."""
        records = data.sources[split].read(rows)
        image = getattr(settings.data.modality, side) == "image"
        images = data.tables[split].side(side, rows)["image"] if image else None
        pairs = zip(rows.tolist(), records, strict=True)
        return cls(images, [_caption(record, side, row) for row, record in pairs])

    def cells(self, scores: Float[np.ndarray, " b"] | None = None) -> list[Cell]:
        """A cell per row, with the score before the caption."""
        heads = [""] * len(self.captions) if scores is None else [f"{one:.3f} " for one in scores]
        images = [None] * len(self.captions) if self.images is None else list(self.images)
        parts = zip(heads, self.captions, images, strict=True)
        return [Cell(head + caption, image) for head, caption, image in parts]


def _caption(record: Mapping[str, Any], side: str, row: int) -> str:
    """The text of a side; without one, the text of the other side; without both, the row number."""
    for name in (side, *SIDES):
        if isinstance(record.get(name), str):
            return record[name]
    return f"row {row}"
