"""Make glibc use huge pages and keep freed memory, for programs that train on CPU devices."""

import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path

__all__ = ["start_with_huge_pages"]

_VARIABLE = "GLIBC_TUNABLES"
_LIMITS = (  # of a container, in both versions of cgroups
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def start_with_huge_pages() -> None:
    """Restart this program once, so that glibc allocates in pages of 2 MB and keeps freed memory.

    XLA's CPU client allocates a step's temporary buffers with malloc and frees them after the step.
    glibc returns them to the kernel, which maps and zeroes every page again in the next step. With
    pages of 4 KB, this took a quarter of a step of `configs/code_search.py`, and a third of a step
    of the transformer. With huge pages, it still took a quarter of the CPU time of a step of MiniLM
    (BUILD_NOTES.md). The process therefore keeps freed memory between steps, up to half of the
    memory of the machine or container. glibc reads the settings from the environment before `main`,
    so the program must be executed again; it keeps its process id, open files and arguments.
    Nothing happens without glibc, if a plugin for an accelerator is installed (a step's buffers are
    then not on the host), or if `GLIBC_TUNABLES` is already set.
    """
    if _VARIABLE in os.environ or platform.libc_ver()[0] != "glibc" or _accelerator_installed():
        return
    memory = _memory()
    tunables = {
        "hugetlb": 1,
        # All blocks come from one heap, which grows and shrinks at its end: blocks that are mapped
        # one by one, and heaps of other threads, are returned to the kernel.
        "mmap_max": 0,
        "arena_max": 1,
        "trim_threshold": memory // 2,
    }
    os.environ[_VARIABLE] = ":".join(f"glibc.malloc.{name}={n}" for name, n in tunables.items())
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _memory() -> int:
    """Bytes of memory that this process may use."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in _LIMITS:
        if file.exists() and (text := file.read_text().strip()).isdecimal():
            memory = min(memory, int(text))
    return memory


def _accelerator_installed() -> bool:
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return bool(plugins) or importlib.util.find_spec("libtpu") is not None
