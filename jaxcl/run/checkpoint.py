"""Save and restore the train state with Orbax, and detect damaged checkpoints.

Orbax commits atomically, but it loads flipped bits without an error and never falls back to an
earlier checkpoint. Therefore each checkpoint has a checksum of every array, computed on the devices
before saving and compared after loading. A checksum does not depend on the sharding of its array,
so that a run may move to another mesh. A file next to the folder of checkpoints lists the sizes of
their files, so that a missing or truncated file is detected before anything is loaded. Otherwise,
processes that can read their parts would wait five minutes for a process that cannot.

Each checkpoint also has a record of its run and step (`saved_record`), so that a checkpoint of
another run, or a folder that was renamed to another step, is never restored.
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
    """A restored state, its step, its record, and the damaged steps after it."""

    state: PyTree
    step: int
    record: Mapping[str, Any]
    damaged_steps: tuple[int, ...]


class Checkpoints:
    """The checkpoints of a run, one folder per step.

    Leaving the context without an error waits until all saves are finished.

    Args:
      directory: folder of the checkpoints.
      keep: number of newest checkpoints to keep; at least 2, so that a run can fall back. The best
        steps that their records name (`jaxcl.run.best`) are kept as well.
      read_only: whether to never create, move or remove anything, for programs that only read.

    Raises:
      CheckpointError: if the folder cannot be created or written.
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
            # Closing waits for an unfinished save, and raises errors again that were reported.
            with contextlib.suppress(Exception):
                self._checkpointer.close()

    @property
    def steps(self) -> list[int]:
        """The steps that have checkpoints, oldest first."""
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def save(self, step: int, state: PyTree, record: Mapping[str, Any] | None = None) -> None:
        """Save in the background; the state may be donated immediately.

        Args:
          step: the step of the state.
          state: the arrays.
          record: the settings, data and flags of the run, in JSON types, and its best step so far.

        Raises:
          CheckpointError: if the previous save failed, or this save cannot start.
        """
        self.wait()
        self._note_sizes(step, None)  # forgets an earlier checkpoint of this step
        items = {"state": state, "checksums": _checksums(state)}
        items[RECORD] = sealed({**(record or {}), "step": step})
        self._kept.best_of[step] = best_step(record or {})
        context = ocp.Context()
        context.checkpointables.registry = _REGISTRY
        with _explained(f"cannot save step {step} to {self.directory}"), context:
            response = self._checkpointer.save_checkpointables_async(step, items, force=True)
        self._saving = (step, response)

    def wait(self) -> None:
        """Wait until the last save is on disk.

        Raises:
          CheckpointError: if the save failed. Earlier checkpoints are not affected.
        """
        if self._saving is None:
            return
        (step, response), self._saving = self._saving, None
        try:
            with _explained(f"cannot save step {step} to {self.directory}"):
                response.result()
        except CheckpointError:
            unfinished = self.directory / f"{step}.orbax-checkpoint-tmp"
            remove_tree(unfinished)  # to free its space
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
        """Restore the newest undamaged checkpoint; return `None` if nothing was ever saved.

        If a checkpoint is damaged, it is moved to a folder next to this one, with a warning that
        gives the reason, and the previous checkpoint is tried.

        Args:
          abstract_state: the `jax.ShapeDtypeStruct`s of the state, with the shardings to restore
            into. An array that is `...` is not read, and is `...` in the result.
          partial: whether `abstract_state` may be only a part of the state, as nested dicts; the
            rest is not read.
          only: the only step to try; `None` for the newest undamaged one.
          best: whether to try the best step before the newest.
          check: a function that raises a `ValueError` for the record of another run.

        Raises:
          CheckpointError: if there are checkpoints but none can be read, or if checkpoints were
            saved but none is present.
          ValueError: from `check`, or if no best step is known.
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
        """The steps in the order in which to try them."""
        # As process 0 sees them, since a shared file system may show the newest with a delay.
        steps = first_of_all(self.steps)[::-1]
        if not best or not steps:
            return steps
        known = first_of_all([step for step in [best_step_in(self.directory)] if step is not None])
        if not known:
            raise ValueError(
                f"no best checkpoint is known in {self.directory}: evaluation.best_metric was not "
                "set, or not evaluated yet; give the workdir to use the newest checkpoint"
            )
        return known + [step for step in steps if step not in known]

    def _was_removed(self, step: int) -> bool:
        """Whether the run has removed a checkpoint since the steps were listed."""
        removed = step in self.steps and not (self.directory / str(step)).exists()
        return bool(first_of_all([int(removed)])[0])  # all processes must try again, or none

    def _note_sizes(self, step: int, directory: AnyPath | None) -> None:
        """Note the file sizes of a step, or forget them; forget steps that no longer exist."""
        if jax.process_index() != 0:
            return
        before = known_sizes(self._sizes)
        noted = {name: before[name] for name in map(str, self.steps) if name in before}
        noted.pop(str(step), None)
        with contextlib.suppress(OSError):  # a checkpoint is complete without the note
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
                if name not in sizes:
                    raise CheckpointError(f"its file {name} is missing")
                raise CheckpointError(f"its file {name} has {sizes[name]} of {size} bytes")

    def _load(self, step: int, abstract_state: PyTree, *, partial: bool) -> PyTree:
        abstract_checksums = jax.tree.map(_abstract_checksum, abstract_state)
        abstract_items = {"state": abstract_state, "checksums": abstract_checksums}
        context = ocp.Context()
        context.pytree.loading.partial_load = partial
        with _explained("it cannot be loaded"), context:
            items = self._checkpointer.load_checkpointables(step, abstract_items)
        # A random key that lost its metadata is loaded as integers, with the right checksum.
        jax.tree.map(_check_form, abstract_state, items["state"])
        read = jax.tree.map(lambda leaf: None if leaf is ... else leaf, items)
        computed, saved = jax.device_get((_checksums(read["state"]), read["checksums"]))
        wrong = [
            jax.tree_util.keystr(path)
            for (path, computed_sum), saved_sum in zip(
                jax.tree_util.tree_leaves_with_path(computed), jax.tree.leaves(saved), strict=True
            )
            if computed_sum != saved_sum
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
    r"""Compute a checksum of an array's words $w_i$: $\sum_i (w_i \oplus m_i)\, o_i$ mod 2³².

    $m_i$ is a hash of $i$, and $o_i$ is an odd hash of $i$. A change of one word always changes the
    checksum, and other changes go unnoticed in about one of 2³² cases. Integer sums do not depend
    on the order of their terms, so the checksum does not depend on the sharding.
    """
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    width = min(array.dtype.itemsize, 4)
    words = lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        index = index * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    mask = _mixed(index)
    return jnp.sum((words ^ mask) * (_mixed(mask) | 1), dtype=jnp.uint32)


def _mixed(words: Integer[Array, "..."]) -> Integer[Array, "..."]:
    """The 32-bit finaliser of MurmurHash3 (Appleby, 2011)."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)


@jax.jit
def _checksums(state: PyTree) -> PyTree:
    return jax.tree.map(checksum, state)


def _check_form(abstract: Any, leaf: Any) -> None:
    if abstract is ...:
        return
    if (leaf.shape, leaf.dtype) != (abstract.shape, abstract.dtype):
        raise CheckpointError(
            f"an array is {leaf.dtype}{list(leaf.shape)}, not "
            f"{abstract.dtype}{list(abstract.shape)}"
        )


def _abstract_checksum(leaf: Any) -> Any:
    if leaf is ...:
        return ...
    replicated = NamedSharding(leaf.sharding.mesh, PartitionSpec())
    return jax.ShapeDtypeStruct((), jnp.uint32, sharding=replicated)


@contextlib.contextmanager
def _explained(failure: str) -> Iterator[None]:
    """Convert any error of a storage library to a `CheckpointError` with the reason in one line.

    With several processes, an error because another process has ended becomes a `PeerError`. In a
    single process, an error because the devices are full is raised unchanged.
    """
    try:
        yield
    except Exception as error:  # Orbax and TensorStore raise many classes
        errors: list[BaseException] = [error]
        while (cause := errors[-1].__cause__) is not None:  # Orbax wraps the reason
            errors.append(cause)
        several = jax.process_count() > 1
        if not several and (full := next(filter(of_full_devices, errors), None)):
            # The checkpoint may be undamaged. Several processes, however, must all fall back.
            raise full from full.__cause__
        last = errors[-1]
        if any(map(of_lost_process, errors)) or ("Gloo" in str(last) and several):
            raise PeerError(f"{failure}: {last}") from last
        reason = " ".join(str(last).split()) or type(last).__name__
        hint = _hint(reason)
        raise CheckpointError(f"{failure}: {reason[:400]}{hint}") from last


def _hint(reason: str) -> str:
    lowered = reason.lower()
    if any(sign in lowered for sign in ("no space", "quota", "file too large")):
        return ". Free some space, then run the same command again to resume from the last one"
    if "permission denied" in lowered or "read-only" in lowered:
        return ". Make it writable, or choose another --workdir"
    return ""


def _drop_orbax_records(record: logging.LogRecord) -> bool:
    # Orbax logs a long traceback per background thread for errors that are raised here as one line.
    return "orbax" not in record.pathname
