"""Hypothesis strategies for what any loader may be handed: damaged bytes, and odd values in the place of others."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

Made = TypeVar("Made")
SEED = int(os.environ.get("HARMOQ_FUZZ_SEED", "0"))
FACTOR = int(os.environ.get("HARMOQ_FUZZ_FACTOR", "1"))


@dataclass(frozen=True)
class FileCase:
    """A file to be: its bytes and the suffix that it claims."""

    data: bytes
    suffix: str

    def write(self, folder: Path, name: str) -> Path:
        """Write it and return its path."""
        path = folder / f"{name}{self.suffix}"
        path.write_bytes(self.data)
        return path


class Hang(BaseException):
    """What a case took too long for: no code may catch it as an error of its own."""


@contextmanager
def limited(work: float = 10.0, waiting: float = 60.0) -> Iterator[None]:
    """Context manager that raises `Hang` in what takes more CPU time than ``work``, or waits for longer, in seconds.

    Waiting is counted in signals, not read from a clock: a process that the system has stopped gets none meanwhile. It
    is allowed longer, because other processes may leave this one little of the processor.
    """
    if os.name != "posix":
        yield
        return
    ticks, start = 0, time.process_time()

    def tick(*_: object) -> None:
        nonlocal ticks
        ticks += 1
        used = time.process_time() - start
        if used > work or ticks > waiting:
            raise Hang(f"{used:.1f} s of CPU time, {ticks} s in all")

    former = signal.signal(signal.SIGALRM, tick)
    signal.setitimer(signal.ITIMER_REAL, 1.0, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def run_cases(strategy: st.SearchStrategy[Made], count: int, test: Callable[[Made], None], offset: int = 0) -> None:
    """Call a test with ``count`` cases, always the same for `HARMOQ_FUZZ_SEED`; a case that fails is shrunk.

    Raises:
        Hang: A case took too long, see `limited`.
    """

    def in_time(case: Made) -> None:
        with limited():
            test(case)

    bounded = settings(
        max_examples=count * FACTOR,
        database=None,
        derandomize=False,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    seed(SEED + offset)(bounded(given(strategy)(lambda case: in_time(case))))()


def any_of(*values: Made) -> st.SearchStrategy[Made]:
    """One of several values, which Hypothesis never writes out: some are long."""
    return st.integers(0, len(values) - 1).map(values.__getitem__)


def noise(least: int, most: int) -> st.SearchStrategy[bytes]:
    """Any bytes, so many."""
    return st.binary(min_size=least, max_size=most)


def cut(data: bytes) -> st.SearchStrategy[bytes]:
    """Less than the whole, perhaps nothing."""
    return st.integers(0, len(data) - 1).map(lambda kept: data[:kept])


def flipped(data: bytes, most: int = 8) -> st.SearchStrategy[bytes]:
    """Up to ``most`` bytes replaced."""

    def replaced(changes: list[tuple[int, int]]) -> bytes:
        changed = bytearray(data)
        for at, value in changes:
            changed[at] = value
        return bytes(changed)

    byte = st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255))
    return st.lists(byte, min_size=1, max_size=most).map(replaced)


def damaged(intact: st.SearchStrategy[FileCase], header: int, most: int) -> st.SearchStrategy[FileCase]:
    """A valid file: as it is, truncated, with flipped bytes, or with up to ``most`` flipped bytes in its header."""

    def changed(change: Callable[[bytes], st.SearchStrategy[bytes]]) -> st.SearchStrategy[FileCase]:
        return intact.flatmap(lambda file: change(file.data).map(lambda data: FileCase(data, file.suffix)))

    def in_header(data: bytes) -> st.SearchStrategy[bytes]:
        return flipped(data[:header], most).map(lambda head: head + data[header:])

    return st.one_of(intact, changed(cut), changed(flipped), changed(in_header))


def _nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


_PLAIN: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 9, 2**63, -(10**30), 4.0, float("nan"), float("inf"), -1e308),
    *("", "8", "x" * 10_000, "\x00\ud800", "[red]bold[/]"),
)
_MADE: tuple[Callable[[], Any], ...] = (
    *(list, dict, lambda: [[]], lambda: [None, {}, "a"], lambda: {"": 0}, lambda: _nested(20)),
    lambda: {"sites": ["*"], "weight_bits": {}},
    *(lambda: 10**5000, lambda: _nested(5000)),  # longer and deeper than Python writes out
)
ODD: st.SearchStrategy[Any] = any_of(*_PLAIN) | any_of(*_MADE).map(lambda make: make())
"""A value of JSON, or one that a caller in Python could pass, that few fields take."""
