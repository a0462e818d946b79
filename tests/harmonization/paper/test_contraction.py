"""The objective of one contraction: Theorem 3 against autograd and finite differences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from harmoq_ao.harmonization.paper.contraction import Operand, error_balance, evaluate, output_error
from harmoq_ao.quant.quantizer import fake_quantize
from tests.harmonization.paper.contractions import KINDS, bounds_of, codes_of, explicit, problem
from tests.strategies import SEEDS, bit_widths


@given(kind=KINDS, bits=bit_widths(), free_mean=st.booleans(), seed=SEEDS)
def test_theorem_three_is_the_derivative_at_fixed_codes(kind: str, bits: int, free_mean: bool, seed: int) -> None:
    contraction = problem(kind, seed, bits, free_mean)
    left, right = ([b.clone().requires_grad_() for b in o.bounds] for o in (contraction.left, contraction.right))
    loss = explicit(contraction, left, right)
    loss.backward()
    result = evaluate(contraction)
    assert result.objective == pytest.approx(loss.item(), rel=1e-9)
    for gradient, bounds in ((result.left, left), (result.right, right)):
        torch.testing.assert_close(gradient.lo, bounds[0].grad, rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(gradient.hi, bounds[1].grad, rtol=1e-7, atol=1e-10)


@given(kind=KINDS, bits=bit_widths(), side=st.sampled_from(["left", "right"]), end=st.sampled_from([0, 1]), seed=SEEDS)
def test_theorem_three_is_what_finite_differences_measure(kind: str, bits: int, side: str, end: int, seed: int) -> None:
    contraction = problem(kind, seed, bits, free_mean=False)
    operand: Operand = getattr(contraction, side)
    gradient = getattr(evaluate(contraction), side)[end].flatten()[0]
    step = 1e-6 * float((operand.bounds[1] - operand.bounds[0]).max())
    objectives, codes = [], []
    for sign in (1, -1):
        moved = [b.clone() for b in operand.bounds]
        moved[end].view(-1)[0] += sign * step
        other = replace(operand, bounds=(moved[0], moved[1]))
        codes.append(codes_of(other))
        objectives.append(output_error(replace(contraction, **{side: other})))
    assume(torch.equal(*codes))
    measured = (objectives[0] - objectives[1]) / (2 * step)
    assert measured == pytest.approx(float(gradient), rel=1e-3, abs=1e-6)


@given(kind=KINDS, bits=bit_widths(), seed=SEEDS)
def test_the_objective_is_that_of_the_simulated_layer(kind: str, bits: int, seed: int) -> None:
    contraction = problem(kind, seed, bits, free_mean=False)
    left, right = (
        fake_quantize(o.values, bounds_of(o)[0], bounds_of(o)[1], o.spec.bits, o.scale, o.shift)
        for o in (contraction.left, contraction.right)
    )
    expected = float((left @ right - contraction.target).square().mean())
    assert output_error(contraction) == pytest.approx(expected, rel=1e-12)


@given(kind=KINDS, bits=bit_widths(), seed=SEEDS)
def test_the_balance_is_the_error_of_one_operand_at_a_time(kind: str, bits: int, seed: int) -> None:
    contraction = problem(kind, seed, bits, free_mean=False)
    exact = contraction.left.scaled() @ contraction.right.scaled()
    only_left = replace(contraction, right=replace(contraction.right, spec=None, bounds=None), target=exact)
    only_right = replace(contraction, left=replace(contraction.left, spec=None, bounds=None), target=exact)
    assert error_balance(contraction) == pytest.approx((output_error(only_left), output_error(only_right)), rel=1e-6)
