"""Condition numbers: the proximal step against a numerical minimiser, and what it keeps."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import harmoq_ao as h
from harmoq_ao.common.errors import ConfigError
from harmoq_ao.harmonization.conditioning import condition_number, condition_weights, proximal_step
from harmoq_ao.harmonization.refine import RefineSettings, refine
from harmoq_ao.sites.prepared import PreparedLinear
from tests.models import calibrated, images

shapes = st.tuples(st.integers(1, 6), st.integers(1, 6))


def matrix(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(shapes, st.integers(0, 1000), st.floats(0, 20))
def test_the_step_minimises_its_objective(shape: tuple[int, int], seed: int, strength: float) -> None:
    weight = matrix(shape, seed)
    given_logs = torch.linalg.svdvals(weight).log()
    found = torch.linalg.svdvals(proximal_step(weight, strength)).log()
    found = found - found.mean() + given_logs.mean()  # the norm that is kept is a factor of all of them
    v = given_logs.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([v], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (v - given_logs).square().sum() + strength * (v - v.mean()).square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    torch.testing.assert_close(found, v.detach(), rtol=1e-5, atol=1e-6)


@given(shapes, st.integers(0, 1000), st.floats(0, 20))
def test_the_condition_number_falls_and_norm_and_directions_stay(
    shape: tuple[int, int], seed: int, strength: float
) -> None:
    weight = matrix(shape, seed)
    drawn = proximal_step(weight, strength)
    assert condition_number(drawn) == pytest.approx(condition_number(weight) ** (1 / (1 + strength)), rel=1e-6)
    assert float(drawn.norm()) == pytest.approx(float(weight.norm()), rel=1e-9)
    product = weight.T @ drawn  # the same singular vectors: symmetric
    torch.testing.assert_close(product, product.T, rtol=1e-6, atol=1e-9)


def test_what_is_not_there_stays_away() -> None:
    column, row = matrix((5, 1), 1), matrix((1, 4), 2)
    torch.testing.assert_close(proximal_step(column @ row, 3.0), column @ row)
    assert condition_number(column @ row) == pytest.approx(1.0)
    assert torch.equal(proximal_step(torch.zeros(3, 2), 1.0), torch.zeros(3, 2))


def test_refinement_with_conditioning_ends_at_lower_condition_numbers() -> None:
    config, crops = h.HarmoqConfig(3, 3, profile="paper"), [image[0] for image in images(3, (16, 16))]
    numbers = []
    for strength in (0.0, 0.05):
        prepared = calibrated("SwinIR/light", config)
        refine(prepared, crops, RefineSettings(steps=6, checks=1, warm_up=1, conditioning=strength))
        linears = [site for site in prepared.sites() if isinstance(site, PreparedLinear)]
        numbers.append(
            [condition_number(s.weight * (1.0 if s.joint_scale is None else s.joint_scale)) for s in linears]
        )
    assert all(conditioned < plain for plain, conditioned in zip(*numbers, strict=True))


def test_only_weights_of_linears_change() -> None:
    prepared = calibrated("SwinIR/light", h.HarmoqConfig(3, 3, profile="paper"))
    before = copy.deepcopy(prepared.state_dict())
    condition_weights(prepared.sites(), 1.0)
    own = {f"model.{s.site.path}.weight" for s in prepared.sites() if isinstance(s, PreparedLinear)}
    changed = {name for name, value in prepared.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == own


def test_a_strength_out_of_range_is_refused() -> None:
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ConfigError, match="conditioning"):
            replace(RefineSettings(), conditioning=wrong)
