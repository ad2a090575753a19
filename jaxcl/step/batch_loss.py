"""The loss of a global batch: encode, gather what stands against whom, lose."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxcl.grad_cache import chunked
from jaxcl.losses.negative_metrics import NegativeMetrics
from jaxcl.models.towers import Encode
from jaxcl.negatives.draws import priorities
from jaxcl.negatives.memory_bank import MemoryBank, mean_age
from jaxcl.negatives.tiers import DrawSource, TierBudgets, draw_tiers
from jaxcl.ops.row_tables import read_rows, write_rows
from jaxcl.step.parameter_sharding import FSDP
from jaxcl.typing import SIDES, Array, Batch, Embeddings, Int, Key, PyTree, RowKeys, Scalar

__all__ = ["BeyondBatch", "LossOfBatch", "MeasureOfBatch", "make_loss", "make_measure"]

LossOfBatch: TypeAlias = Callable[
    [PyTree, PyTree, Batch, Key[Array, ""] | None], tuple[Scalar, PyTree]
]
"""`(params, memory, batch, key) -> (nats, memory)`."""

MeasureOfBatch: TypeAlias = Callable[
    [PyTree, PyTree, Batch, Key[Array, ""] | None], Mapping[str, Scalar]
]
"""`(params, memory, batch, key) -> metrics`."""

_DRAWS = 1_000  # what the key of a step is folded with for draws, apart from the sides' numbers


class BeyondBatch(NamedTuple):
    """Which negatives a loss takes beside its batch's, and who judges them.

    Attributes:
      budgets: of the tiers.
      update_banks: side -> `(bank, vectors, rows, ids, groups, guides) -> bank`, for each side
        whose embeddings are kept in `memory["bank"]`; the tiers draw from that of the keys.
      guide: who judges similarity: `"momentum"`, the momentum encoder, `"data"`,
        `batch["guides"]`, or `None` for the model itself.
      margins: `margin` or `relative_margin` of the loss, which the draws heed, too.
    """

    budgets: TierBudgets = TierBudgets()
    update_banks: Mapping[str, Callable[..., MemoryBank]] = {}
    guide: str | None = None
    margins: Mapping[str, Any] = {}


def make_loss(
    encode: Encode,
    loss_fn: Callable[..., Any],
    mesh: Mesh,
    *,
    masks: Mapping[str, str],
    chunk_sizes: Mapping[str, int] | None = None,
    remembers: bool = False,
    beyond: BeyondBatch | None = None,
    needs: Sequence[str] = (),
) -> LossOfBatch:
    """The mean loss of a global batch as a function of the parameters.

    The encoders run under the compiler's own partitioning of the batch; the loss is a `shard_map`,
    since it says itself what crosses devices. Differentiate the result as it is: its gradient is
    that of the mean over the global batch, on any mesh.

    A batch may hold explicit negatives of each row, `batch["negatives"]`: `"inputs"`, a tree like
    that of the keys with `[b, n, …]`, `"valid"`, and a column for each of the masks. They are
    encoded as keys and handed to the loss, and so are `batch["teacher_scores"]`.

    `memory` holds what outlives a batch: `"rows"`, tables with an entry for each training row;
    `"bank"`, side -> embeddings of earlier batches; `"momentum"`, the parameters of a momentum
    encoder, which then writes the banks; `"strata"`, the quotas of a stratified draw.

    Args:
      encode: the towers' function.
      loss_fn: of `jaxcl.losses`, its options bound.
      mesh: where it runs; rows are sharded over all of its axes.
      masks: arguments of the loss that mask false negatives -> columns of the batch they take.
      chunk_sizes: side -> how many of a device's rows are encoded at a time (`jaxcl.grad_cache`);
        `None` for all at once.
      remembers: the loss takes `memory`, these rows' entries of the tables in `memory["rows"]`, and
        returns `(loss, memory)`.
      beyond: which negatives it takes beside the batch's.
      needs: what a batch must hold besides, such as `"teacher_scores"`; without it a `ValueError`.

    Returns:
      `(params, memory, batch, key) -> (nats, memory)`. `key=None` is the evaluation mode; otherwise
      each row draws from the key folded with its side and its row number.
    """
    how = _Arrangement(encode, mesh, masks, chunk_sizes, beyond or BeyondBatch(), tuple(needs))

    def local(given: _Arguments) -> tuple[Array, PyTree]:
        keywords = how.keywords(given)
        if remembers:
            return loss_fn(*given.sides, memory=given.entries, **keywords)
        return loss_fn(*given.sides, **keywords), given.entries

    sharded = how.sharded(local)

    def loss(
        params: PyTree, memory: PyTree, batch: Batch, key: Key[Array, ""] | None
    ) -> tuple[Scalar, PyTree]:
        given, remembered = how.arguments(params, memory, batch, key)
        found, entries = sharded(given)
        after = dict(memory)
        if remembers:
            after["rows"] = write_rows(memory["rows"], batch["row"], entries)
        if how.beyond.update_banks:
            after["bank"] = how.updated_banks(memory["bank"], remembered, batch)
        return found.mean(), after

    return loss


def make_measure(
    encode: Encode,
    measure_fn: Callable[..., Mapping[str, NegativeMetrics]],
    mesh: Mesh,
    *,
    masks: Mapping[str, str],
    chunk_sizes: Mapping[str, int] | None = None,
    beyond: BeyondBatch | None = None,
    needs: Sequence[str] = (),
) -> MeasureOfBatch:
    """What the negatives of a global batch are, as the loss of the same arguments meets them.

    Arguments as for `make_loss`, but for `measure_fn`: `jaxcl.losses.measure_negatives`, its
    options bound.

    Returns:
      `(params, memory, batch, key) -> metrics`: `"negatives/KIND/…"`, the batch's mean of each of
      `NegativeMetrics`; `"bank/SIDE/age"`, in updates, and `"bank/SIDE/written"`, in slots.
    """
    how = _Arrangement(encode, mesh, masks, chunk_sizes, beyond or BeyondBatch(), tuple(needs))

    def local(given: _Arguments) -> Mapping[str, NegativeMetrics]:
        keywords = how.keywords(given)
        no_part = ("teacher_scores", "bias")  # of what the negatives are
        return measure_fn(
            *given.sides, **{name: keywords[name] for name in keywords if name not in no_part}
        )

    sharded = how.sharded(local)

    def measure(
        params: PyTree, memory: PyTree, batch: Batch, key: Key[Array, ""] | None
    ) -> Mapping[str, Scalar]:
        given, _ = how.arguments(params, memory, batch, key)
        found = {
            f"negatives/{kind}/{field}": value.mean()
            for kind, metrics in sharded(given).items()
            for field, value in metrics._asdict().items()
        }
        for side, bank in memory.get("bank", {}).items():
            found[f"bank/{side}/age"] = mean_age(bank)
            found[f"bank/{side}/written"] = (bank.written >= 0).sum().astype(jnp.float32)
        return found

    return measure


class _Arguments(NamedTuple):
    """What goes into the `shard_map`: of the batch by row, of the bank by slot, the rest whole."""

    sides: tuple[Embeddings, ...]
    columns: dict[str, PyTree]
    scalars: dict[str, Scalar]
    entries: PyTree
    row_keys: RowKeys
    source: DrawSource | None


class _Arrangement(NamedTuple):
    """How a batch becomes the arguments of its loss: as given to `make_loss`."""

    encode: Encode
    mesh: Mesh
    masks: Mapping[str, str]
    chunk_sizes: Mapping[str, int] | None
    beyond: BeyondBatch
    needs: tuple[str, ...]

    def sharded(self, local: Callable[[_Arguments], PyTree]) -> Callable[[_Arguments], PyTree]:
        """A function of each device's part, as one of the whole; its results go by row."""
        axes = self.mesh.axis_names
        rows: Any = PartitionSpec(axes)
        whole: Any = PartitionSpec()
        slots = MemoryBank(rows, rows, rows, rows, whole, whole, rows)
        source = DrawSource(slots, rows, rows, whole)
        parts: Any = _Arguments(rows, rows, whole, rows, rows, source)

        def checked(given: _Arguments) -> PyTree:
            # A spec for what is not there would be one too many.
            there = parts._replace(source=None if given.source is None else source)
            return jax.shard_map(local, mesh=self.mesh, in_specs=(there,), out_specs=rows)(given)

        return checked

    def keywords(self, given: _Arguments) -> dict[str, Any]:
        """The arguments of a loss beside its two sides, inside of the `shard_map`."""
        axes = self.mesh.axis_names
        found = {"axis_name": axes, **given.columns, **given.scalars}
        if self.beyond.budgets.any_tier:
            found["tiers"] = draw_tiers(
                self.beyond.budgets,
                *given.sides,
                row_keys=given.row_keys,
                ids=given.columns["ids"],
                groups=given.columns.get("groups"),
                guides=given.columns.get("guides"),
                source=given.source,
                axis_name=axes,
                **self.beyond.margins,
            )
        return found

    def arguments(
        self, params: PyTree, memory: PyTree, batch: Batch, key: Key[Array, ""] | None
    ) -> tuple[_Arguments, dict[str, Embeddings]]:
        """What the loss is given, and what the banks will remember of each side."""
        for name in self.needs:
            if name not in batch:
                raise ValueError(f"this loss needs batch[{name!r}], which these data do not have")
        encode = _encoder(self.encode, self.mesh, self.chunk_sizes)
        beyond, row = self.beyond, batch["row"]
        sides = tuple(
            encode(params["towers"], side, batch[side], _row_keys(key, number, row))
            for number, side in enumerate(SIDES)
        )
        remembered = dict(zip(SIDES, sides, strict=True))
        if "momentum" in memory:
            wanted = SIDES if beyond.guide == "momentum" else tuple(beyond.update_banks)
            remembered |= {side: encode(memory["momentum"], side, batch[side]) for side in wanted}
        remembered = lax.stop_gradient(remembered)
        columns = {argument: batch[column] for argument, column in self.masks.items()}
        if "teacher_scores" in batch:
            columns["teacher_scores"] = batch["teacher_scores"]
        if "negatives" in batch:
            columns |= _explicit_columns(batch, encode, params["towers"], self.masks, key)
        columns |= self._guide_columns(encode, memory, batch, remembered)
        scalars = {"temperature": jnp.exp(params["log_temperature"])}
        if "bias" in params:
            scalars["bias"] = params["bias"]
        draw_key = jax.random.fold_in(jax.random.key(0) if key is None else key, _DRAWS)
        given = _Arguments(
            sides=sides,
            columns=columns,
            scalars=scalars,
            entries=read_rows(memory.get("rows", {}), row),
            row_keys=_folded(draw_key, row),
            source=self._draw_source(memory, draw_key),
        )
        return given, remembered

    def _draw_source(self, memory: PyTree, key: Key[Array, ""]) -> DrawSource | None:
        if not self.beyond.update_banks:
            return None
        bank, budgets = memory["bank"]["key"], self.beyond.budgets
        if self.beyond.guide == "momentum":
            bank = bank._replace(guides=bank.vectors)  # which that encoder wrote
        uniform, stratified = (
            priorities(jax.random.fold_in(key, number), bank.ids.shape[0]) if count else None
            for number, count in enumerate((budgets.uniform, budgets.stratified))
        )
        return DrawSource(bank, uniform, stratified, memory.get("strata"))

    def updated_banks(
        self, banks: Mapping[str, MemoryBank], remembered: Mapping[str, Embeddings], batch: Batch
    ) -> dict[str, MemoryBank]:
        """The banks with the embeddings of a batch."""
        guides = batch["guides"] if self.beyond.guide == "data" else {}
        ids = batch[self.masks["ids"]]
        return {
            side: update(
                banks[side], remembered[side], batch["row"], ids, batch["group"], guides.get(side)
            )
            for side, update in self.beyond.update_banks.items()
        }

    def _guide_columns(
        self, encode: Encode, memory: PyTree, batch: Batch, remembered: Mapping[str, Embeddings]
    ) -> dict[str, PyTree]:
        """The embeddings by which similarity is judged, where the model's own are not."""
        if self.beyond.guide is None:
            return {}
        if self.beyond.guide == "momentum":
            found: dict[str, PyTree] = {"guides": tuple(remembered[side] for side in SIDES)}
            if "negatives" in batch:
                seen = _explicit_columns(batch, encode, memory["momentum"], self.masks, None)
                found["negative_guides"] = lax.stop_gradient(seen["negatives"])
            return found
        found = {"guides": tuple(batch["guides"][side] for side in SIDES)}
        if "negatives" in batch:
            found["negative_guides"] = batch["negatives"]["guides"]
        return found


def _encoder(encode: Encode, mesh: Mesh, chunk_sizes: Mapping[str, int] | None) -> Encode:
    """The same, in chunks if it has chunk sizes; it knows of a mesh that has parameters cut."""
    if FSDP in mesh.axis_names:
        encode = _knowing(encode, mesh)
    if chunk_sizes is None:
        return encode
    # Each device goes through its own rows, so that chunks keep their sharding, and gradients are
    # summed over devices once. Only sharded parameters are the compiler's business: it puts each
    # together where a chunk needs it, since all of them at once might not fit.
    manual = tuple(axis for axis in mesh.axis_names if axis != FSDP)
    shards = dict(mesh.shape).get(FSDP, 1)
    rows, whole = PartitionSpec(manual), PartitionSpec()

    def encode_rows(
        params: PyTree, side: str, inputs: PyTree, rngs: RowKeys | None = None
    ) -> Embeddings:
        in_chunks = chunked(
            lambda params, inputs, rngs: encode(params, side, inputs, rngs),
            chunk_size=chunk_sizes[side],
            shards=shards,
        )
        if manual:
            in_chunks = jax.shard_map(
                in_chunks,
                mesh=mesh,
                in_specs=(whole, rows, rows),
                out_specs=rows,
                axis_names=set(manual),
            )
        return in_chunks(params, inputs, rngs)

    return encode_rows


def _knowing(encode: Encode, mesh: Mesh) -> Encode:
    """The same, where the models can ask for the mesh."""

    def encode_rows(
        params: PyTree, side: str, inputs: PyTree, rngs: RowKeys | None = None
    ) -> Embeddings:
        if not jax.sharding.get_abstract_mesh().empty:  # within a `shard_map`
            return encode(params, side, inputs, rngs)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return encode(params, side, inputs, rngs)

    return encode_rows


def _explicit_columns(
    batch: Batch,
    encode: Encode,
    towers: PyTree,
    masks: Mapping[str, str],
    key: Key[Array, ""] | None,
) -> dict[str, Array]:
    """What a loss takes of the explicit negatives of a batch, encoded as keys."""
    explicit = batch["negatives"]
    rows, slots = explicit["valid"].shape
    inputs = jax.tree.map(
        lambda leaf: leaf.reshape(rows * slots, *leaf.shape[2:]), explicit["inputs"]
    )
    keys = _slot_keys(_row_keys(key, len(SIDES), batch["row"]), slots)
    return {
        "negatives": encode(towers, "key", inputs, keys).reshape(rows, slots, -1),
        "negatives_valid": explicit["valid"],
        **{f"negative_{name}": explicit[column] for name, column in masks.items()},
    }


def _row_keys(key: Key[Array, ""] | None, number: int, row: Int[Array, " b"]) -> RowKeys | None:
    """A key for each row of what the batch holds under a number: queries, keys, negatives."""
    if key is None:
        return None
    return _folded(jax.random.fold_in(key, number), row)


def _folded(key: Key[Array, ""], row: Int[Array, " b"]) -> RowKeys:
    return jax.vmap(jax.random.fold_in, (None, 0))(key, row)


def _slot_keys(keys: RowKeys | None, slots: int) -> Key[Array, " _"] | None:
    """A key for each of the slots of each row, row by row."""
    if keys is None:
        return None
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    return fold(keys, jnp.arange(slots)).reshape(-1)
