"""Steps in processes: what one does to itself, it does to itself only."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks.gpu import processes
from benchmarks.gpu.plan import Step
from benchmarks.gpu.processes import Runner
from tests.benchmarks.steps import act
from tests.waiting import is_running, until


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.setattr(processes, "PRELOADED", [])
    return Runner(act, tmp_path)


def test_a_process_that_ends_badly_loses_only_its_own_result(runner: Runner, tmp_path: Path) -> None:
    names = ("return 1", "kill", "exit 3", "raise no kernel", "print hello", "return 2")
    steps = [Step(f"check/{name}", limit=60) for name in names]
    found = {step.subject: row for step, row in runner.run(steps, 2, time.monotonic() + 120)}
    assert set(found) == set(names)
    assert [found[f"return {n}"]["value"] for n in (1, 2)] == [1, 2]
    assert found["return 1"]["process"] != found["return 2"]["process"]
    assert [found[name]["ok"] for name in names] == [True, False, False, False, False, True]
    assert found["kill"]["error"] == "its process ended by SIGKILL"
    assert found["exit 3"]["error"] == "its process ended by status 3"
    assert found["raise no kernel"]["error"] == "RuntimeError: no kernel"
    assert (tmp_path / "check_print_hello.log").read_text() == "hello\n"
    assert "Traceback" in (tmp_path / "check_raise_no_kernel.log").read_text()


def test_a_step_that_hangs_is_ended_with_what_it_started(runner: Runner, tmp_path: Path) -> None:
    steps = [Step("check/hang", seconds=1, limit=15), Step("check/return 1", seconds=1)]
    found = {step.subject: row for step, row in runner.run(steps, 2, time.monotonic() + 120)}
    assert found["return 1"]["ok"]
    assert found["hang"]["error"] == "stopped after 15 s"
    child = int((tmp_path / "check_hang.log").read_text())
    assert until(lambda: not is_running(child))


def test_the_deadline_leaves_steps_for_the_next_run(runner: Runner) -> None:
    steps = [Step("check/hang", seconds=1), Step("check/return 1", seconds=1000), Step("check/return 2", seconds=0)]
    assert [step.subject for step, _ in runner.run(steps, 2, time.monotonic() + 15)] == ["return 2"]
