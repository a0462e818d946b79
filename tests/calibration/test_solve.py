"""Solved sites: qparams from statistics, switches, and joint scales that leave the float function alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import harmoq_ao as h
from harmoq_ao.calibration.solve import disable_observers, enable_observers, has_qparams
from harmoq_ao.common.errors import CalibrationError
from harmoq_ao.config import HarmoqConfig
from harmoq_ao.sites.base import PreparedSite
from harmoq_ao.sites.prepared import PreparedMatmul
from tests.calibration.helpers import DEPLOY, NAMES, PAPER, assert_same
from tests.models import build, calibrated, images, prepare, run
from tests.strategies import SEEDS


def test_enable_fake_quant_settles_what_forward_calls_observed() -> None:
    by_hand = prepare("linears", PAPER)
    for image in images(3):
        run(by_hand, image)
    assert not has_qparams(by_hand)
    h.enable_fake_quant(by_hand)
    assert_same(by_hand, calibrated("linears", PAPER))


@pytest.mark.parametrize("settle", [h.compute_qparams, h.enable_fake_quant])
def test_nothing_is_settled_without_data(settle: Any) -> None:
    with pytest.raises(CalibrationError, match="saw no calibration data") as caught:
        settle(prepare("linears", PAPER))
    assert "calibrate" in str(caught.value.remedy)


@pytest.mark.parametrize("config", [PAPER, DEPLOY], ids=["paper", "deploy"])
@pytest.mark.parametrize("name", NAMES)
def test_fake_quantization_switches_off_bit_for_bit_and_on_again(name: str, config: HarmoqConfig) -> None:
    prepared, original = calibrated(name, config), build(name)
    rounded = run(prepared)
    h.disable_fake_quant(prepared)
    assert torch.equal(run(prepared), run(original))
    assert not torch.equal(rounded, run(original))
    h.enable_fake_quant(prepared)
    assert torch.equal(run(prepared), rounded)


def test_observing_does_not_change_the_function() -> None:
    prepared, original = calibrated("forms", PAPER), build("forms")
    h.disable_fake_quant(prepared)
    enable_observers(prepared)
    assert torch.equal(run(prepared), run(original))
    disable_observers(prepared)
    seen = [q.observer.rows_seen for m in prepared.sites() for q in m.quantizers() if q.observer is not None]
    run(prepared)
    assert seen == [q.observer.rows_seen for m in prepared.sites() for q in m.quantizers() if q.observer is not None]


def _scaled_without_rounding(prepared: h.PreparedModel, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Output in float64 with the joint scales applied and no operand rounded."""
    h.disable_fake_quant(prepared)
    with monkeypatch.context() as patch:
        patch.setattr(PreparedSite, "_active", lambda self: bool(self.quantizers()))
        return run(prepared.double(), images(1, seed=99)[0].double())


@pytest.mark.parametrize("name", NAMES)
def test_calibrated_joint_scales_do_not_change_the_float_function(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = calibrated(name, HarmoqConfig(4, 4, "paper"))
    scales = [m.joint_scale for m in prepared.sites() if m.joint_scale is not None]
    assert any(float(s.max() / s.min()) > 1.5 for s in scales)
    expected = run(build(name).double(), images(1, seed=99)[0].double())
    torch.testing.assert_close(_scaled_without_rounding(prepared, monkeypatch), expected, rtol=1e-9, atol=1e-10)


@settings(max_examples=15)
@given(SEEDS)
def test_no_vector_joint_scale_changes_the_float_function(seed: int) -> None:
    prepared = calibrated("forms", PAPER)
    generator = torch.Generator().manual_seed(seed)
    for module in prepared.sites():
        if module.joint_scale is not None:
            module.set_joint_scale(torch.exp(3 * torch.randn(module.joint_scale.shape, generator=generator)))
    expected = run(build("forms").double(), images(1, seed=99)[0].double())
    with pytest.MonkeyPatch.context() as patch:
        actual = _scaled_without_rounding(prepared, patch)
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)


def test_joint_scales_are_where_they_are_defined() -> None:
    for module in calibrated("SwinIR/light", PAPER).sites():
        expected = module.site.kind == "linear" or module.site.role == "query-key"
        assert (module.joint_scale is not None) == expected
    for module in calibrated("SwinIR/light", HarmoqConfig(4, 4, "paper", joint_scale="none")).sites():
        assert module.joint_scale is None


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse", "histogram"])
@pytest.mark.parametrize("joint_scale", ["hso", "none"])
def test_every_observer_works_with_every_joint_scale(observer: Any, joint_scale: Any) -> None:
    prepared = calibrated("SwinIR/light", HarmoqConfig(6, 6, "paper", observer=observer, joint_scale=joint_scale))
    scaled = [m for m in prepared.sites() if m.joint_scale is not None]
    assert bool(scaled) == (joint_scale != "none" and observer != "histogram")
    torch.testing.assert_close(run(prepared), run(build("SwinIR/light")), rtol=0, atol=0.1)


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse", "histogram"])
def test_static_bounds_lie_within_what_was_seen(observer: Any) -> None:
    prepared = calibrated("SwinIR/light", HarmoqConfig(8, 8, "paper", observer=observer, joint_scale="none"))
    for module in prepared.sites():
        quantizer = module.act_quantizer
        assert quantizer is not None
        assert quantizer.observer is not None
        lo, hi = (float(v) for v in quantizer.bounds())
        if isinstance(module, PreparedMatmul) and module.relative:
            assert (lo, hi) == pytest.approx((0.0, 1.0), abs=1e-4)
            continue
        low, high = (float(v) for v in quantizer.observer.value_range())
        margin = 0.02 * (high - low)  # the search may move the end levels outwards
        assert low - margin <= lo < hi <= high + margin
        assert observer != "minmax" or (lo, hi) == pytest.approx((low, high), abs=margin)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_more_bits_are_closer_to_float(bits: int) -> None:
    original = run(build("SwinIR/light"))

    def error(width: int) -> float:
        return float((run(calibrated("SwinIR/light", HarmoqConfig(width, width, "paper"))) - original).square().mean())

    assert error(bits) < error(bits - 1) if bits > 2 else error(bits) > 0
