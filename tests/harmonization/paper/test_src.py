"""SRC: both closed forms against numerical minimisers of their objectives, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harmoq_ao.common.errors import CalibrationError, ConfigError
from harmoq_ao.harmonization.paper.projections import SPATIAL_FILTERS, TokenGrid, filtered, learned_basis, random_basis
from harmoq_ao.harmonization.paper.src import STABILISER, ResidualStatistics, SRCSettings, ridge_regression
from tests.strategies import SEEDS

GRID = TokenGrid(2, 9, 8)
RIDGES = st.sampled_from([0.0, 1e-3, 1e-2, 1.0])


def layer(seed: int, channels: int = 6, outputs: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """A weight `[m, K]`, float inputs `[2, 72, K]` and what the layer is given instead: rounded, shifted, noisy."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, channels, generator=generator, dtype=torch.float64)
    mix = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    x = torch.randn(*(GRID[0], GRID[1] * GRID[2]), channels, generator=generator, dtype=torch.float64) @ mix + 2.0
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return weight, x, (x * 0.8).round() + 0.2 * noise


def solved(config: SRCSettings, weight: Tensor, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Change of weight and bias after one sample."""
    statistics = ResidualStatistics(config)
    statistics.update(z, x, GRID)
    return statistics.solve(weight)


def least_squares(rows: list[Tensor], targets: list[Tensor], penalty: float, free: int) -> Tensor:
    """Minimiser over A of ``sum |rows A^T - targets|^2 + penalty |A|^2``, the last `free` columns not penalised."""
    width = rows[0].shape[1]
    ridge = math.sqrt(penalty) * torch.eye(width, dtype=torch.float64)[: width - free]
    stacked = torch.cat([*rows, ridge])
    wanted = torch.cat([*targets, torch.zeros(len(ridge), targets[0].shape[1], dtype=torch.float64)])
    return torch.linalg.lstsq(stacked, wanted).solution.T


def rows_of(values: Tensor, weight: float = 1.0, ones: bool = False) -> Tensor:
    """Rows so scaled that a sum of squares is `weight` times a mean, with a column for the bias."""
    column = torch.full((len(values), 1), 1.0 if ones else 0.0, dtype=torch.float64)
    return torch.cat((values, column), 1) * math.sqrt(weight / len(values))


@given(
    name=st.sampled_from([*SPATIAL_FILTERS, "identity"]), mu=st.sampled_from([0.3, 1.0, 4.0]), ridge=RIDGES, seed=SEEDS
)
def test_a_filter_in_space_solves_its_stacked_regression(name: str, mu: float, ridge: float, seed: int) -> None:
    """``min |W d + dW z + b|^2 + mu^2 |F (W d + dW z)|^2 + l |dW|^2`` over dW and b at once, by least squares."""
    weight, x, z = layer(seed)
    delta, shift = solved(SRCSettings(name, mu, ridge), weight, z, x)
    flat_z, error = z.flatten(0, 1), ((z - x) @ weight.T).flatten(0, 1)
    rows, targets = [rows_of(flat_z, ones=True)], [-error / math.sqrt(len(error))]
    centred = flat_z - flat_z.mean(0)
    power = centred.square().mean()
    if name != "identity":
        edges, edge_error = filtered(name, z, GRID), filtered(name, (z - x) @ weight.T, GRID)
        rows.append(rows_of(edges, mu**2))
        targets.append(-edge_error * mu / math.sqrt(len(edges)))
        power = power + mu**2 * edges.square().mean()
    expected = least_squares(rows, targets, (ridge + STABILISER) * float(power), free=1)
    torch.testing.assert_close(delta, expected[:, :-1], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(shift, expected[:, -1], rtol=1e-6, atol=1e-8)


@given(name=st.sampled_from([*SPATIAL_FILTERS]), ridge=RIDGES, seed=SEEDS)
def test_the_printed_form_regresses_filtered_float_inputs(name: str, ridge: float, seed: int) -> None:
    weight, x, z = layer(seed)
    delta, shift = solved(SRCSettings.printed(name, ridge), weight, z, x)
    edges, error = filtered(name, x, GRID), filtered(name, (z - x) @ weight.T, GRID)
    count = math.sqrt(len(edges))
    penalty = (ridge + STABILISER) * float(edges.square().mean())
    expected = least_squares([edges / count], [-error / count], penalty, free=0)
    torch.testing.assert_close(delta, expected, rtol=1e-6, atol=1e-8)
    assert bool((shift == 0).all())


@settings(max_examples=15)
@given(name=st.sampled_from(["learned", "random"]), size=st.integers(1, 6), ridge=RIDGES, seed=SEEDS)
def test_a_projection_of_channels_minimises_over_its_row_space(name: str, size: int, ridge: float, seed: int) -> None:
    """``min E|W d + A H z|^2 + l |A|^2`` over A, by quasi-Newton steps from zero."""
    weight, x, z = layer(seed)
    delta, _ = solved(SRCSettings(name, ridge=ridge, subspace=size), weight, z, x)
    flat, error = z.flatten(0, 1), ((z - x) @ weight.T).flatten(0, 1)
    flat, error = flat - flat.mean(0), error - error.mean(0)
    gram = flat.T @ flat / len(flat)
    basis = learned_basis(gram, size) if name == "learned" else random_basis(6, size)
    projected = flat @ basis.T
    penalty = (ridge + STABILISER) * projected.square().mean()
    A = torch.zeros(4, size, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [A], max_iter=500, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (error + projected @ A.T).square().sum(1).mean() + penalty * A.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    torch.testing.assert_close(delta, A.detach() @ basis, rtol=1e-4, atol=1e-6)


@given(seed=SEEDS)
def test_a_subspace_of_all_channels_is_no_restriction(seed: int) -> None:
    weight, x, z = layer(seed)
    whole = solved(SRCSettings("identity"), weight, z, x)[0]
    for name in ("learned", "random"):
        torch.testing.assert_close(solved(SRCSettings(name, subspace=6), weight, z, x)[0], whole)
    smaller = solved(SRCSettings("learned", subspace=2), weight, z, x)[0]
    assert torch.linalg.matrix_rank(smaller, rtol=1e-9) == 2


@given(name=st.sampled_from(["laplacian", "learned", "identity"]), seed=SEEDS)
def test_a_large_ridge_leaves_the_weight_alone(name: str, seed: int) -> None:
    weight, x, z = layer(seed)
    sizes = [float(solved(SRCSettings(name, ridge=r), weight, z, x)[0].norm()) for r in (0.0, 1.0, 1e3, 1e9)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 1e-7 * sizes[0]


@given(seed=SEEDS)
def test_a_linear_distortion_is_undone(seed: int) -> None:
    """Where z is an invertible affine image of x, nothing of the error is left."""
    weight, x, _ = layer(seed)
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(6, dtype=torch.float64) + 0.1 * torch.randn(6, 6, generator=generator, dtype=torch.float64)
    z = x @ mix + 3.0
    delta, shift = solved(SRCSettings("laplacian", ridge=0.0), weight, z, x)
    output = z @ (weight + delta).T + shift
    wanted = x @ weight.T
    assert float((output - wanted).square().mean()) < 1e-5 * float(wanted.square().mean())


@given(name=st.sampled_from(["laplacian", "learned"]), seed=SEEDS)
def test_the_bias_keeps_the_mean_of_the_output(name: str, seed: int) -> None:
    weight, x, z = layer(seed)
    delta, shift = solved(SRCSettings(name, ridge=0.3), weight, z, x)
    torch.testing.assert_close((z @ (weight + delta).T + shift).mean((0, 1)), (x @ weight.T).mean((0, 1)))


def test_without_a_grid_a_filter_is_left_out() -> None:
    weight, x, z = layer(0)
    statistics = ResidualStatistics(SRCSettings("laplacian"))
    statistics.update(z, x, None)
    assert not statistics.filtered
    torch.testing.assert_close(statistics.solve(weight).delta, solved(SRCSettings("identity"), weight, z, x)[0])


def test_a_layer_without_error_is_left_alone() -> None:
    weight, x, _ = layer(1)
    delta, shift = solved(SRCSettings(), weight, x, x)
    assert float(delta.abs().max()) == 0.0
    assert float(shift.abs().max()) == 0.0


def test_the_result_has_the_type_of_the_weight() -> None:
    weight, x, z = (t.float() for t in layer(2))
    delta, shift = solved(SRCSettings(), weight, z, x)
    assert delta.dtype == shift.dtype == torch.float32


def test_moments_that_are_not_quite_positive_are_stabilised() -> None:
    gram = torch.diag(torch.tensor([1.0, 1.0, -1e-5], dtype=torch.float64))
    result = ridge_regression(torch.ones(2, 3, dtype=torch.float64), gram, 0.0)
    assert bool(result.isfinite().all())
    torch.testing.assert_close(result[:, :2], torch.ones(2, 2, dtype=torch.float64), rtol=1e-3, atol=0)


def test_moments_of_nothing_give_zeros() -> None:
    zeros = ridge_regression(torch.zeros(2, 3), torch.zeros(3, 3), 1e-2)
    assert torch.equal(zeros, torch.zeros(2, 3))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_moments_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(CalibrationError, match="not finite"):
        ridge_regression(torch.ones(2, 3), torch.full((3, 3), bad), 1e-2)
    with pytest.raises(CalibrationError, match="not positive semidefinite"):
        ridge_regression(torch.ones(2, 2), torch.tensor([[1.0, 5.0], [5.0, 1.0]]), 0.0)


@pytest.mark.parametrize(
    "bad",
    [
        {"projection": "prewitt"},
        {"ridge": -1.0},
        {"ridge": math.inf},
        {"edge_weight": 0.0},
        {"subspace": 0},
        {"warm_up": 0},
    ],
    ids=str,
)
def test_settings_are_checked(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        SRCSettings(**bad)
