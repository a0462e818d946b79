"""Searched ranges against the extremes."""

from __future__ import annotations

from hypothesis import given
from torch import Tensor

from harmoq_ao.quant.quantizer import QuantizerSpec, fake_quantize
from tests.quant.observers.helpers import observed
from tests.strategies import float_tensors, static_specs


@given(x=float_tensors((500,)), spec=static_specs())
def test_mse_bounds_are_never_worse_than_min_max(x: Tensor, spec: QuantizerSpec) -> None:
    def error(name: str) -> Tensor:
        lo, hi = observed(name, [x.view(-1, 1)], spec).bounds()
        return (fake_quantize(x, lo, hi, spec.bits) - x).double().square().sum()

    assert error("mse") <= error("minmax") * (1 + 1e-5)
