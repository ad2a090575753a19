"""How the host gives memory to a program that trains on CPU devices."""

import importlib.metadata
import importlib.util
import os
import platform
import sys

__all__ = ["start_with_huge_pages"]

_VARIABLE, _HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"


def start_with_huge_pages() -> None:
    """Starts this program again, once, with large blocks of memory in pages of 2 MB.

    XLA's CPU client asks malloc for a step's temporary buffers and gives them back after the step;
    glibc returns them to the kernel, which maps and zeroes every page again at the next. In pages
    of 4 KB that was a quarter of a step of `configs/code_search.py`, and a third of one of the
    transformer (BUILD_NOTES.md). glibc asks for larger pages only if an environment variable says
    so before the process starts; hence the new start, which keeps the process's number, files and
    arguments. Nothing happens without glibc, beside a plugin for an accelerator (whose steps have
    no buffers here), and where `GLIBC_TUNABLES` is set already.
    """
    if _VARIABLE in os.environ or platform.libc_ver()[0] != "glibc" or _accelerator_installed():
        return
    os.environ[_VARIABLE] = _HUGE_PAGES
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _accelerator_installed() -> bool:
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return bool(plugins) or importlib.util.find_spec("libtpu") is not None
