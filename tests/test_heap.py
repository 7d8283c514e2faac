"""glibc's allocator: freed memory is used again without new pages, and can be given back."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from robustmoe import cli, heap

MEGABYTES, PAGE = 64, 4096
AGAIN = f"""
import resource, sys
from robustmoe import heap
if sys.argv[1] == "keep":
    assert heap.keep_freed()
block = b"x" * ({MEGABYTES} << 20)
del block
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
block = b"y" * ({MEGABYTES} << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
if sys.argv[1] == "keep":
    def held():
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))
    del block
    full = held()
    heap.give_back()
    print(full - held())
"""

linux = pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")


def told(how: str) -> list[int]:
    """The numbers that a process of its own prints."""
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-c", AGAIN, how]
    done = subprocess.run(words, check=True, capture_output=True, text=True, env=environment)
    return [int(word) for word in done.stdout.split()]


@linux
def test_freed_memory_is_used_again_and_can_be_given_back() -> None:
    pages = MEGABYTES * 2**20 // PAGE
    [left] = told("leave")
    kept, returned = told("keep")
    assert left > pages // 1000, "new pages, be they huge ones"
    assert kept < left / 4
    assert returned * 1024 > 0.9 * MEGABYTES * 2**20


@linux
@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_what_the_user_told_the_allocator_stands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_function", lambda _: pytest.fail("the allocator was asked"))
    monkeypatch.setenv(name, "1")
    assert not heap.keep_freed()


def test_without_such_an_allocator_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_function", lambda _: None)
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    assert not heap.keep_freed()
    heap.give_back()


@pytest.mark.parametrize(
    "words, program, times",
    [(["train", "--help"], True, 1), (["list", "--help"], True, 0), (["train", "--help"], False, 0)],
)
def test_a_program_that_works_keeps_what_it_frees_and_the_library_does_not(
    words: list[str], program: bool, times: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(heap, "keep_freed", lambda: calls.append(1))
    monkeypatch.setattr(sys, "argv", ["robustmoe", *words])
    assert cli.main(None if program else words) == 0
    assert len(calls) == times
