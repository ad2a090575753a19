"""Large buffers come in huge pages and are kept, and the restart changes nothing else."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from jaxcl.host import huge_pages
from jaxcl.host.huge_pages import start_with_huge_pages

_MEGABYTES = 96
_SMALL_PAGES = _MEGABYTES * 2**20 // 4096
_PROGRAM = f"""
import json, os, resource, sys
from jaxcl.host.huge_pages import start_with_huge_pages

print(os.getpid(), flush=True)
start_with_huge_pages()

def faults_of_a_block():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * ({_MEGABYTES} * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(json.dumps([min(faults_of_a_block() for _ in range(5)), sys.argv[1:]]))
"""
_IN_THREADS = """
from concurrent.futures import ThreadPoolExecutor

def in_threads():
    faults_of_a_block()
    with ThreadPoolExecutor(1) as pool:
        return min(pool.submit(faults_of_a_block).result() for _ in range(5))
"""
_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")

on_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="the allocator is not glibc's"
)


def run(program: str, **environment: str) -> list[str]:
    plain = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    finished = subprocess.run(
        [sys.executable, "-c", program, "--a flag", "é"],
        capture_output=True,
        text=True,
        check=True,
        env=plain | environment,
    )
    return finished.stdout.splitlines()


@on_glibc
def test_the_program_starts_again_once_as_the_same_process_with_its_arguments():
    first, second, result = run(_PROGRAM)
    assert first == second
    assert json.loads(result)[1] == ["--a flag", "é"]


@on_glibc
def test_freed_blocks_are_used_again_by_any_thread():
    program = _PROGRAM.replace("min(faults_of_a_block() for _ in range(5))", "in_threads()")
    program = program.replace("def faults_of_a_block", f"{_IN_THREADS}\ndef faults_of_a_block", 1)
    kept, returned = (
        json.loads(run(program, **environment)[-1])[0]
        for environment in ({}, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"})
    )
    assert returned > _SMALL_PAGES / 2  # otherwise, this test could not fail
    assert kept < 10


@on_glibc
@pytest.mark.skipif(
    not _THP.exists() or "[never]" in _THP.read_text(), reason="the kernel gives no huge pages"
)
def test_large_blocks_cost_few_page_faults():
    huge, small = (
        json.loads(run(_PROGRAM, **environment)[-1])[0]
        for environment in ({}, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"})
    )
    if "[always]" not in _THP.read_text():
        assert small > _SMALL_PAGES / 2  # otherwise, this test could not fail
    assert huge < _SMALL_PAGES / 8


def test_a_variable_that_the_user_has_set_is_kept(monkeypatch):
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("started again"))
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")
    start_with_huge_pages()
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.arena_max=2"


def test_nothing_changes_if_there_is_an_accelerator(monkeypatch):
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("started again"))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ["cuda"])
    start_with_huge_pages()
    assert "GLIBC_TUNABLES" not in os.environ


@pytest.mark.parametrize(("limit", "kept"), [("1048576\n", 524_288), ("max\n", None)])
def test_half_of_the_memory_of_a_container_is_kept(tmp_path, monkeypatch, limit, kept):
    (tmp_path / "memory.max").write_text(limit)
    monkeypatch.setattr(huge_pages, "_LIMITS", (tmp_path / "memory.max", tmp_path / "absent"))
    monkeypatch.setattr(huge_pages, "_accelerator_installed", lambda: False)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(os, "execv", lambda *_: None)
    # Set first, so that the variable is removed again after the test.
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    monkeypatch.delenv("GLIBC_TUNABLES")
    huge_pages.start_with_huge_pages()
    tunables = dict(one.split("=") for one in os.environ["GLIBC_TUNABLES"].split(":"))
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert int(tunables["glibc.malloc.trim_threshold"]) == (kept or machine // 2)
