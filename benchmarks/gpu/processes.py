"""Steps in processes of their own: one that fails, hangs or is killed takes nothing with it but itself.

Processes are forked from a server that has imported torch and Triton and has touched no GPU, so that starting one takes
milliseconds; what a step prints goes to a file.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import Step
from benchmarks.measuring import one_line

Perform = Callable[[Step], dict[str, Any]]
PRELOADED = ["benchmarks.gpu.work"]
"""Imported once, in the server; nothing in it may ask for a GPU (torchao does)."""


@dataclass
class _Running:
    step: Step
    process: BaseProcess
    pipe: Connection
    log: Path
    ends: float
    started: float


class Runner:
    """Runs steps.

    Args:
        perform: What a process does with its step; importable, and returns what JSON can hold.
        logs: Folder for what processes print.
        start: Start method of multiprocessing, ``forkserver`` or ``spawn``.
    """

    def __init__(self, perform: Perform, logs: Path, start: str = "forkserver") -> None:
        self._perform = perform
        self._logs = logs
        self._context = multiprocessing.get_context(start)
        if start == "forkserver":
            self._context.set_forkserver_preload(PRELOADED)

    def run(self, steps: Sequence[Step], jobs: int, deadline: float) -> Iterator[tuple[Step, dict[str, Any]]]:
        """Each step with its result, as it ends: ``ok``, ``wall_s``, and ``error`` where it failed.

        Steps that the deadline leaves no time for, or ends, are not among them.

        Args:
            steps: In the order in which they start.
            jobs: Processes at a time.
            deadline: As of ``time.monotonic``.
        """
        waiting = list(reversed(steps))
        running: list[_Running] = []
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    step = waiting.pop()
                    if time.monotonic() + step.seconds <= deadline:
                        running.append(self._start(step, deadline))
                now = time.monotonic()
                wait([r.pipe for r in running], max(0.0, min((r.ends for r in running), default=now) - now))
                for each in [r for r in running if r.pipe.poll() or time.monotonic() >= r.ends]:
                    running.remove(each)
                    found = _result(each)
                    if found is not None:
                        yield each.step, found
        finally:
            for each in running:
                _end(each)

    def _start(self, step: Step, deadline: float) -> _Running:
        log = self._logs / (re.sub(r"[^\w.-]+", "_", step.name) + ".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=serve, args=(self._perform, step, log, theirs))  # type: ignore[attr-defined]
        process.start()
        theirs.close()  # so that the end of the process is the end of the answers
        now = time.monotonic()
        return _Running(step, process, ours, log, min(now + step.limit, deadline), now)


def serve(perform: Perform, step: Step, log: Path, pipe: Connection) -> None:
    """What a process runs: the step, its output in `log`, its result or error through `pipe`."""
    os.setsid()  # whatever it starts ends with it
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    try:
        pipe.send({"ok": True} | perform(step))
    except Exception as error:  # whatever anybody's code fails with is a result
        traceback.print_exc()
        pipe.send({"ok": False, "error": one_line(error)})


def _result(running: _Running) -> dict[str, Any] | None:
    """What a process found; None where only the deadline ended it, so that it is done in the next run."""
    seconds = time.monotonic() - running.started
    if not running.pipe.poll():
        _end(running)
        if seconds < running.step.limit:
            return None
        return {"ok": False, "error": f"stopped after {running.step.limit:.0f} s", "wall_s": seconds}
    try:
        found: dict[str, Any] = running.pipe.recv()
    except EOFError:
        running.process.join(10)
        found = {"ok": False, "error": f"its process ended by {_status(running.process.exitcode)}"}
    _end(running)
    return found | {"wall_s": seconds}


def _end(running: _Running) -> None:
    if running.process.pid is not None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(running.process.pid, signal.SIGKILL)
    running.process.kill()
    running.process.join()
    running.pipe.close()


def _status(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"status {code}"
