"""Comparing a result with its reference: what rounds is right, everything else is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.problems import checks, compare, floor, sanitized, timings


def result() -> Tensor:
    return torch.randn(257, 61, generator=torch.Generator().manual_seed(1))


def test_rounding_to_bfloat16_is_right() -> None:
    row = compare(result().bfloat16(), result(), exact=False)
    assert row["ok"]
    assert 0 < row["error_rms"] < 0.004


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y * 2,
        lambda y: y - 0.05,
        lambda y: y.index_fill(0, torch.tensor([256]), 0.0),  # the last row is missing
        lambda y: y.index_fill(1, torch.tensor([60]), 0.0),
        lambda y: torch.where(y == y.max(), torch.nan, y),
        lambda y: torch.where(y == y.max(), torch.inf, y),
        lambda y: y * torch.nan,
        lambda y: y[:-1],
    ],
)
def test_what_is_wrong_is_wrong(change: object) -> None:
    assert not compare(change(result()), result(), exact=False)["ok"]


def test_integers_have_to_be_equal() -> None:
    expected = torch.arange(1000)
    assert compare(expected.clone(), expected, exact=True) == {"ok": True, "wrong": 0, "of": 1000}
    assert compare(expected.index_fill(0, torch.tensor([7]), 8), expected, exact=True)["wrong"] == 1


def test_a_reference_of_nan_is_no_reference() -> None:
    assert not compare(result(), result() * torch.nan, exact=False)["ok"]


def test_floors_are_the_longest_of_bytes_and_products() -> None:
    rates = {"copied_bytes_per_s": 1e12, "int8_macs_per_s": 1e14, "bfloat16_macs_per_s": 5e13}
    row = {"bytes": 1e9, "int8_macs": 1e11, "float16_macs": 1e11, "p50_ms": 4.0}
    assert floor(row, rates) == pytest.approx({"floor_ms": 2.0, "of_floor": 0.5})
    assert floor(row, {}) == {}
    assert floor({"error": "no kernel"}, rates) == {}


def test_least_work_is_counted() -> None:
    device = torch.device("cpu")
    call = timings(tiny=True)["mlp, norm, residual: tiny w8"].make(device)
    assert (call.bytes, call.int8) == (2 * 2 * 18 * 12 + 2 * 12 * 24, 2 * 18 * 12 * 24)


@pytest.mark.parametrize("name", [name for name, problem in checks(tiny=True).items() if not problem.exact])
def test_each_problem_shows_when_a_scale_is_doubled(name: str) -> None:
    call = checks(tiny=True)[name].make(torch.device("cpu"))
    expected = call.reference()
    assert compare(expected, expected, exact=False)["ok"]
    assert not compare(expected * 1.05, expected, exact=False)["ok"]
    assert expected.std() > 0.1


def test_what_a_gpu_will_be_given_is_made_and_compiled() -> None:
    root = Path(__file__).parents[3]
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.benchmarks.rehearsal"]
    done = subprocess.run(command, cwd=root, env=variables, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    names = done.stdout.splitlines()
    assert set(sanitized(tiny=False)) < set(names)
    assert {name for name in timings(tiny=False) if "swinir-light" in name} < set(names)
