"""The workdir of a run: the folder of one run at a time, with one config, and complete files."""

import contextlib
import errno
import json
import os
import stat
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import jax

from jaxcl.data.modalities import MODALITIES
from jaxcl.data.prepare import DATA_FILE
from jaxcl.host.file_locks import HAS_LOCKS, lock_file
from jaxcl.host.files import is_remote, read_json_object, write_whole
from jaxcl.host.lease import leased
from jaxcl.host.paths import AnyPath, as_path
from jaxcl.host.remote import local_folder, remove_tree
from jaxcl.run.checkpoint_record import check_none_lost, newest_record, steps_in
from jaxcl.run.identity import (
    differences,
    jax_flags,
    migrated,
    pretrained_fingerprints,
    settings_differences,
)
from jaxcl.run.metric_writer import METRICS_FILE
from jaxcl.settings.derived import CHECKPOINTS, origin_of
from jaxcl.settings.pretrained import COPIES, is_copy
from jaxcl.settings.read import as_dict
from jaxcl.settings.sections import Settings

__all__ = [
    "CHECKPOINTS",
    "ID_FILE",
    "check_saved_flags",
    "check_saved_settings",
    "claim_workdir",
    "emptied_unless_begun",
    "lock_workdir",
    "read_config",
    "workdir_id",
]

CONFIG_FILE = "config.json"
ID_FILE = "run.json"
LOCK_FILE = ".lock"


@contextlib.contextmanager
def lock_workdir(workdir: AnyPath) -> Iterator[None]:
    """Create the folder of a run, and lock it against other runs.

    The lock is released at the end of the context, or at the latest when the process ends.

    Raises:
      ValueError: if another run uses the folder, its lock is not a regular file, or the folder is a
        checkpoint of a run.
      PermissionError: if the folder cannot be written.
    """
    run, checkpoint = origin_of(workdir)
    if checkpoint is not None and (run / ID_FILE).exists():
        raise ValueError(
            f"{workdir} is a checkpoint of a run; give {run} to resume that run, or set "
            "init_from to the checkpoint to start a new run from it, in another --workdir"
        )
    if jax.process_index() != 0 or not HAS_LOCKS:  # without locks, runs are not kept apart
        yield
        return
    with _explained(workdir):
        lock = leased(workdir / LOCK_FILE) if is_remote(workdir) else _locked_file(workdir)
    with lock:
        yield


def _locked_file(workdir: AnyPath) -> BinaryIO:
    path = workdir / LOCK_FILE
    while True:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = _open_lock(path)
        try:
            lock_file(lock)
        except BlockingIOError:
            lock.close()
            raise ValueError(
                f"another run is at work in {workdir}; wait until it ends, or choose another "
                "--workdir"
            ) from None
        # Another process whose start failed may have removed the file before it was locked here.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return lock
        lock.close()


@contextlib.contextmanager
def emptied_unless_begun(workdir: AnyPath) -> Iterator[None]:
    """Remove the files that a new run has written if it fails before its first record.

    The folder of an earlier run stays unchanged, and so do files that belong to the user.
    """
    names = (CONFIG_FILE, ID_FILE, DATA_FILE, METRICS_FILE, LOCK_FILE, *_prepared())
    absent = [name for name in names if name == LOCK_FILE or not (workdir / name).exists()]
    try:
        yield
    except BaseException:
        is_new = CONFIG_FILE in absent and not _has_begun(workdir)
        if is_new and jax.process_index() == 0:
            _remove_run(workdir, absent)
        raise


def _has_begun(workdir: AnyPath) -> bool:
    metrics = workdir / METRICS_FILE
    return bool(steps_in(workdir / CHECKPOINTS)) or (
        metrics.is_file() and bool(metrics.read_bytes())
    )


def _remove_run(workdir: AnyPath, names: Sequence[str]) -> None:
    for name in names:
        _remove(workdir / name)
    remove_tree(local_folder(workdir) / "tensorboard")
    for directory in (workdir / CHECKPOINTS, workdir):
        with contextlib.suppress(OSError, ValueError):  # if the folder has files of the user
            directory.rmdir()


def _prepared() -> list[str]:
    """The files and folders that a new run creates before its first step."""
    files = [name for modality in MODALITIES.values() for name in modality.files]
    return [*files, *COPIES.values()]


def _remove(path: AnyPath) -> None:
    if path.is_dir():
        if is_copy(path):  # otherwise it belongs to the user
            remove_tree(path)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _open_lock(path: AnyPath) -> BinaryIO:
    """Open the lock file; raise a `ValueError` if it is not a regular file."""
    # Do not follow a link, do not truncate the file, and do not wait for the reader of a pipe.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags, 0o666)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return os.fdopen(descriptor, "r+b", buffering=0)
        os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
    raise ValueError(f"{path} is not a regular file; remove it")


def claim_workdir(workdir: AnyPath, settings: Settings) -> Mapping[str, Any] | None:
    """Create the folder of a run, or check that it belongs to these settings.

    The settings are compared with those in the newest checkpoint, even if `config.json` has been
    edited. Before the first checkpoint, new settings replace the earlier settings, since no
    training is lost.

    Returns:
      The record of the newest checkpoint (`run_record`), or `None` before the first one.

    Raises:
      ValueError: if a checkpoint in the folder was saved with other settings, pretrained files or
        flags of JAX; the message names the differences.
      CheckpointError: if the folder had checkpoints that are now missing.
      PermissionError: if the folder cannot be written.
    """
    workdir = as_path(workdir)
    with _explained(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        check_none_lost(workdir / CHECKPOINTS)
        record = newest_record(workdir / CHECKPOINTS)
        if record is not None:
            check_saved_settings(workdir, settings, record)
            check_saved_flags(workdir, record)
        elif (workdir / CONFIG_FILE).exists():
            _replace_other_config(workdir, settings)
        if jax.process_index() == 0:
            write_whole(workdir / CONFIG_FILE, json.dumps(as_dict(settings), indent=2) + "\n")
            if not (workdir / ID_FILE).exists():
                write_whole(workdir / ID_FILE, json.dumps({"id": uuid.uuid4().hex}) + "\n")
    return record


def workdir_id(workdir: AnyPath) -> str:
    """Read the id of a workdir, with which processes check that they share it.

    Raises:
      ValueError: if there is no id, such as when process 0 has a different folder.
    """
    path = as_path(workdir) / ID_FILE
    if not path.exists():
        raise ValueError(
            f"process {jax.process_index()} cannot find {path}, which process 0 wrote; give all "
            "processes the same --workdir, on a file system that they share"
        )
    return str(read_json_object(path).get("id"))


def check_saved_settings(workdir: AnyPath, settings: Settings, record: Mapping[str, Any]) -> None:
    """Raise a `ValueError` if a checkpoint has other settings or pretrained files."""
    try:
        different = settings_differences(
            record.get("settings", {}), settings, saved_step=record["step"]
        )
    except ValueError as error:
        raise ValueError(
            f"the checkpoints in {workdir} were saved by another version of jaxcl ({error}); "
            "choose another --workdir"
        ) from error
    if different:
        raise ValueError(_of_another_config(workdir, different))
    if record.get("pretrained", {}) != pretrained_fingerprints(settings):
        raise ValueError(
            f"the files of the pretrained model in {workdir} ({', '.join(COPIES.values())}) have "
            "changed since the run began; restore them from a copy, or choose another --workdir"
        )


def check_saved_flags(workdir: AnyPath, record: Mapping[str, Any]) -> None:
    """Raise a `ValueError` if a checkpoint was saved with other flags of JAX."""
    if different := differences(record.get("flags", {}), jax_flags()):
        raise ValueError(
            f"the run in {workdir} was trained with other flags of JAX: {'; '.join(different)}. "
            "Set the same flags again, or choose another --workdir"
        )


def read_config(workdir: AnyPath) -> Mapping[str, Any]:
    """Read the config of the run in a folder, for `read_settings`.

    Raises:
      ValueError: if there is no run.
    """
    path = as_path(workdir) / CONFIG_FILE
    if not path.exists():
        raise ValueError(
            f"there is no run in {workdir} (no {path.name}); give the --workdir of a run"
        )
    return migrated(_read_json(path))


def _replace_other_config(workdir: AnyPath, settings: Settings) -> None:
    """Remove the prepared files of a run with another config, unless it has saved a checkpoint."""
    saved = _read_json(workdir / CONFIG_FILE)
    different = settings_differences(saved, settings, saved_step=None)
    if different and steps_in(workdir / CHECKPOINTS):
        raise ValueError(_of_another_config(workdir, different))
    if saved.get("epochs") is not None or settings.epochs is not None:
        # A run with epochs knows its steps only after its files were prepared.
        different = [text for text in different if not text.startswith("steps ")]
    if different:
        for name in (DATA_FILE, *_prepared()):
            _remove(workdir / name)


def _of_another_config(workdir: AnyPath, different: Sequence[str]) -> str:
    return (
        f"the workdir {workdir} belongs to another config: {'; '.join(different)}. Choose another "
        "--workdir, or restore the settings"
    )


@contextlib.contextmanager
def _explained(workdir: AnyPath) -> Iterator[None]:
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        raise PermissionError(
            f"the workdir {workdir} cannot be created, since a file has that name; choose another "
            "--workdir"
        ) from error
    except OSError as error:
        raise PermissionError(
            f"cannot write to the workdir {workdir} ({error.strerror}); make it writable, or "
            "choose another --workdir"
        ) from error


def _read_json(path: AnyPath) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except ValueError as error:
        raise ValueError(
            f"{error}; restore it, or delete it and give the config with which the run started"
        ) from error
