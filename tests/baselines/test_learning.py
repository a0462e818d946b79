"""Learning some bounds and not others."""

from __future__ import annotations

import pytest
import torch

from harmoq_ao.baselines.base import Budget, activation_quantizers, weight_quantizers
from harmoq_ao.baselines.learning import bounds_replaced, distil_bounds, frozen
from harmoq_ao.config import HarmoqConfig
from tests.baselines.helpers import crops
from tests.models import calibrated


@pytest.mark.parametrize("activations", [True, False])
def test_the_other_kind_of_bounds_stays(activations: bool) -> None:
    prepared = calibrated("forms", HarmoqConfig(3, 3, "paper", joint_scale="none"))
    inputs, rows = activation_quantizers(prepared), weight_quantizers(prepared)
    before = [[q.upper.detach().clone() for q in kind] for kind in (inputs, rows)]
    distil_bounds(prepared, crops(), Budget(2), rate=0.01, activations=activations, weights=not activations)
    same = [
        all(torch.equal(old, q.upper) for old, q in zip(kept, kind, strict=True))
        for kept, kind in zip(before, (inputs, rows), strict=True)
    ]
    assert same == [not activations, activations]
    assert not any(q.upper.requires_grad or q.lower.requires_grad for q in inputs + rows)


def test_replaced_bounds_come_back_even_after_an_error() -> None:
    quantizers = activation_quantizers(calibrated("linears", HarmoqConfig(3, 3, "paper")))
    quantizers[0].learn_bounds()
    seen: list[bool] = []

    def fail() -> None:
        with bounds_replaced(quantizers, frozen):
            seen.append(quantizers[0].bounds()[1].requires_grad)
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert seen == [False]
    assert quantizers[0].bounds()[1].requires_grad
