"""Learning some bounds and not others."""

from __future__ import annotations

import pytest
import torch

from harmoq_ao.baselines.base import Budget, activation_quantizers, weight_quantizers
from harmoq_ao.baselines.learning import distil_bounds, fixed_ranges
from harmoq_ao.config import HarmoqConfig
from harmoq_ao.harmonization.learner import Learner
from harmoq_ao.harmonization.settings import Rates
from tests.baselines.helpers import crops
from tests.models import calibrated


@pytest.mark.parametrize("activations", [True, False])
def test_the_other_kind_of_bounds_stays(activations: bool) -> None:
    prepared = calibrated("forms", HarmoqConfig(3, 3, "paper", joint_scale="none"))
    inputs, rows = activation_quantizers(prepared), weight_quantizers(prepared)
    before = [[q.upper.detach().clone() for q in kind] for kind in (inputs, rows)]
    distil_bounds(prepared, crops(), Budget(2), method="", rate=0.01, activations=activations, weights=not activations)
    same = [
        all(torch.equal(old, q.upper) for old, q in zip(kept, kind, strict=True))
        for kept, kind in zip(before, (inputs, rows), strict=True)
    ]
    assert same == [not activations, activations]
    assert not any(q.upper.requires_grad or q.lower.requires_grad for q in inputs + rows)


def test_fixed_ranges_can_be_learned_again_even_after_an_error() -> None:
    prepared = calibrated("linears", HarmoqConfig(3, 3, "paper"))
    fixed = activation_quantizers(prepared)
    learned: list[int] = []

    def count() -> None:
        learned.append(len(Learner(prepared.sites(), Rates(scales=0, weights=0), 1).parameters))

    def fail() -> None:
        with fixed_ranges(fixed):
            count()
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    count()
    assert learned[1] == learned[0] + 2 * len(fixed)
