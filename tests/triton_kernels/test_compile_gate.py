"""The machine code of all kernels: compiled here, for GPUs that need not be here."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import triton

from harmoq_ao.triton_kernels import compile_gate, roofline
from harmoq_ao.triton_kernels.compile_cases import CASES
from harmoq_ao.triton_kernels.compile_gate import Measured

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "architectures", [["sm_90"], pytest.param(list(compile_gate.ARCHITECTURES), marks=pytest.mark.slow)], ids=len
)
def test_all_kernels_compile_within_their_budgets(architectures: list[str]) -> None:
    # In a process of its own: compiling needs Triton as it is, without the interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "harmoq_ao.triton_kernels.compile_gate"]
    command += [f"--arch={name}" for name in architectures]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" @ ") == len(CASES) * len(architectures)


def test_the_table_covers_every_case() -> None:
    _, rows = compile_gate.read_budget()
    assert set(rows) == {f"{case.name} @ {name}" for case in CASES for name in compile_gate.ARCHITECTURES}


def test_instructions_of_loops_count_as_often_as_they_run() -> None:
    line = "        /*{:04x}*/                   {} ;\n"
    listing = "".join(
        [
            line.format(0, "MOV R1, c[0x0][0x28]"),
            ".L_x_0:\n",
            line.format(16, "FADD R2, R2, R3"),
            ".L_x_1:\n",
            line.format(32, "@!P0 BRA `(.L_x_1)"),
            line.format(48, "@P1 BRA `(.L_x_0)"),
            ".L_x_2:\n",
            line.format(64, "FMUL R2, R2, R3"),
            line.format(80, "@P1 BRA `(.L_x_2)"),
            line.format(96, "EXIT"),
        ]
    )
    assert compile_gate.executed(listing, 1) == 7
    assert compile_gate.executed(listing, 10) == 2 + 10 * 5


def measured(**changes: int) -> Measured:
    return replace(Measured(100, 100, 64, 1024, stack=0, integer_mma=2, float_mma=0, fused=0), **changes)


def test_blocks_of_swinir_light_issue_in_thirty_microseconds() -> None:
    """By the table of sm_90: window and MLP, the mean of blocks with and without regions; fewer bits take no more."""
    found = roofline.table()
    seconds = {work.case: roofline.issue_seconds(work, found[work.case]) for work in roofline.WORK}
    blocks = {weights: roofline.block_seconds(seconds, weights) for weights in ("w4", "w8")}
    assert blocks["w8"] <= 30e-6
    assert blocks["w4"] <= blocks["w8"]
    assert roofline.model_seconds(seconds, "w8") <= 1.5e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, ""),
        ({"instructions": 110}, ""),
        ({"instructions": 111}, "budget 100"),
        ({"stack": 8}, "spill"),
        ({"shared": 164 * 1024}, "shared memory"),
        ({"integer_mma": 0}, "no int8"),
    ],
)
def test_what_the_gate_refuses(changes: dict[str, int], message: str) -> None:
    case = next(case for case in CASES if case.integer_mma)
    found = compile_gate.problems(case, "sm_80", measured(**changes), 100)
    assert len(found) == bool(message)
    assert message in "".join(found)


def test_fused_multiply_adds_are_refused_where_codes_are_made() -> None:
    case = next(case for case in CASES if case.unfused)
    assert "fused" in "".join(compile_gate.problems(case, "sm_90", measured(fused=1), None))


def test_budgets_of_another_version_are_not_held(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = [(CASES[0], "sm_90", measured(instructions=10**6))]
    monkeypatch.setattr(compile_gate, "measured", lambda architectures, cases: iter(found))
    monkeypatch.setattr(compile_gate, "read_budget", lambda: ("0.0", {f"{CASES[0].name} @ sm_90": {"instructions": 1}}))
    assert compile_gate.check(["sm_90"], CASES[:1]) == []
    assert "structure only" in caplog.text
    rows = {f"{CASES[0].name} @ sm_90": {"instructions": 1}}
    monkeypatch.setattr(compile_gate, "read_budget", lambda: (triton.__version__, rows))
    assert len(compile_gate.check(["sm_90"], CASES[:1])) == 1
