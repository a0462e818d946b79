"""CondiQuant: the proximal step against a numerical minimiser, descent, and what the method changes."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harmoq_ao.baselines.condiquant import (
    condition_number,
    condition_weights,
    conditioned,
    input_moments,
    objective,
    proximal_step,
)
from harmoq_ao.config import HarmoqConfig
from harmoq_ao.harmonization.distillation import held_out_psnr
from harmoq_ao.harmonization.teacher import Teacher
from harmoq_ao.sites.base import quiet
from harmoq_ao.sites.prepared import PreparedLinear
from tests.baselines.helpers import applied, changed, crops
from tests.models import images, prepare

shapes = st.tuples(st.integers(1, 5), st.integers(1, 5))
strengths = st.floats(0, 10)


def matrix(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spread(weight: Tensor) -> Tensor:
    values = torch.linalg.svdvals(weight)
    return (values - values.mean()).square().sum()


@given(shapes, st.integers(0, 1000), strengths)
def test_the_proximal_step_is_where_a_numerical_minimiser_ends(
    shape: tuple[int, int], seed: int, strength: float
) -> None:
    """Over all matrices, from another start."""
    weight = matrix(shape, seed)

    def distance(v: Tensor) -> Tensor:
        return 0.5 * ((v - weight).square().sum() + strength * spread(v))

    v = (weight + 0.1 * matrix(shape, seed + 1)).requires_grad_()
    optimizer = torch.optim.LBFGS([v], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = distance(v)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    found = proximal_step(weight, strength)
    assert float(distance(found)) <= float(distance(v.detach())) + 1e-9
    assert float(distance(v.detach())) <= float(distance(found)) + 1e-4 * (1 + float(distance(found)))


@given(shapes, st.integers(0, 1000), st.floats(0.01, 10))
def test_the_proximal_step_lowers_the_condition_number_and_keeps_directions(
    shape: tuple[int, int], seed: int, strength: float
) -> None:
    weight = matrix(shape, seed)
    found = proximal_step(weight, strength)
    assert condition_number(found) <= condition_number(weight) * (1 + 1e-9)
    before, after = torch.linalg.svdvals(weight), torch.linalg.svdvals(found)
    torch.testing.assert_close(after.mean(), before.mean())
    torch.testing.assert_close(after - after.mean(), (before - before.mean()) / (1 + strength))
    product = weight.T @ found  # the same singular vectors: symmetric
    torch.testing.assert_close(product, product.T, rtol=1e-6, atol=1e-9)


@given(shapes, st.integers(0, 1000), strengths)
def test_no_step_of_the_descent_raises_the_objective(shape: tuple[int, int], seed: int, strength: float) -> None:
    weight, inputs = matrix(shape, seed), matrix((7, shape[1]), seed + 1)
    moment = inputs.T @ inputs
    values = [objective(conditioned(weight, moment, strength, n), weight, moment, strength) for n in range(6)]
    assert all(after <= before * (1 + 1e-9) + 1e-12 for before, after in pairwise(values))


def test_where_inputs_have_deficient_rank_outputs_stay_and_the_condition_number_falls() -> None:
    left, _ = torch.linalg.qr(matrix((8, 8), 1))
    weight = left @ torch.diag(torch.tensor([1.0] * 4 + [1e-3] * 4).double())
    inputs = torch.cat([matrix((50, 4), 2), torch.zeros(50, 4).double()], 1)
    found = conditioned(weight, inputs.T @ inputs, strength=0.1, steps=200)
    assert condition_number(found) < 0.01 * condition_number(weight)
    assert ((found - weight) @ inputs.T).norm() < 0.1 * (weight @ inputs.T).norm()


def test_inputs_that_are_always_zero_change_nothing() -> None:
    weight = matrix((3, 4), 1)
    assert torch.equal(conditioned(weight, torch.zeros(4, 4).double()), weight)


def test_moments_are_those_of_what_the_float_layers_see() -> None:
    prepared = prepare("linears", HarmoqConfig(4, 4, "paper"))
    site = next(s for s in prepared.sites() if isinstance(s, PreparedLinear))
    seen: list[Tensor] = []
    with quiet():
        prepared(images(1)[0])
        handle = site.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2).double()))
        for crop in crops(2):
            prepared(crop[None])
        handle.remove()
    rows = torch.cat(seen)
    torch.testing.assert_close(input_moments(prepared, [site], crops(2))[id(site.weight)], rows.T @ rows)


def test_only_weights_of_linear_layers_change() -> None:
    prepared = prepare("SwinIR/light", HarmoqConfig(3, 3, "paper"))
    before = copy.deepcopy(prepared)
    condition_weights(prepared, crops(2), show_progress=False)
    own = {f"model.{s.site.path}.weight" for s in prepared.sites() if isinstance(s, PreparedLinear)}
    found = changed(before, prepared)
    assert found
    assert found <= own
    for old, new in zip(before.sites(), prepared.sites(), strict=True):
        if isinstance(new, PreparedLinear):
            assert condition_number(new.weight) < condition_number(old.weight)


@pytest.mark.parametrize("bits", [2, 4])
def test_it_comes_closer_to_the_float_network_on_images_it_did_not_see(bits: int) -> None:
    config = HarmoqConfig(bits, bits, "paper")
    teacher = Teacher(prepare("forms", config)).exact
    held_out = [image[0] for image in images(3, seed=77)]
    before, after = (applied("condiquant", "forms", config, steps=steps) for steps in (0, 24))
    with torch.no_grad():
        targets = [(image, teacher.image(image[None])) for image in held_out]
        scores = [held_out_psnr(model, targets, held_out[0]) for model in (before, after)]
    assert scores[1] > scores[0] + 0.1


def test_without_steps_it_is_dobi() -> None:
    config = HarmoqConfig(3, 3, "paper")
    assert not changed(applied("dobi", "forms", config), applied("condiquant", "forms", config, steps=0))
