"""Rounding for least output error: on the grid, never worse than the nearest level, bounded by brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harmoq_ao.common.errors import CalibrationError, ConfigError
from harmoq_ao.harmonization.paper.rounding import (
    LearnedRounding,
    edge_magnitude,
    edge_weights,
    gptq_codes,
    gptq_round,
    hessian_error,
    token_hessian,
)
from harmoq_ao.quant.quantizer import dequantize, fake_quantize, quantize, step_size
from tests.strategies import SEEDS, bit_widths, float_tensors, weights


def grid_of(weight: Tensor, bits: int, seed: int) -> tuple[Tensor, Tensor]:
    """Lower values and steps `[m, 1]` that clip some rows and waste levels on others."""
    share = 0.4 + torch.rand(len(weight), 1, generator=torch.Generator().manual_seed(seed))
    hi = share * weight.abs().amax(1, keepdim=True)
    return -hi, step_size(-hi, hi, bits)


def correlated(columns: int, seed: int, tokens: int = 64) -> Tensor:
    """Hessian of tokens whose channels share few directions."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(tokens, max(1, columns // 3), generator=generator)
    mix = torch.randn(few.shape[1], columns, generator=generator)
    return token_hessian(few @ mix + 0.3 * torch.randn(tokens, columns, generator=generator))


def nearest(weight: Tensor, lower: Tensor, step: Tensor, bits: int) -> Tensor:
    return quantize(weight, lower, lower + step * (2**bits - 1), bits)


# --- GPTQ -------------------------------------------------------------------------------------------------------------


@given(weight=weights(), bits=bit_widths(), seed=SEEDS, by_activation=st.booleans(), sweeps=st.integers(0, 2))
def test_codes_are_in_range_and_the_weight_is_on_its_grid(
    weight: Tensor, bits: int, seed: int, by_activation: bool, sweeps: int
) -> None:
    lower, step = grid_of(weight, bits, seed)
    hessian = correlated(weight.shape[1], seed)
    codes = gptq_codes(weight, lower, step, bits, hessian, by_activation=by_activation, sweeps=sweeps)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 2**bits
    rounded = gptq_round(weight, lower, step, bits, hessian, by_activation=by_activation, sweeps=sweeps)
    assert torch.equal(nearest(rounded, lower, step, bits), codes), "the quantizer must reproduce the rounded weight"
    torch.testing.assert_close(rounded, dequantize(codes, lower, lower + step * (2**bits - 1), bits))


@given(weight=weights(), bits=bit_widths(), seed=SEEDS, by_activation=st.booleans())
def test_a_diagonal_hessian_gives_exactly_the_nearest_levels(
    weight: Tensor, bits: int, seed: int, by_activation: bool
) -> None:
    lower, step = grid_of(weight, bits, seed)
    diagonal = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(seed))
    codes = gptq_codes(weight, lower, step, bits, torch.diag(diagonal), by_activation=by_activation)
    assert torch.equal(codes, nearest(weight, lower, step, bits))


@given(weight=weights(), bits=bit_widths(), seed=SEEDS)
def test_no_row_is_worse_than_at_its_nearest_levels_and_sweeps_only_help(weight: Tensor, bits: int, seed: int) -> None:
    lower, step = grid_of(weight, bits, seed)
    hessian = correlated(weight.shape[1], seed)
    plain = nearest(weight, lower, step, bits).double() * step.double() + lower.double()
    errors = [hessian_error(plain - weight.double(), hessian)]
    for sweeps in (0, 1, 3):
        rounded = (
            gptq_codes(weight, lower, step, bits, hessian, sweeps=sweeps).double() * step.double() + lower.double()
        )
        errors.append(hessian_error(rounded - weight.double(), hessian))
    scale = hessian_error(weight, hessian) + errors[0]
    for before, after in itertools.pairwise(errors):
        assert bool((after <= before + 1e-9 * scale).all())


def test_correlated_channels_gain_much() -> None:
    weight = torch.randn(40, 48, generator=torch.Generator().manual_seed(3))
    lower, step = grid_of(weight, 3, 4)
    lower, step = lower.clamp_max(-2.5), step.clamp_min(5.0 / 7)
    hessian = correlated(48, 5)
    plain = fake_quantize(weight, lower, lower + 7 * step, 3)
    rounded = gptq_round(weight, lower, step, 3, hessian)
    refined = gptq_round(weight, lower, step, 3, hessian, sweeps=3)
    base, gptq, swept = (float(hessian_error(w - weight, hessian).mean()) for w in (plain, rounded, refined))
    assert gptq < 0.5 * base
    assert swept < gptq


@settings(max_examples=30)
@given(seed=SEEDS, columns=st.integers(1, 4), by_activation=st.booleans())
def test_brute_force_is_a_bound_and_two_columns_or_a_descent_come_close(
    seed: int, columns: int, by_activation: bool
) -> None:
    """All ``4**K`` roundings of a row at two bits. A sweep ends where no single column can improve."""
    weight = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed))
    lower, step = grid_of(weight, 2, seed)
    hessian = correlated(columns, seed)
    every = torch.tensor(list(itertools.product(range(4), repeat=columns)), dtype=torch.float64)
    swept = gptq_codes(weight, lower, step, 2, hessian, by_activation=by_activation, sweeps=10).double()
    for row in range(3):
        levels = every * step[row].double() + lower[row].double()
        errors = hessian_error(levels - weight[row].double(), hessian)
        mine = swept[row] * step[row].double() + lower[row].double() - weight[row].double()
        error = float(hessian_error(mine[None], hessian))
        assert error >= float(errors.min()) * (1 - 1e-9) - 1e-12
        one_apart = (every != swept[row]).sum(1) == 1
        assert error <= float(errors[one_apart].min()) * (1 + 1e-6) + 1e-12


def test_gptq_finds_the_optimum_of_two_columns_that_cancel() -> None:
    """Two equal channels: only the sum of their weights matters."""
    weight = torch.tensor([[0.4, 0.4]])
    lower, step = torch.tensor([[-1.0]]), torch.tensor([[1.0]])
    hessian = torch.ones(2, 2)
    assert gptq_round(weight, lower, step, 2, hessian).sum() == 1.0
    assert fake_quantize(weight, lower, lower + 3, 2).sum() == 0.0


def test_channels_that_are_never_active_are_rounded_to_the_nearest_level() -> None:
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    lower, step = grid_of(weight, 4, 0)
    hessian = correlated(8, 1)
    hessian[2], hessian[:, 2] = 0.0, 0.0
    codes = gptq_codes(weight, lower, step, 4, hessian, sweeps=1)
    assert torch.equal(codes[:, 2], nearest(weight, lower, step, 4)[:, 2])
    assert torch.equal(gptq_codes(weight, lower, step, 4, torch.zeros(8, 8)), nearest(weight, lower, step, 4))


def test_what_does_not_fit_is_refused() -> None:
    weight, lower, step, hessian = torch.randn(4, 6), torch.zeros(4), torch.ones(4), torch.eye(6)
    with pytest.raises(ConfigError, match="belong together"):
        gptq_round(weight, lower, step, 4, torch.eye(5))
    with pytest.raises(ConfigError, match="belong together"):
        gptq_round(weight, torch.zeros(3), step, 4, hessian)
    with pytest.raises(ConfigError, match="damping"):
        gptq_round(weight, lower, step, 4, hessian, damping=0.0)
    with pytest.raises(CalibrationError, match="not finite"):
        gptq_round(weight, lower, step, 4, hessian * torch.nan)
    with pytest.raises(CalibrationError, match="positive semi-definite"):
        gptq_round(weight, lower, step, 4, torch.diag(torch.tensor([9.0, 9.0, 9.0, 9.0, 9.0, -5.0])))


# --- Hessians ---------------------------------------------------------------------------------------------------------


@given(tokens=float_tensors((20, 5), kinds=("normal", "offset", "sparse")), seed=SEEDS)
def test_the_hessian_norm_is_the_weighted_output_error(tokens: Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    difference = torch.randn(4, 5, generator=generator)
    w = torch.rand(20, generator=generator)
    expected = ((tokens.double() @ difference.double().T) * w[:, None]).square().mean(0)
    torch.testing.assert_close(hessian_error(difference, token_hessian(tokens, w)), expected)
    grid = tokens.reshape(2, 10, 5), w.reshape(2, 10)
    torch.testing.assert_close(token_hessian(*grid), token_hessian(tokens, w))


@given(magnitude=float_tensors(kinds=("one_sided", "heavy", "sparse", "constant")), strength=st.floats(0, 10))
def test_edge_weights_keep_the_mean_square_and_the_order(magnitude: Tensor, strength: float) -> None:
    magnitude = magnitude.abs()
    w = edge_weights(magnitude, strength)
    assert float(w.square().mean()) == pytest.approx(1.0, rel=1e-4)
    order = magnitude.flatten().argsort()
    assert bool((w.flatten()[order].diff() >= -1e-6 * w.max()).all())
    assert torch.equal(edge_weights(magnitude, 0.0), torch.ones_like(magnitude))


def test_edges_are_where_neighbours_differ() -> None:
    grid = torch.zeros(2, 6, 8, 3)
    grid[:, :, 4:] = 1.0
    edges = edge_magnitude(grid)
    assert edges.shape == (2, 6, 8)
    assert bool((edges[:, :, 3:5] == 1.0).all())
    assert float(edges[:, :, :3].max()) == 0.0
    assert float(edges[:, :, 5:].max()) == 0.0


def test_an_edge_weighted_hessian_lowers_the_error_at_edges() -> None:
    generator = torch.Generator().manual_seed(2)
    grid = torch.randn(1, 12, 12, 24, generator=generator).cumsum(2) * 0.2
    grid[:, :, 6:] += torch.randn(24, generator=generator) * 4
    weight = torch.randn(32, 24, generator=generator)
    lower, step = torch.full((32, 1), -2.5), torch.full((32, 1), 5.0 / 7)
    edges = edge_magnitude(grid)
    at_edges = edges > edges.mean()

    def error(hessian: Tensor) -> float:
        rounded = gptq_round(weight, lower, step, 3, hessian, sweeps=3)
        return float((grid @ (rounded - weight).T)[at_edges].square().mean())

    assert error(token_hessian(grid, edge_weights(edges, 8.0))) < error(token_hessian(grid))


def test_hessians_and_edges_of_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="belong"):
        token_hessian(torch.randn(4, 3), torch.ones(5))
    with pytest.raises(CalibrationError, match="no tokens"):
        token_hessian(torch.randn(0, 3))
    with pytest.raises(ConfigError, match="grid"):
        edge_magnitude(torch.randn(4, 3))
    with pytest.raises(ConfigError, match="negative"):
        edge_weights(torch.tensor([1.0, -1.0]))


# --- AdaRound ---------------------------------------------------------------------------------------------------------


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
    assert torch.equal(nearest(rounding.hard(), lower, step, bits), codes.to(torch.uint8))


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
    weight, hessian = torch.randn(16, 24, generator=generator), correlated(24, 2).float()
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
