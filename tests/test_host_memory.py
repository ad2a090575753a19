"""A program that keeps its memory does not fault it in again at every step."""

import ctypes
import importlib.metadata
import subprocess
import sys

import pytest

from jaxcl.host_memory import keep_freed_memory

_MEGABYTES = 96
_PAGES = _MEGABYTES * 2**20 // 4096
_PROGRAM = f"""
import resource, sys
import jax, jax.numpy as jnp
from jaxcl.host_memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

@jax.jit
def step(x):  # sorted, so that the large buffer is not fused away
    return jnp.sort(x + jnp.arange({_MEGABYTES} * 2**18 // 8, dtype=jnp.float32)).sum()

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(1.0).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(min(faults_of_a_step() for _ in range(10)))  # the heap grows for a few steps
"""


def page_faults_of_a_step(mode: str) -> int:
    command = [sys.executable, "-c", _PROGRAM, mode]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="the allocator is not glibc's"
)
def test_a_step_faults_no_pages_in_once_memory_is_kept():
    kept, given_back = (page_faults_of_a_step(mode) for mode in ("keep", "plain"))
    assert given_back > _PAGES / 16  # or this test could not fail
    assert kept < given_back / 20


def test_beside_an_accelerator_nothing_is_changed(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ["cuda"])
    assert not keep_freed_memory()
