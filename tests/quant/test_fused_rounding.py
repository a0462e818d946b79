"""Fake-quantization compiled into fused kernels: the same values and gradients, and what happens without a compiler."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from harmoq_ao.config import HarmoqConfig
from harmoq_ao.harmonization.refine import refine
from harmoq_ao.harmonization.settings import RefineSettings
from harmoq_ao.quant import fused_rounding as fusing
from harmoq_ao.quant.fused_rounding import FUSED_FROM, fused_rounding, is_fused
from harmoq_ao.quant.quantizer import fake_quantize
from tests.compilers import needs_compiler, run_without_compiler, trace_only
from tests.harmonization.helpers import crops
from tests.models import calibrated


@pytest.fixture
def without_code(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No C++, which takes seconds for every shape; nor what was compiled before."""
    trace_only(monkeypatch)
    for cached in (fusing.compiled, fusing.can_compile):
        cached.cache_clear()
    yield
    for cached in (fusing.compiled, fusing.can_compile):
        cached.cache_clear()


@pytest.fixture
def however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operands of any size are fused."""
    monkeypatch.setattr(fusing, "FUSED_FROM", 1)


def operands() -> dict[str, list[Tensor | None]]:
    """Operand, bounds, joint scale and shift: an input, a weight by rows, and a transposed matmul operand."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(12, generator=generator) + 0.5
    wide = torch.randn(2, 9, 12, generator=generator) * 2
    rows = torch.ones(7, 1)
    return {
        "input": [wide, torch.tensor(-1.7), torch.tensor(2.1), scale, torch.randn(12, generator=generator)],
        "weight": [torch.randn(7, 12, generator=generator), -rows, rows, scale, None],
        "transposed": [wide.transpose(1, 2), torch.tensor(-1.0), torch.tensor(1.5), scale[:, None], None],
        "map": [wide.softmax(-1), torch.tensor(0.0), torch.tensor(0.3), None, None],
    }


def results(given: list[Tensor | None], upstream: Tensor, needed: int = 31) -> tuple[Tensor, list[Tensor]]:
    """Value and gradients; bit `i` of `needed` asks for that of operand `i`."""
    leaves = [t if t is None else t.detach().clone().requires_grad_(bool(needed >> i & 1)) for i, t in enumerate(given)]
    x, lo, hi, scale, shift = leaves
    assert x is not None
    assert lo is not None
    assert hi is not None
    value = fake_quantize(x, lo, hi, 3, scale, shift)
    value.backward(upstream)
    return value.detach(), [leaf.grad for leaf in leaves if leaf is not None and leaf.grad is not None]


def check_fused(given: list[Tensor | None], needed: int = 31, atol: float = 1e-6) -> None:
    """Fused and one by one, values are the same bits and gradients the same sums."""
    assert given[0] is not None
    upstream = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(1))
    value, gradients = results(given, upstream, needed)
    with fused_rounding():
        assert is_fused(given[0])
        fused_value, fused_gradients = results(given, upstream, needed)
    assert not is_fused(given[0])
    assert torch.equal(fused_value, value)
    torch.testing.assert_close(fused_gradients, gradients, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("kind", ["input", "weight", "transposed", "map"])
@pytest.mark.parametrize("needed", [31, 1, 30, 6])
def test_values_and_gradients_are_the_same(kind: str, needed: int, without_code: None, however_small: None) -> None:
    check_fused(operands()[kind], needed)


@needs_compiler
def test_with_the_compilers_code(however_small: None) -> None:
    check_fused(operands()["input"], atol=1e-5)


def test_half_precision_keeps_its_type(without_code: None, however_small: None) -> None:
    x = torch.randn(5, 6).bfloat16().requires_grad_()
    with fused_rounding():
        assert is_fused(x)
        value = fake_quantize(x, torch.tensor(-1.0), torch.tensor(1.0), 4)
        value.sum().backward()
    assert value.dtype == torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


def test_refinement_ends_where_it_does_without(without_code: None, however_small: None) -> None:
    losses = []
    for fused in (False, True):
        prepared = calibrated("SwinIR/light", HarmoqConfig(4, 4, "paper"))
        losses.append(refine(prepared, crops(4), RefineSettings(steps=2, checks=1, fused=fused)).losses)
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-6)
    assert losses[1][1] == pytest.approx(losses[0][1], rel=0.02)  # after a step of Adam, which takes signs


def test_small_operands_are_left_alone() -> None:
    with fused_rounding():
        assert not is_fused(torch.zeros(FUSED_FROM - 1))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fusing, "can_compile", lambda device_type: True)
            assert is_fused(torch.zeros(FUSED_FROM))


def test_without_a_compiler_a_warning_says_so_once_and_nothing_else_changes(tmp_path: Path) -> None:
    program = """
        import torch, warnings
        from harmoq_ao.quant.fused_rounding import FUSED_FROM, fused_rounding, is_fused
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with fused_rounding():
                print(*(is_fused(torch.zeros(FUSED_FROM)) for _ in range(2)))
        print(*(str(w.message) for w in caught if "Fake-quantizers" in str(w.message)))
    """
    printed = run_without_compiler(program, tmp_path)
    assert printed.startswith("False False\nFake-quantizers are not fused")
    assert "no-compiler" in printed
    assert printed.count("Fake-quantizers") == 1


def test_switched_off_it_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusing, "can_compile", lambda device_type: pytest.fail("asked"))
    assert not is_fused(torch.zeros(FUSED_FROM))
    with fused_rounding(enabled=False):
        assert not is_fused(torch.zeros(FUSED_FROM))


@pytest.mark.parametrize("learning", [False, True])
def test_nothing_is_compiled_where_no_gradient_flows(
    learning: bool, however_small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither for constants nor while the held-out crops are measured, whose sizes would be compiled for nothing."""
    monkeypatch.setattr(fusing, "can_compile", lambda device_type: pytest.fail("asked"))
    x = torch.randn(5, 6, requires_grad=learning)
    with fused_rounding(), torch.set_grad_enabled(not learning):
        fake_quantize(x, torch.tensor(-1.0), torch.tensor(1.0), 4)
