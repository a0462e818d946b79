"""Learned rounding: starts at the weight, ends at a neighbouring level, and beats the nearest one."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harmoq_ao.baselines.learned_rounding import LearnedRounding
from harmoq_ao.quant.quantizer import fake_quantize, quantize, step_size
from tests.strategies import SEEDS, bit_widths, weights


def grid_of(weight: Tensor, bits: int, seed: int) -> tuple[Tensor, Tensor]:
    """Lower values and steps `[m, 1]` that clip some rows and waste levels on others."""
    share = 0.4 + torch.rand(len(weight), 1, generator=torch.Generator().manual_seed(seed))
    hi = share * weight.abs().amax(1, keepdim=True)
    return -hi, step_size(-hi, hi, bits)


def correlated(columns: int, seed: int, tokens: int = 64) -> Tensor:
    """Second moments of tokens whose channels share few directions, `[columns, columns]`."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(tokens, max(1, columns // 3), generator=generator)
    mix = torch.randn(few.shape[1], columns, generator=generator)
    rows = few @ mix + 0.3 * torch.randn(tokens, columns, generator=generator)
    return rows.T @ rows / tokens


@given(weight=weights(), bits=bit_widths(), seed=SEEDS, data=st.data())
def test_learned_rounding_starts_at_the_weight_and_ends_at_a_neighbouring_level(
    weight: Tensor, bits: int, seed: int, data: st.DataObject
) -> None:
    lower, step = grid_of(weight, bits, seed)
    rounding = LearnedRounding(weight, lower, step, bits)
    hi = lower + step * (2**bits - 1)
    assert bool(((rounding.soft() - weight.clamp(lower, hi)).abs() <= 1e-4 * step + 1e-6 * hi).all())
    generator = torch.Generator().manual_seed(data.draw(SEEDS))
    with torch.no_grad():
        rounding.logits.add_(torch.randn(weight.shape, generator=generator) * 5)
    position = (weight - lower) / step
    codes = ((rounding.hard() - lower) / step).round()
    down, up = ((position.floor() + one).clamp(0, 2**bits - 1) for one in (0, 1))
    assert bool(((codes == down) | (codes == up)).all())
    assert torch.equal(quantize(rounding.hard(), lower, hi, bits), codes.to(torch.uint8))


@given(seed=SEEDS, beta=st.floats(2.0, 20.0))
def test_the_regularizer_is_zero_only_where_all_is_decided(seed: int, beta: float) -> None:
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))
    rounding = LearnedRounding(weight, torch.full((6, 1), -2.0), torch.full((6, 1), 4.0 / 7), 3)
    with torch.no_grad():
        assert 0.0 < float(rounding.regularizer(beta)) <= 1.0
        rounding.logits.copy_(torch.where(weight < 0.0, -10.0, 10.0))
        assert float(rounding.regularizer(beta)) == 0.0


def test_learned_rounding_beats_the_nearest_levels_by_gradients_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, hessian = torch.randn(16, 24, generator=generator), correlated(24, 2)
    lower, step = torch.full((16, 1), -2.5), torch.full((16, 1), 5.0 / 7)
    rounding = LearnedRounding(weight, lower, step, 3)
    optimizer = torch.optim.Adam(rounding.parameters(), lr=0.05)

    def error(w: Tensor) -> Tensor:
        return ((w - weight) @ hessian * (w - weight)).sum()

    start = float(error(fake_quantize(weight, lower, lower + 7 * step, 3)))
    for index in range(200):
        loss = error(rounding.soft()) / start + rounding.regularizer(20.0 - 18.0 * index / 199)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(error(rounding.hard())) < 0.7 * start
