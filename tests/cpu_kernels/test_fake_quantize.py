"""The fake-quantizer in C++ against its formula in torch: values bit for bit, sums of gradients within rounding."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harmoq_ao.quant.operators import operators_for, using
from harmoq_ao.quant.quantizer import bound_gradients, fake_quantize
from tests.strategies import SEEDS, bit_widths


@dataclass(frozen=True)
class Case:
    """An operand and what it is rounded with."""

    x: Tensor
    lo: Tensor
    hi: Tensor
    bits: int
    scale: Tensor | None = None
    shift: Tensor | None = None

    def with_gradients(self, operators: ModuleType | None) -> list[Tensor]:
        """The rounded operand, and the gradients of all tensors."""
        found = (self.x, self.lo, self.hi, self.scale, self.shift)
        leaves = [None if t is None else t.detach().requires_grad_() for t in found]
        x, lo, hi, scale, shift = leaves
        with using(operators):
            y = fake_quantize(x, lo, hi, self.bits, scale, shift)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        return [y.detach(), *torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], upstream)]


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def vector(seed: int, shape: tuple[int, ...], axis: int) -> Tensor:
    """One number for each index of an axis, counted from the end, broadcastable to the shape."""
    return numbers(seed, shape[axis], *(1,) * (-axis - 1))


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values elsewhere in memory."""
    if layout == "transposed":
        return x.mT.contiguous().mT
    return torch.cat([x, torch.full_like(x, torch.nan)], -1)[..., : x.shape[-1]] if layout == "a part" else x


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Operands of every layout; an axis of the joint vectors and one of the bounds, or one number for all."""
    sides = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 33, 64]))
    shape = (*draw(st.lists(st.integers(1, 5), max_size=2)), draw(sides), draw(sides))
    seed, bits = draw(SEEDS), draw(bit_widths())
    x = laid_out(numbers(seed, *shape), draw(st.sampled_from(["whole", "transposed", "a part"])))
    axis = draw(st.sampled_from([None, *range(-len(shape), 0)]))
    lo, hi = torch.tensor(draw(st.sampled_from([-1.3, 0.0, 0.4]))), torch.tensor(0.9)
    if axis is not None:
        lo, hi = -vector(seed + 1, shape, axis).abs(), vector(seed + 2, shape, axis).abs()
    joint = draw(st.sampled_from([None, -1, -2]))
    scale = shift = None
    if joint is not None and draw(st.booleans()):
        scale = vector(seed + 3, shape, joint).abs() + 0.1
    if joint is not None and draw(st.booleans()):
        shift = vector(seed + 4, shape, joint)
    return Case(x, lo, hi, bits, scale, shift)


def assert_same(found: list[Tensor], wanted: list[Tensor], terms: int) -> None:
    """Value and gradient of the operand are equal, sums of so many terms are close."""
    for part, other in zip(found[:2], wanted[:2], strict=True):
        assert torch.equal(part, other)
    for part, other in zip(found[2:], wanted[2:], strict=True):
        torch.testing.assert_close(part, other, rtol=1e-4, atol=1e-4 * terms**0.5)


@given(case=cases())
def test_values_and_gradients(operators: ModuleType, case: Case) -> None:
    assert_same(case.with_gradients(operators), case.with_gradients(None), case.x.numel())


X, LO, HI = numbers(0, 3, 50, 60), torch.tensor(-1.3), torch.tensor(0.9)
WEIGHT, ROWS = numbers(1, 120, 60), numbers(2, 120, 1).abs()
SCALE, SHIFT = numbers(3, 60).abs() + 0.1, numbers(4, 60)
OF_SITES = {
    "input of a linear": Case(X, LO, HI, 4, SCALE, SHIFT),
    "weight of a linear": Case(WEIGHT, -ROWS, ROWS, 4, 1 / SCALE),
    "input of a convolution": Case(numbers(5, 2, 7, 9, 9).to(memory_format=torch.channels_last), LO, HI, 4),
    "weight of a convolution": Case(WEIGHT.reshape(120, 60, 1, 1), -ROWS[..., None, None], ROWS[..., None, None], 4),
    "query": Case(numbers(6, 4, 3, 64, 10), LO, HI, 4, numbers(7, 10).abs() + 0.1),
    "key": Case(numbers(6, 4, 3, 64, 10).mT, LO, HI, 4, numbers(7, 10, 1).abs() + 0.1),
    "longer than a task": Case(numbers(8, 3, 20_000), LO, HI, 4, numbers(9, 20_000).abs() + 0.1),
    "one row that is longer": Case(numbers(8, 60_000), LO, HI, 4),
}


@pytest.mark.parametrize("name", OF_SITES)
def test_operands_of_sites(operators: ModuleType, name: str, threads: None) -> None:
    """None of them is left to torch, and threads are of no consequence."""
    case = OF_SITES[name]
    assert operators.fake_quantize_fits(case.x, case.lo, case.hi, case.scale, case.shift)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(case.with_gradients(operators))
    assert_same(results[0], case.with_gradients(None), case.x.numel())
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e38])
def test_odd_values(operators: ModuleType, value: float) -> None:
    case = Case(torch.full((3, 7), value), LO, HI, 4, torch.full((7,), 0.3))
    found, wanted = case.with_gradients(operators), case.with_gradients(None)
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=0, equal_nan=True)
    if value == value:  # torch takes NaN for clipped in some places of a tensor and not in others
        assert torch.equal(found[1], wanted[1])


def test_a_range_without_width(operators: ModuleType) -> None:
    case = Case(numbers(1, 5, 6), torch.tensor(0.5), torch.tensor(0.5), 4)
    assert_same(case.with_gradients(operators), case.with_gradients(None), 30)


@given(seed=SEEDS, bits=bit_widths())
def test_gradients_of_bounds_alone(operators: ModuleType, seed: int, bits: int) -> None:
    x, grad = numbers(seed, 4, 33), numbers(seed + 1, 4, 33)
    wanted = bound_gradients(grad, x, LO, HI, bits)
    with using(operators):
        found = bound_gradients(grad, x, LO, HI, bits)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


def test_what_is_left_to_torch(operators: ModuleType) -> None:
    with using(operators):
        assert operators_for(X, None, LO) is operators
        for other in (X.double(), X.bfloat16(), X.to("meta")):
            assert operators_for(X, other) is None
        y = fake_quantize(X.bfloat16(), LO, HI, 4)
    assert y.dtype == torch.bfloat16
    assert operators_for(X) is None
    assert not operators.fake_quantize_fits(X, numbers(0, 50, 60), numbers(0, 50, 60), None, None)
    with pytest.raises(RuntimeError, match="an operand that fake_quantize_fits"):
        operators.fake_quantize(X, numbers(0, 50, 60), numbers(0, 50, 60), 4, None, None)
    with pytest.raises(RuntimeError, match="a gradient like the operand"):
        operators.fake_quantize_backward(X[:1], X, LO, HI, 4, None, None)
