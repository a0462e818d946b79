"""Memory that is freed stays in the process when it is asked to."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from threading import Event

import pytest

from harmoq_ao.common import allocator
from harmoq_ao.common.allocator import keep_memory, large_blocks_returned, return_freed_memory

_PROGRAM = """
import resource, sys
import torch
from harmoq_ao.common.allocator import keep_memory

torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_memory()

def layers():
    return sum(float(x[0]) for x in [torch.ones(4_000_000) for _ in range(4)] + [torch.ones(30_000_000)])

for _ in range(16):  # it takes up to six rounds, by chance, until every block has found its place
    layers()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    layers()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
_PAGES_OF_FOUR_ROUNDS = 4 * 46_000_000 * 4 // 4096

glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="needs glibc")


def _faults(how: str) -> int:
    """Pages that a process of its own had cleared for it in four rounds after the first 16."""
    command, without = [sys.executable, "-c", _PROGRAM, how], {k: v for k, v in os.environ.items() if "MALLOC" not in k}
    run = subprocess.run(command, env=without, capture_output=True, text=True, check=True)
    return int(run.stdout)


@glibc
def test_what_was_freed_is_used_again_without_asking_the_system() -> None:
    """By default the system is asked every time; a machine short of memory may take back some of what was kept."""
    default = _faults("default")
    assert default > 0.5 * _PAGES_OF_FOUR_ROUNDS
    assert _faults("keep") < 0.4 * default


_SCATTERED = """
import sys
from harmoq_ao.common.allocator import keep_memory, return_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1])

keep_memory()
blocks = [bytes(65536 + 16 * (i % 7)) for i in range(4000)]
full = resident()
blocks = blocks[::20]  # what is left lies between what was freed
scattered = resident()
assert return_freed_memory()
print(full, scattered, resident())
"""


@glibc
def test_freed_memory_between_what_is_in_use_goes_back_to_the_system() -> None:
    run = subprocess.run([sys.executable, "-c", _SCATTERED], capture_output=True, text=True, check=True)
    full, scattered, after = map(int, run.stdout.split())
    pages = 4000 * 16
    assert full - scattered < 0.2 * pages  # glibc by itself keeps it
    assert scattered - after > 0.6 * pages


_LARGE_BLOCKS = """
from harmoq_ao.common.allocator import keep_memory, large_blocks_returned

def resident():
    return int(open("/proc/self/statm").read().split()[1])

def blocks():
    return [(bytearray(b"x" * (8 << 20)), bytes(65536)) for _ in range(10)]

keep_memory()
with large_blocks_returned():
    held = blocks()
    full = resident()
    held = [small for _, small in held]  # what is left lies between what was freed
    after = resident()
held = blocks()
held = [small for _, small in held]
print(full, after, resident())
"""


@glibc
def test_large_blocks_go_back_while_they_are_told_to_and_stay_again_after_it() -> None:
    run = subprocess.run([sys.executable, "-c", _LARGE_BLOCKS], capture_output=True, text=True, check=True)
    full, after, kept = map(int, run.stdout.split())
    pages = 10 * (8 << 20) // 4096
    assert full - after > 0.9 * pages
    assert kept - after > 0.9 * pages


def test_a_process_that_was_not_tuned_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "_tuned", Event())
    monkeypatch.setattr(allocator, "_of_glibc", lambda name: pytest.fail("the allocator was asked"))
    with large_blocks_returned():
        pass


def test_other_systems_and_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    assert not keep_memory()
    assert not return_freed_memory()
    monkeypatch.setattr(allocator.sys, "platform", "win32")
    assert not keep_memory()
