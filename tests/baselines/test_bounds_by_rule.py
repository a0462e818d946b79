"""MinMax, Percentile and DOBI: the defining property of the bounds they find."""

from __future__ import annotations

import pytest
import torch

from harmoq_ao.config import HarmoqConfig
from harmoq_ao.quant.quantizer import Scheme, fake_quantize
from harmoq_ao.sites.prepared import PreparedLinear
from tests.baselines.helpers import applied, float_operands
from tests.models import images

NAMES = ("forms", "SwinIR/light")


def paper(bits: int) -> HarmoqConfig:
    return HarmoqConfig(bits, bits, "paper")


# --- MinMax -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_minmax_clips_nothing_that_calibration_saw_and_wastes_nothing(name: str) -> None:
    prepared = applied("minmax", name, paper(3))
    for quantizer, values in float_operands(prepared, images(6)).values():
        lo, hi = quantizer.bounds()
        assert (float(lo), float(hi)) == (float(values.min()), float(values.max()))
    for site in prepared.sites():
        if isinstance(site, PreparedLinear):
            assert torch.equal(site.weight_quantizer.bounds()[1], site.weight.abs().amax(1, keepdim=True))


@pytest.mark.parametrize("bits", [3, 8])
def test_minmax_of_convolutions_and_8_bit_weights_loses_half_a_step_at_most(bits: int) -> None:
    prepared = applied("minmax", "forms", HarmoqConfig(bits, bits, "paper", conv_bits=bits))
    for quantizer, values in float_operands(prepared, images(6)).values():
        step, lower = quantizer.calculate_qparams()
        assert float(values.min()) >= float(lower - 0.51 * step)
        assert float(values.max()) <= float(lower + (quantizer.spec.qmax + 0.51) * step)
    for site in prepared.sites():
        if site.site.kind != "matmul":
            step, lower = site.weight_quantizer.calculate_qparams()
            assert bool((site.weight <= lower + (site.weight_quantizer.spec.qmax + 0.51) * step).all())
            assert bool((site.weight >= lower - 0.51 * step).all())


# --- Percentile -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_percentile_clips_its_share_of_every_operand(name: str) -> None:
    prepared = applied("percentile", name, paper(3))
    for label, (quantizer, values) in float_operands(prepared, images(6)).items():
        lo, hi = quantizer.bounds()
        slack = 1e-6 * (hi - lo)
        below, above = (float(outside.float().mean()) for outside in (values < lo - slack, values > hi + slack))
        assert 0.0015 < above < 0.0025, label
        many_equal = float((values == values.min()).float().mean()) > 0.002  # masked attention
        assert below == 0.0 if many_equal else 0.0015 < below < 0.0025, label


# --- DOBI -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [2, 4])
def test_dobi_is_never_worse_than_minmax_and_mostly_much_better(name: str, bits: int) -> None:
    prepared = applied("dobi", name, paper(bits))
    gains = []
    for quantizer, values in float_operands(prepared, images(6)).values():
        pairs = quantizer.bounds(), torch.aminmax(values)
        searched, extreme = (float((fake_quantize(values, a, b, bits) - values).square().mean()) for a, b in pairs)
        assert searched <= 1.02 * extreme
        gains.append(searched / extreme)
    assert sum(gains) / len(gains) < 0.8


@pytest.mark.parametrize("bits", [2, 4])
def test_dobi_weighs_the_error_of_a_row_by_its_inputs(bits: int) -> None:
    prepared = applied("dobi", "SwinIR/light", paper(bits))
    for site in prepared.sites():
        if not isinstance(site, PreparedLinear):
            continue
        assert site.weight_quantizer.spec.scheme is Scheme.SYMMETRIC
        weight, importance = site.weight.detach(), site.act_quantizer.observer.second_moment()
        extreme = weight.abs().amax(1, keepdim=True)
        pairs = site.weight_quantizer.bounds(), (-extreme, extreme)
        searched, plain = ((fake_quantize(weight, a, b, bits) - weight).square() @ importance for a, b in pairs)
        assert bool((searched <= plain * (1 + 1e-5)).all())
