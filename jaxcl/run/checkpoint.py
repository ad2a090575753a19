"""Saves and restores the one train state through Orbax, and knows a damaged checkpoint.

Orbax commits atomically, but it loads flipped bits without a word and never falls back by itself.
So each checkpoint carries a checksum of every array, taken on the devices before the save and
again after the load. A checksum does not depend on how its array is sharded, so that a run may
move to another mesh. A list of the checkpoints' files and sizes lies next to their folder: a file
that is missing or cut is found before anything is loaded. Otherwise the processes that can read
their parts would wait five minutes for one that cannot.

Each checkpoint also carries a record of its run and its step (`saved_record`), so that a checkpoint
of another run, or a folder that was renamed to another step, is never restored.
"""

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging as absl_logging
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from jaxcl.host.files import is_remote, write_whole
from jaxcl.host.paths import AnyPath
from jaxcl.host.processes import (
    PeerError,
    first_of_all,
    first_then_others,
    of_full_devices,
    of_lost_process,
    together,
)
from jaxcl.host.remote import file_sizes, move_tree, remove_tree
from jaxcl.run.best import best_step, best_step_in
from jaxcl.run.checkpoint_record import (
    RECORD,
    CheckpointError,
    check_none_lost,
    known_sizes,
    saved_record,
    sealed,
    sizes_file,
)
from jaxcl.run.preservation import Preservation
from jaxcl.typing import Array, Integer, PyTree

__all__ = ["Checkpoints", "Restored", "checksum"]

_REGISTRY = ocp.handlers.local_registry(include_global_registry=True)
_REGISTRY.add(ocp.handlers.JsonHandler, checkpointable_name=RECORD)


class Restored(NamedTuple):
    """A state read back, the step it was saved at, its record, and the damaged steps after it."""

    state: PyTree
    step: int
    record: Mapping[str, Any]
    damaged_steps: tuple[int, ...]


class Checkpoints:
    """The checkpoints of one run, a folder per step; on a clean exit all of them are written.

    Args:
      directory: where they are.
      keep: how many of the newest stay; at least 2, or there is nothing to fall back to. The step
        that the record of one of these names as the best (`jaxcl.run.best`) stays as well.
      read_only: never makes, moves or removes anything, for programs that only look.

    Raises:
      CheckpointError: if the directory cannot be made or written.
      ValueError: if `keep` is below 2.
    """

    def __init__(self, directory: AnyPath, *, keep: int = 2, read_only: bool = False):
        if keep < 2:
            raise ValueError(f"keep={keep} leaves nothing to fall back to; keep at least 2")
        self.directory = directory if is_remote(directory) else directory.absolute()
        self._sizes = sizes_file(self.directory)
        self._read_only = read_only
        self._saving: tuple[int, Any] | None = None
        self._kept = Preservation(keep)
        for logger in ("absl", "asyncio"):
            logging.getLogger(logger).addFilter(_drop_orbax_records)
        with _explained(f"cannot use {self.directory} for checkpoints"):
            if not read_only:
                first_then_others(lambda: self.directory.mkdir(parents=True, exist_ok=True))
                self._kept.read(self.directory)
            self._checkpointer = ocp.training.Checkpointer(
                self.directory,
                preservation_policy=self._kept,
                cleanup_tmp_directories=not read_only,
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            # Closing waits for a save under way, and repeats errors that were reported before.
            with contextlib.suppress(Exception):
                self._checkpointer.close()

    @property
    def steps(self) -> list[int]:
        """Steps that are there, oldest first."""
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def save(self, step: int, state: PyTree, record: Mapping[str, Any] | None = None) -> None:
        """Saves in the background; the state may be donated at once.

        Args:
          step: of the state.
          state: the arrays.
          record: the settings, data and flags of the run, as JSON's types, and its best step so
            far.

        Raises:
          CheckpointError: if the save before this one failed, or this one at its start.
        """
        self.wait()
        self._note_sizes(step, None)  # of an earlier one of that step
        items = {"state": state, "checksums": _checksums(state)}
        items[RECORD] = sealed({**(record or {}), "step": step})
        self._kept.best_of[step] = best_step(record or {})
        context = ocp.Context()
        context.checkpointables.registry = _REGISTRY
        with _explained(f"cannot save step {step} to {self.directory}"), context:
            response = self._checkpointer.save_checkpointables_async(step, items, force=True)
        self._saving = (step, response)

    def wait(self) -> None:
        """Returns when what was saved is on disk.

        Raises:
          CheckpointError: if it could not be written. Earlier checkpoints are untouched.
        """
        if self._saving is None:
            return
        (step, response), self._saving = self._saving, None
        try:
            with _explained(f"cannot save step {step} to {self.directory}"):
                response.result()
        except CheckpointError:
            unfinished = self.directory / f"{step}.orbax-checkpoint-tmp"
            remove_tree(unfinished)  # it holds space that may be wanted
            raise
        self._note_sizes(step, self.directory / str(step))

    def restore_latest(
        self,
        abstract_state: PyTree,
        *,
        partial: bool = False,
        only: int | None = None,
        best: bool = False,
        check: Callable[[Mapping[str, Any]], None] = lambda record: None,
    ) -> Restored | None:
        """The newest state that is whole, or `None` where nothing was ever saved.

        Damaged checkpoints are moved aside, next to the directory, with a warning that says why,
        and the one before is tried.

        Args:
          abstract_state: the state's `jax.ShapeDtypeStruct`s, with the shardings to restore into;
            `...` in place of an array that is not wanted, and that stays so in the result.
          partial: whether `abstract_state` may be a part of the state, as nested dicts; what it
            leaves out is not read.
          only: the step to restore; None for the newest, or the one before if that is damaged.
          best: whether to prefer the best step to the newest.
          check: raises a `ValueError` for a record of another run.

        Raises:
          CheckpointError: if there are checkpoints and none can be read, or if there are none
            although some were saved.
          ValueError: of `check`, or if no best step is known.
        """
        damaged: dict[int, str] = {}
        for step in self._in_order(best=best) if only is None else [only]:
            try:
                together(functools.partial(self._check_sizes, step))
                record = together(functools.partial(saved_record, self.directory / str(step)))
                together(functools.partial(check, record))
                load = functools.partial(self._load, step, abstract_state, partial=partial)
                state = together(load)
            except (CheckpointError, PeerError) as error:
                if self._read_only and self._was_removed(step):
                    self._checkpointer.reload()
                    return self.restore_latest(
                        abstract_state, partial=partial, only=only, best=best, check=check
                    )
                damaged[step] = str(error)
                continue
            self._set_aside(damaged, restored_step=step)
            return Restored(state, step, record, tuple(damaged))
        if damaged:
            listed = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
            raise CheckpointError(
                f"none of the checkpoints in {self.directory} can be read ({listed}); restore "
                "that folder from a copy, or start again with another --workdir"
            )
        together(functools.partial(check_none_lost, self.directory))
        return None

    def _in_order(self, *, best: bool) -> list[int]:
        """The steps in the order in which they are tried."""
        # As process 0 sees them: a shared file system may show the newest late.
        steps = first_of_all(self.steps)[::-1]
        if not best or not steps:
            return steps
        named = first_of_all([step for step in [best_step_in(self.directory)] if step is not None])
        if not named:
            raise ValueError(
                f"no best checkpoint is known in {self.directory}: evaluation.best_metric was not "
                "set, or not evaluated yet; name the workdir, for the newest"
            )
        return named + [step for step in steps if step not in named]

    def _was_removed(self, step: int) -> bool:
        """Whether the run has removed a step for newer ones since the steps were listed."""
        gone = step in self.steps and not (self.directory / str(step)).exists()
        return bool(first_of_all([int(gone)])[0])  # all processes must try again, or none

    def _note_sizes(self, step: int, directory: AnyPath | None) -> None:
        """Lists the files of a step, or forgets them, and those of steps that are gone."""
        if jax.process_index() != 0:
            return
        before = known_sizes(self._sizes)
        noted = {name: before[name] for name in map(str, self.steps) if name in before}
        noted.pop(str(step), None)
        with contextlib.suppress(OSError):  # it is a help, no part of the checkpoint
            if directory is not None:
                noted[str(step)] = file_sizes(directory)
            if noted != before:
                write_whole(self._sizes, json.dumps(noted))

    def _check_sizes(self, step: int) -> None:
        if jax.process_index() != 0:
            return
        sizes = file_sizes(self.directory / str(step))
        for name, size in known_sizes(self._sizes).get(str(step), {}).items():
            if sizes.get(name) != size:
                found = f"has {sizes[name]} bytes of" if name in sizes else "is missing, of"
                raise CheckpointError(f"its file {name} {found} {size}")

    def _load(self, step: int, abstract_state: PyTree, *, partial: bool) -> PyTree:
        abstract_checksums = jax.tree.map(_abstract_checksum, abstract_state)
        abstract_items = {"state": abstract_state, "checksums": abstract_checksums}
        context = ocp.Context()
        context.pytree.loading.partial_load = partial
        with _explained("it does not load"), context:
            items = self._checkpointer.load_checkpointables(step, abstract_items)
        # Without its metadata a random key comes back as bare integers, with the right checksum.
        jax.tree.map(_check_form, abstract_state, items["state"])
        read = jax.tree.map(lambda leaf: None if leaf is ... else leaf, items)
        found, saved = jax.device_get((_checksums(read["state"]), read["checksums"]))
        wrong = [
            jax.tree_util.keystr(path)
            for (path, ours), theirs in zip(
                jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(saved), strict=True
            )
            if ours != theirs
        ]
        if wrong:
            raise CheckpointError(f"checksums differ for {', '.join(wrong)}")
        return items["state"]

    def _set_aside(self, damaged: dict[int, str], *, restored_step: int) -> None:
        for step, reason in damaged.items():
            absl_logging.warning(
                "the checkpoint of step %d is damaged (%s); step %d is restored instead",
                step,
                reason,
                restored_step,
            )
        if damaged and not self._read_only:
            first_then_others(functools.partial(self._move_aside, damaged))
            self._checkpointer.reload()

    def _move_aside(self, steps: Iterable[int]) -> None:
        shelf = self.directory.with_name(f"{self.directory.name}.damaged")
        shelf.mkdir(exist_ok=True)
        for step in steps:
            if (self.directory / str(step)).exists():
                remove_tree(shelf / str(step))
                move_tree(self.directory / str(step), shelf / str(step))


@jax.jit
def checksum(array: Array) -> Integer[Array, ""]:
    r"""Sums the array's words, each mixed with its place: $\sum_i (w_i \oplus m_i)\, o_i$ mod 2³².

    $m_i$ is a hash of $i$ and $o_i$ an odd one, so that a change of any one word always shows, and
    any other change but for one case in 2³². Integer sums do not depend on their order, so neither
    does this on sharding.
    """
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    width = min(array.dtype.itemsize, 4)
    words = lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        place = place * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    mask = _mixed(place)
    return jnp.sum((words ^ mask) * (_mixed(mask) | 1), dtype=jnp.uint32)


def _mixed(words: Integer[Array, "..."]) -> Integer[Array, "..."]:
    """The 32-bit finaliser of MurmurHash3 (Appleby, 2011)."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)


@jax.jit
def _checksums(state: PyTree) -> PyTree:
    return jax.tree.map(checksum, state)


def _check_form(wanted: Any, leaf: Any) -> None:
    if wanted is ...:
        return
    if (leaf.shape, leaf.dtype) != (wanted.shape, wanted.dtype):
        raise CheckpointError(
            f"an array is {leaf.dtype}{list(leaf.shape)}, not {wanted.dtype}{list(wanted.shape)}"
        )


def _abstract_checksum(leaf: Any) -> Any:
    if leaf is ...:
        return ...
    whole = NamedSharding(leaf.sharding.mesh, PartitionSpec())
    return jax.ShapeDtypeStruct((), jnp.uint32, sharding=whole)


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns whatever a storage library raises into one `CheckpointError` that says why.

    Of several processes, what JAX raises is that another one is gone: a `PeerError`. That one
    process's devices are full stays what it is.
    """
    try:
        yield
    except Exception as error:  # Orbax and TensorStore raise every class there is
        errors: list[BaseException] = [error]
        while (cause := errors[-1].__cause__) is not None:  # Orbax buries the reason
            errors.append(cause)
        several = jax.process_count() > 1
        if not several and (full := next(filter(of_full_devices, errors), None)):
            # The checkpoint may be whole. Several processes must all go on to the one before.
            raise full from full.__cause__
        last = errors[-1]
        if any(map(of_lost_process, errors)) or ("Gloo" in str(last) and several):
            raise PeerError(f"{what}: {last}") from last
        reason = " ".join(str(last).split()) or type(last).__name__
        hint = _hint(reason)
        raise CheckpointError(f"{what}: {reason[:400]}{hint}") from last


def _hint(reason: str) -> str:
    lowered = reason.lower()
    if any(sign in lowered for sign in ("no space", "quota", "file too large")):
        return ". Free some space, then run the same command again: it goes on from the last one"
    if "permission denied" in lowered or "read-only" in lowered:
        return ". Make it writable, or choose another --workdir"
    return ""


def _drop_orbax_records(record: logging.LogRecord) -> bool:
    # Orbax logs a page of traceback per background thread for what is raised here in one line.
    return "orbax" not in record.pathname
