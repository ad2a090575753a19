"""The loss of a global batch: encode it, draw its negatives, and compare them."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxcl.losses import Loss, Masks
from jaxcl.losses.negative_metrics import NegativeMetrics
from jaxcl.models.towers import Towers
from jaxcl.negatives.draws import priorities
from jaxcl.negatives.memory_bank import MemoryBank, mean_age, pad_slots
from jaxcl.negatives.sets import ExplicitNegatives, Negatives
from jaxcl.negatives.tiers import DrawSource, TierBudgets, draw_tiers
from jaxcl.ops.row_tables import read_rows, write_rows
from jaxcl.step.encode_rows import (
    EncodeRows,
    fold_rows,
    keys_of_side,
    keys_of_slots,
    make_encode_rows,
)
from jaxcl.step.length_buckets import Buckets
from jaxcl.typing import SIDES, Array, Batch, Embeddings, Key, PyTree, RowKeys, Scalar

__all__ = ["BeyondBatch", "LossOfBatch", "MeasureOfBatch", "make_loss", "make_measure"]

LossOfBatch: TypeAlias = Callable[
    [PyTree, PyTree, Batch, Key[Array, ""] | None], tuple[Scalar, PyTree]
]
"""`(params, memory, batch, key) -> (nats, memory)`."""

MeasureOfBatch: TypeAlias = Callable[
    [PyTree, PyTree, Batch, Key[Array, ""] | None], Mapping[str, Scalar]
]
"""`(params, memory, batch, key) -> metrics`."""

_DRAWS = 1_000  # folded into a step's key for random draws; larger than the sides' numbers


class BeyondBatch(NamedTuple):
    """The negatives that a loss takes from outside the batch, and the guide model.

    Attributes:
      budgets: the tiers' budgets.
      update_banks: side -> `(bank, vectors, rows, ids, groups, guides) -> bank`, for each side
        whose embeddings are kept in `memory["bank"]`; the tiers draw from the keys' bank.
      guide: the guide model: `"momentum"`, the momentum encoder; `"data"`, `batch["guides"]`;
        `None`, the model itself.
      margins: `margin` or `relative_margin`, which mask negatives in the loss and in the draws.
    """

    budgets: TierBudgets = TierBudgets()
    update_banks: Mapping[str, Callable[..., MemoryBank]] = {}
    guide: str | None = None
    margins: Mapping[str, Any] = {}


def make_loss(
    towers: Towers,
    loss: Loss,
    mesh: Mesh,
    *,
    masks: Mapping[str, str],
    chunk_sizes: Mapping[str, int] | None = None,
    buckets: Mapping[str, Buckets] | None = None,
    beyond: BeyondBatch | None = None,
    needs: Sequence[str] = (),
) -> LossOfBatch:
    """The mean loss of a global batch as a function of the parameters.

    The compiler partitions the encoders over the batch. The loss runs in a `shard_map`, since it
    communicates between devices explicitly. Differentiate the returned function directly: its
    gradient is that of the mean over the global batch, on any mesh.

    A batch may hold explicit negatives of each row, `batch["negatives"]`: `"inputs"`, a tree like
    the keys' inputs with arrays `[b, n, …]`, `"valid"`, and a column for each mask. Explicit
    negatives are encoded as keys.

    `memory` holds the state that persists between batches: `"rows"`, tables with an entry for each
    training row; `"bank"`, side -> embeddings of earlier batches; `"momentum"`, the parameters of a
    momentum encoder, which then writes the banks; `"strata"`, the quotas of a stratified draw.

    Args:
      towers: the model.
      loss: a loss of `jaxcl.losses.LOSSES`, or a custom loss, with its options bound.
      mesh: the devices; rows are sharded over all axes.
      masks: the fields `"ids"` and `"groups"` of `jaxcl.losses.Masks` -> the columns of the batch
        that fill them.
      chunk_sizes: side -> the number of rows that a device encodes at a time (`jaxcl.grad_cache`);
        `None` encodes all rows together.
      buckets: side -> the widths of chunks of similar length (`jaxcl.step.length_buckets`), instead
        of `chunk_sizes`.
      beyond: the negatives from outside the batch.
      needs: further columns that a batch must have, such as `"teacher_scores"`.

    Returns:
      `(params, memory, batch, key) -> (nats, memory)`. `key=None` is the evaluation mode; otherwise
      the randomness of each row comes from the key folded with its side and its row number. The
      function raises a `ValueError` for a batch without a column that is needed.
    """
    arrangement = _Arrangement(
        towers, loss, mesh, masks, chunk_sizes, buckets, beyond or BeyondBatch(), tuple(needs)
    )
    remembers = loss.init_memory is not None

    def local(arguments: _Arguments) -> tuple[Array, PyTree]:
        keywords = arrangement.keywords(arguments)
        if remembers:
            return loss.function(*arguments.sides, memory=arguments.entries, **keywords)
        return loss.function(*arguments.sides, **keywords), arguments.entries

    sharded = arrangement.sharded(local)

    def mean_loss(
        params: PyTree, memory: PyTree, batch: Batch, key: Key[Array, ""] | None
    ) -> tuple[Scalar, PyTree]:
        arguments, remembered = arrangement.arguments(params, memory, batch, key)
        losses, entries = sharded(arguments)
        after = dict(memory)
        if remembers:
            after["rows"] = write_rows(memory["rows"], batch["row"], entries)
        if arrangement.beyond.update_banks:
            after["bank"] = arrangement.updated_banks(memory["bank"], remembered, batch)
        return losses.mean(), after

    return mean_loss


def make_measure(
    towers: Towers,
    loss: Loss,
    mesh: Mesh,
    *,
    measure_fn: Callable[..., Mapping[str, NegativeMetrics]],
    masks: Mapping[str, str],
    chunk_sizes: Mapping[str, int] | None = None,
    buckets: Mapping[str, Buckets] | None = None,
    beyond: BeyondBatch | None = None,
    needs: Sequence[str] = (),
) -> MeasureOfBatch:
    """The metrics of a global batch's negatives, for a loss made with the same arguments.

    Arguments as for `make_loss`, except `measure_fn`: `jaxcl.losses.measure_negatives` with its
    options bound.

    Returns:
      `(params, memory, batch, key) -> metrics`: `"negatives/KIND/…"`, the batch's mean of each of
      `NegativeMetrics`; `"bank/SIDE/age"`, in updates, and `"bank/SIDE/written"`, in slots.
    """
    arrangement = _Arrangement(
        towers, loss, mesh, masks, chunk_sizes, buckets, beyond or BeyondBatch(), tuple(needs)
    )

    def local(arguments: _Arguments) -> Mapping[str, NegativeMetrics]:
        masks = arrangement.masks_of(arguments)
        if "labels" in arguments.columns:  # rows of one class are positives
            masks = masks._replace(groups=arguments.columns["labels"])
        return measure_fn(
            *arguments.sides,
            temperature=arguments.scalars["temperature"],
            masks=masks,
            negatives=arrangement.negatives_of(arguments),
            axis_name=mesh.axis_names,
        )

    sharded = arrangement.sharded(local)

    def measure(
        params: PyTree, memory: PyTree, batch: Batch, key: Key[Array, ""] | None
    ) -> Mapping[str, Scalar]:
        arguments, _ = arrangement.arguments(params, memory, batch, key)
        results = {
            f"negatives/{kind}/{field}": value.mean()
            for kind, metrics in sharded(arguments).items()
            for field, value in metrics._asdict().items()
        }
        for side, bank in memory.get("bank", {}).items():
            results[f"bank/{side}/age"] = mean_age(bank)
            results[f"bank/{side}/written"] = (bank.written >= 0).sum().astype(jnp.float32)
        return results

    return measure


class _Arguments(NamedTuple):
    """The arguments of the `shard_map`: rows and bank slots are sharded, scalars replicated."""

    sides: tuple[Embeddings, ...]
    labels: dict[str, PyTree]  # fields of `Masks`
    explicit: ExplicitNegatives | None
    columns: dict[str, PyTree]
    scalars: dict[str, Scalar]
    entries: PyTree
    row_keys: RowKeys
    source: DrawSource | None


class _Arrangement(NamedTuple):
    """The arguments of `make_loss` that turn a batch into the arguments of its loss."""

    towers: Towers
    loss: Loss
    mesh: Mesh
    masks: Mapping[str, str]
    chunk_sizes: Mapping[str, int] | None
    buckets: Mapping[str, Buckets] | None
    beyond: BeyondBatch
    needs: tuple[str, ...]

    def sharded(self, local: Callable[[_Arguments], PyTree]) -> Callable[[_Arguments], PyTree]:
        """Wrap a function of each device's part in a `shard_map`; its results are per row."""
        rows: Any = PartitionSpec(self.mesh.axis_names)
        replicated: Any = PartitionSpec()
        slots = MemoryBank(rows, rows, rows, rows, replicated, replicated, rows)
        source = DrawSource(slots, rows, rows, replicated)
        parts: Any = _Arguments(rows, rows, rows, rows, replicated, rows, rows, source)

        def checked(inputs: _Arguments) -> PyTree:
            # Without a bank there is no source, so its specs would not match the arguments.
            specs = parts._replace(source=None if inputs.source is None else source)
            return jax.shard_map(local, mesh=self.mesh, in_specs=(specs,), out_specs=rows)(inputs)

        return checked

    def keywords(self, arguments: _Arguments) -> dict[str, Any]:
        """The arguments of the loss in addition to its two sides, inside the `shard_map`."""
        keywords = {**arguments.columns, **arguments.scalars}
        if not self.loss.has_temperature:
            del keywords["temperature"]
        if self.loss.exchanges:
            keywords["axis_name"] = self.mesh.axis_names
        if self.loss.masks:
            keywords["masks"] = self.masks_of(arguments)
        if self.loss.negatives:
            keywords["negatives"] = self.negatives_of(arguments)
        return keywords

    def masks_of(self, arguments: _Arguments) -> Masks:
        """The masks that the loss supports."""
        fields = {**arguments.labels, **self.beyond.margins}
        return Masks(**{name: one for name, one in fields.items() if name in self.loss.masks})

    def negatives_of(self, arguments: _Arguments) -> dict[str, Negatives] | None:
        """The negatives from outside the batch, by name."""
        negatives: dict[str, Negatives] = {}
        if arguments.explicit is not None:
            negatives["explicit"] = arguments.explicit
        if self.beyond.budgets.any_tier:
            negatives |= draw_tiers(
                self.beyond.budgets,
                *arguments.sides,
                row_keys=arguments.row_keys,
                ids=arguments.labels["ids"],
                groups=arguments.labels.get("groups", arguments.columns.get("labels")),
                guides=arguments.labels.get("guides"),
                source=arguments.source,
                axis_name=self.mesh.axis_names,
                **self.beyond.margins,
            )
        return negatives or None

    def arguments(
        self, params: PyTree, memory: PyTree, batch: Batch, key: Key[Array, ""] | None
    ) -> tuple[_Arguments, dict[str, Embeddings]]:
        """The arguments of the loss, and each side's embeddings for the banks."""
        for name in (*self.needs, *self.loss.columns.values()):
            if name not in batch:
                raise ValueError(f"this loss needs batch[{name!r}], which these data do not have")
        encode = make_encode_rows(self.towers, self.mesh, self.chunk_sizes, self.buckets)
        beyond, row = self.beyond, batch["row"]
        row_keys = {side: keys_of_side(key, number, row) for number, side in enumerate(SIDES)}
        sides = tuple(encode(params["towers"], side, batch[side], row_keys[side]) for side in SIDES)
        remembered = dict(zip(SIDES, sides, strict=True))
        if "momentum" in memory:
            wanted = SIDES if beyond.guide == "momentum" else tuple(beyond.update_banks)
            remembered |= {
                side: encode(memory["momentum"], side, batch[side], row_keys[side], dropout=False)
                for side in wanted
            }
        remembered = lax.stop_gradient(remembered)
        scalars = {"temperature": jnp.exp(params["log_temperature"])}
        if "bias" in params:
            scalars["bias"] = params["bias"]
        draw_key = jax.random.fold_in(jax.random.key(0) if key is None else key, _DRAWS)
        arguments = _Arguments(
            sides=sides,
            labels=self._labels(batch, remembered),
            explicit=self._explicit(params["towers"], memory, batch, encode, key),
            columns={name: batch[column] for name, column in self.loss.columns.items()},
            scalars=scalars,
            entries=read_rows(memory.get("rows", {}), row),
            row_keys=fold_rows(draw_key, row),
            source=self._draw_source(memory, draw_key),
        )
        return arguments, remembered

    def _labels(self, batch: Batch, remembered: Mapping[str, Embeddings]) -> dict[str, PyTree]:
        """The labels of the batch's rows, and the guide embeddings if there is a guide model."""
        labels: dict[str, PyTree] = {name: batch[column] for name, column in self.masks.items()}
        if self.beyond.guide is not None:
            guides = remembered if self.beyond.guide == "momentum" else batch["guides"]
            labels["guides"] = tuple(guides[side] for side in SIDES)
        return labels

    def _explicit(
        self,
        towers: PyTree,
        memory: PyTree,
        batch: Batch,
        encode: EncodeRows,
        key: Key[Array, ""] | None,
    ) -> ExplicitNegatives | None:
        """The explicit negatives of a batch, encoded as keys."""
        if "negatives" not in batch or ExplicitNegatives not in self.loss.negatives:
            return None
        explicit = batch["negatives"]
        rows, slots = explicit["valid"].shape
        inputs = jax.tree.map(
            lambda leaf: leaf.reshape(rows * slots, *leaf.shape[2:]), explicit["inputs"]
        )
        keys = keys_of_slots(keys_of_side(key, len(SIDES), batch["row"]), slots)
        encoded = functools.partial(encode, side="key", inputs=inputs, rngs=keys)
        guides = None
        if self.beyond.guide == "momentum":
            seen = encoded(memory["momentum"], dropout=False)
            guides = lax.stop_gradient(seen.reshape(rows, slots, -1))
        elif self.beyond.guide == "data":
            guides = explicit["guides"]
        heeded = {name: column for name, column in self.masks.items() if name in self.loss.masks}
        labels = {name: explicit[column] for name, column in heeded.items()}
        if "labels" in self.loss.columns:
            labels["groups"] = explicit[self.loss.columns["labels"]]
        return ExplicitNegatives(
            encoded(towers).reshape(rows, slots, -1),
            **labels,
            valid=explicit["valid"],
            guides=guides,
        )

    def _draw_source(self, memory: PyTree, key: Key[Array, ""]) -> DrawSource | None:
        if not self.beyond.update_banks:
            return None
        bank, budgets = memory["bank"]["key"], self.beyond.budgets
        if self.beyond.guide == "momentum":
            bank = bank._replace(guides=bank.vectors)  # written by the momentum encoder
        slots = bank.ids.shape[0]
        bank = pad_slots(bank, multiple=self.mesh.size)
        missing = bank.ids.shape[0] - slots
        uniform, stratified = (
            jnp.pad(priorities(jax.random.fold_in(key, number), slots), (0, missing))
            if count
            else None
            for number, count in enumerate((budgets.uniform, budgets.stratified))
        )
        return DrawSource(bank, uniform, stratified, memory.get("strata"))

    def updated_banks(
        self, banks: Mapping[str, MemoryBank], remembered: Mapping[str, Embeddings], batch: Batch
    ) -> dict[str, MemoryBank]:
        """The banks, updated with the embeddings of a batch."""
        guides = batch["guides"] if self.beyond.guide == "data" else {}
        ids = batch[self.masks["ids"]]
        return {
            side: update(
                banks[side], remembered[side], batch["row"], ids, batch["group"], guides.get(side)
            )
            for side, update in self.beyond.update_banks.items()
        }
