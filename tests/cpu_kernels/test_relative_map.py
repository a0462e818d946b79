"""Attention maps to codes in C++ against plain torch: codes bit for bit, sums and gradients within rounding."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harmoq_ao.quant.operators import using
from harmoq_ao.quant.relative_maps import map_product
from tests.strategies import SEEDS, bit_widths

RANGES = st.sampled_from([(0.0, 1.0), (0.0, 0.83), (0.0, 1.2), (-0.2, 1.0), (-0.5, 0.7)])


def a_map(seed: int, *shape: int) -> Tensor:
    """Softmaxes, and a row of zeros."""
    found = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(3).softmax(-1)
    found[..., 0, :] = 0
    return found


def with_gradients(
    operators: ModuleType | None, p: Tensor, values: Tensor, bounds: tuple[Tensor, Tensor], bits: int
) -> list[Tensor]:
    """The product, and the gradients of map, values and bounds."""
    leaves = p, values, lo, hi = [t.detach().requires_grad_() for t in (p, values, *bounds)]
    with using(operators):
        y = map_product(p, values, lo, hi, bits)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


@given(SEEDS, st.integers(1, 3), st.integers(1, 20), st.one_of(st.integers(1, 40), st.just(256)), RANGES, bit_widths())
def test_codes(
    operators: ModuleType, seed: int, batch: int, rows: int, keys: int, span: tuple[float, float], bits: int
) -> None:
    p, levels = a_map(seed, batch, rows, keys), 2**bits - 1
    step = (span[1] - span[0]) / levels
    lo = torch.tensor(round(span[0] / step) * step)
    hi = lo + levels * step
    codes, top, sums, total = operators.relative_codes(p, lo, hi, bits)
    position = p / p.amax(-1, keepdim=True).clamp_min(1e-30) * (1 / ((hi - lo) / levels))
    offset = -lo / ((hi - lo) / levels)
    wanted = (position + offset).round().clamp(0, levels) - offset.round()
    assert torch.equal(codes, wanted)
    assert torch.equal(top, p.amax(-1, keepdim=True).clamp_min(1e-30))
    torch.testing.assert_close(sums, p.sum(-1, keepdim=True))
    assert torch.equal(total, codes.sum(-1, keepdim=True).clamp_min(1e-30))


@given(SEEDS, st.integers(1, 70), st.integers(1, 40), RANGES, bit_widths())
def test_product_and_gradients(
    operators: ModuleType, seed: int, rows: int, keys: int, span: tuple[float, float], bits: int
) -> None:
    bounds = torch.tensor(span[0]), torch.tensor(span[1])
    values = torch.randn(2, keys, 5, generator=torch.Generator().manual_seed(seed))
    operands = a_map(seed, 2, rows, keys), values, bounds, bits
    found, wanted = with_gradients(operators, *operands), with_gradients(None, *operands)
    for part, other in zip(found, wanted, strict=True):
        size = float(other.abs().max())
        torch.testing.assert_close(part, other, rtol=1e-4, atol=1e-5 * max(size, 1.0))


def test_one_map_for_many_values(operators: ModuleType) -> None:
    p, values = a_map(1, 6, 9), torch.randn(4, 9, 3, generator=torch.Generator().manual_seed(2))
    operands = p, values, (torch.tensor(0.0), torch.tensor(0.9)), 4
    for part, other in zip(with_gradients(operators, *operands), with_gradients(None, *operands), strict=True):
        torch.testing.assert_close(part, other, rtol=1e-4, atol=1e-4 * max(float(other.abs().max()), 1.0))


def test_the_number_of_threads_is_of_no_consequence(operators: ModuleType, threads: None) -> None:
    values = torch.randn(12, 130, 10, generator=torch.Generator().manual_seed(2))
    p, results = a_map(3, 12, 130, 130), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found = operators.relative_codes(p, torch.tensor(0.0), torch.tensor(0.9), 4)
        grad = values @ values.mT
        operators.relative_map_backward_(grad, p, *found[1:], torch.tensor(0.0), torch.tensor(0.9))
        results.append([*found, grad])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_arguments_that_do_not_fit(operators: ModuleType) -> None:
    p, bounds = a_map(1, 3, 4), (torch.tensor(0.0), torch.tensor(1.0))
    for wrong in (p.double(), p.mT, p[:0]):
        with pytest.raises(RuntimeError, match="a dense float32 map"):
            operators.relative_codes(wrong, *bounds, 4)
    with pytest.raises(RuntimeError, match="one pair of bounds"):
        operators.relative_codes(p, torch.zeros(2), torch.ones(2), 4)
    row = torch.ones(3, 1)
    with pytest.raises(RuntimeError, match="of the map's shape"):
        operators.relative_map_backward_(p[:2].clone(), p, row, row, row, *bounds)
    with pytest.raises(RuntimeError, match="a number for each of 3 rows"):
        operators.relative_map_backward_(p.clone(), p, row[:2], row, row, *bounds)
