"""The GPU benchmark, as far as it goes without one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import gpu
from benchmarks.peers import Run
from tests.triton_kernels.interpreter import interpreted


def test_kernels_are_checked_against_their_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "BITS", (4,))
    monkeypatch.setattr(gpu, "SIZES", gpu.SIZES[:2])
    monkeypatch.setattr(gpu, "WINDOWS", [(2, 9, 12, 2), (2, 70, 12, 2)])
    with interpreted():
        rows = gpu.check_kernels(torch.device("cpu"))
    assert len(rows) == 8 + 12
    assert all(row.get("wrong", 0) == 0 for row in rows)
    for row in rows:  # a probability, or an input of the projection, at a tie may take the neighbouring code of 16
        assert row.get("error", 0.0) < (0.2 if "attention" in row["check"] else 0.02), row


def test_contenders_take_turns_and_failures_are_results(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(3, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.pixel_shuffle(self.mix(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), 2)

    def broken(model: nn.Module) -> Run:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(gpu.MODELS, "tiny", lambda scale: Twice())
    monkeypatch.setattr(gpu, "torchao_int8", broken)
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    rows = gpu.measure(gpu.Shape("tiny", 2, 8, 8), torch.device("cpu"), 3)
    assert rows[gpu.BASE]["speed_vs_float32_eager"] == 1.0
    assert rows["torchao int8 dynamic"] == {"error": "RuntimeError: no such kernel"}
    assert {"W8A8", "W2A2"} <= set(rows)
    assert rows["W4A4"]["p50_ms"] > 0


def test_shapes_have_names_of_their_own() -> None:
    assert len({shape.name for shape in gpu.SHAPES}) == len(gpu.SHAPES)
