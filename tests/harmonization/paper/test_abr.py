"""ABR: what projected descent on the ranges may and may not do."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harmoq_ao.common.errors import ConfigError
from harmoq_ao.harmonization.paper.abr import ABRSettings, BoundaryRefiner, clipped
from harmoq_ao.harmonization.paper.contraction import Contraction, Operand, evaluate, output_error
from harmoq_ao.quant.quantizer import Granularity, QuantizerSpec, Scheme, snap_bounds
from tests.harmonization.paper.contractions import KINDS, bounds_of, explicit, linear, problem, product
from tests.strategies import SEEDS


def refine_bounds(contraction: Contraction, settings: ABRSettings | None = None) -> tuple[Contraction, list[float]]:
    """The contraction with the best bounds, and the objective before and after every update."""
    settings = settings or ABRSettings()
    refiner = BoundaryRefiner(contraction, settings)
    objectives = [refiner.objective]
    for update in range(1, settings.updates + 1 if refiner.can_learn else 1):
        objectives.append(refiner.update())
        if update % settings.review_every == 0 and not refiner.review() and refiner.failures >= settings.patience:
            break
    return refiner.best, objectives


@settings(max_examples=20)
@given(kind=KINDS, bits=st.integers(2, 4), rate=st.sampled_from([1e-3, 5e-2, 1.0]), seed=SEEDS)
def test_refinement_never_ends_above_its_start_and_repeats_itself(kind: str, bits: int, rate: float, seed: int) -> None:
    contraction = problem(kind, seed, bits, free_mean=False)
    config = ABRSettings(rate=rate, last_rate=rate / 100)
    refined, objectives = refine_bounds(contraction, config)
    assert objectives[0] == output_error(contraction)
    assert output_error(refined) == min(objectives)
    again, repeated = refine_bounds(contraction, config)
    assert objectives == repeated
    for mine, other in ((refined.left, again.left), (refined.right, again.right)):
        assert all(torch.equal(a, b) for a, b in zip(mine.bounds, other.bounds, strict=True))


def test_refinement_helps_where_bounds_are_wrong() -> None:
    """Clipped much too hard, or not enough."""
    for contraction in (linear(1, clip=0.25), linear(1, 2, clip=1.8), product(2, clip=0.25), product(2, clip=1.8)):
        refined, _ = refine_bounds(contraction, ABRSettings(updates=60))
        assert output_error(refined) < 0.6 * output_error(contraction)


def test_a_refiner_steps_like_adam_on_the_logarithm_of_the_objective() -> None:
    contraction = linear(3, 4)
    config = ABRSettings(rate=1e-3, last_rate=1e-3, warm_up=0.0, clip=1e9)
    refiner = BoundaryRefiner(contraction, config)
    unit_x, unit_w = (o.bounds[1] - o.bounds[0] for o in (contraction.left, contraction.right))
    free = [(b / unit_x).clone().requires_grad_() for b in contraction.left.bounds]
    width = torch.ones_like(unit_w, requires_grad=True)
    adam = torch.optim.Adam([*free, width], lr=1e-3)
    present = contraction
    for _ in range(4):
        adam.zero_grad()
        half = width * unit_w / 2
        bounds = [f * unit_x for f in free]
        explicit(present, bounds, [-half, half]).log().backward()
        adam.step()
        refiner.update()
        left = replace(contraction.left, bounds=tuple((f * unit_x).detach() for f in free))
        half = (width * unit_w / 2).detach()
        present = replace(contraction, left=left, right=replace(contraction.right, bounds=(-half, half)))
        for mine, other in ((refiner._place.left, present.left), (refiner._place.right, present.right)):
            torch.testing.assert_close(mine.bounds, other.bounds, rtol=1e-6, atol=1e-9)


@given(seed=SEEDS, rate=st.sampled_from([0.2, 1.0]), bits=st.integers(2, 4))
def test_every_place_is_feasible(seed: int, rate: float, bits: int) -> None:
    contraction = linear(seed, bits)
    config = ABRSettings(rate=rate, last_rate=rate, warm_up=0.0, gap=0.05)
    refiner = BoundaryRefiner(contraction, config)
    starts = [o.bounds[1] - o.bounds[0] for o in (contraction.left, contraction.right)]
    for _ in range(8):
        refiner.update()
        for operand, start in zip((refiner._place.left, refiner._place.right), starts, strict=True):
            lo, hi = bounds_of(operand)
            assert bool((hi - lo >= 0.05 * start * (1 - 1e-9)).all())


@given(bits=st.integers(2, 8), seed=SEEDS)
def test_a_tied_scheme_is_never_left(bits: int, seed: int) -> None:
    """Symmetric bounds stay symmetric; an integer zero point stays where it is."""
    contraction = linear(seed, bits)
    symmetric, _ = refine_bounds(contraction, ABRSettings(updates=6))
    assert torch.equal(symmetric.right.bounds[0], -symmetric.right.bounds[1])
    spec = QuantizerSpec(bits, Scheme.INTEGER_ZERO_POINT, Granularity.PER_CHANNEL, axis=0)
    hi = contraction.right.bounds[1].float()
    middle = spec.levels // 2
    bounds = snap_bounds(-hi * middle / (middle - 1), hi, spec)
    right = replace(contraction.right, spec=spec, bounds=bounds)
    refined, _ = refine_bounds(replace(contraction, right=right), ABRSettings(updates=6))
    lo, hi = bounds_of(refined.right)
    assert torch.equal(torch.round(-lo * spec.qmax / (hi - lo)), torch.full_like(lo, middle))
    assert all(torch.equal(a, b) for a, b in zip(snap_bounds(lo, hi, spec), (lo, hi), strict=True))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["dynamic", "float"])
def test_only_static_bounds_are_refined(side: str, kind: str) -> None:
    contraction = product(4, 2)
    axis = -1 if side == "left" else -2
    dynamic = QuantizerSpec(2, granularity=Granularity.PER_TOKEN, dynamic=True, axis=axis)
    operand = replace(getattr(contraction, side), spec=dynamic if kind == "dynamic" else None, bounds=None)
    contraction = replace(contraction, **{side: operand})
    assert getattr(evaluate(contraction), side) is None
    refined, objectives = refine_bounds(contraction)
    assert getattr(refined, side) is operand
    assert min(objectives) < objectives[0]


def test_nothing_to_refine_is_left_alone() -> None:
    contraction = replace(product(5), left=Operand(torch.ones(1, 2, 3)), right=Operand(torch.ones(1, 3, 2)))
    contraction = replace(contraction, target=torch.zeros(1, 2, 2))
    refined, objectives = refine_bounds(contraction)
    assert refined is contraction
    assert objectives == [9.0]


def test_a_row_without_range_stays_finite() -> None:
    contraction = linear(6, 3)
    hi = contraction.right.bounds[1].clone()
    hi[0, 2] = 0.0
    values = contraction.right.values.clone()
    values[..., 2] = 0.0
    contraction = replace(contraction, right=replace(contraction.right, values=values, bounds=(-hi, hi)))
    refined, objectives = refine_bounds(contraction)
    assert all(map(math.isfinite, objectives))
    assert all(bool(b.isfinite().all()) for b in refined.right.bounds)


@given(seed=SEEDS, limit=st.floats(0.1, 10.0))
def test_gradients_are_clipped_together(seed: int, limit: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(3, 2, generator=generator), torch.randn((), generator=generator)]
    result = clipped(gradients, limit)
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    scale = min(1.0, limit / float(norm))
    for mine, given_ in zip(result, gradients, strict=True):
        torch.testing.assert_close(mine, given_ * scale)


@pytest.mark.parametrize(
    "bad",
    [{"updates": -1}, {"rate": 0.0}, {"rate": 1e-3, "last_rate": 1e-2}, {"clip": 0.0}, {"gap": 0.0}, {"patience": 0}],
    ids=str,
)
def test_settings_are_checked(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="out of range"):
        ABRSettings(**bad)
