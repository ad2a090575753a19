"""Huge pages for programs that train on CPU devices."""

import importlib.metadata
import importlib.util
import os
import platform
import sys

__all__ = ["start_with_huge_pages"]

_VARIABLE, _HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"


def start_with_huge_pages() -> None:
    """Restart this program once, so that glibc allocates large blocks in pages of 2 MB.

    XLA's CPU client allocates a step's temporary buffers with malloc and frees them after the step.
    glibc returns them to the kernel, which maps and zeroes every page again in the next step. With
    pages of 4 KB, this took a quarter of a step of `configs/code_search.py`, and a third of a step
    of the transformer (BUILD_NOTES.md). glibc reads the setting for larger pages from the
    environment before `main`, so the program has to be executed again; it keeps its process number,
    open files and arguments. Nothing happens without glibc, if a plugin for an accelerator is
    installed (a step's buffers are then not on the host), or if `GLIBC_TUNABLES` is already set.
    """
    if _VARIABLE in os.environ or platform.libc_ver()[0] != "glibc" or _accelerator_installed():
        return
    os.environ[_VARIABLE] = _HUGE_PAGES
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _accelerator_installed() -> bool:
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return bool(plugins) or importlib.util.find_spec("libtpu") is not None
