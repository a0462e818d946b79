"""Calibration: the same as forward calls, on bounded memory, and nothing but quantization changes the function."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import harmoq_ao as h
from harmoq_ao.calibration.calibrate import image_of
from harmoq_ao.calibration.solve import disable_observers, enable_observers, has_qparams
from harmoq_ao.common.errors import CalibrationError, ConfigError, InputError
from harmoq_ao.config import HarmoqConfig
from harmoq_ao.sites.base import PreparedSite
from tests.models import build, calibrated, images, prepare, run
from tests.strategies import SEEDS

PAPER = HarmoqConfig(4, 4, "paper")
DEPLOY = HarmoqConfig(8, 8)
NAMES = ("forms", "SwinIR/light", "DAT")


def _facts(prepared: h.PreparedModel) -> dict[str, Tensor]:
    """Joint scales and bounds by site, and the reported ratio."""
    facts: dict[str, Tensor] = {}
    for module in prepared.sites():
        facts |= {f"{module.site.name} {name}": p for name, p in module.named_parameters() if "er" in name}
        if module.joint_scale is not None:
            facts[f"{module.site.name} s"] = module.joint_scale
        if module.site.sqnr_db is not None:
            facts[f"{module.site.name} dB"] = torch.tensor(module.site.sqnr_db)
    return facts


def _assert_same(first: h.PreparedModel, second: h.PreparedModel) -> None:
    one, two = _facts(first), _facts(second)
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


# --- what calibration is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_calibrate_equals_forward_calls_and_compute_qparams(name: str) -> None:
    called = h.calibrate(prepare(name, PAPER), images(3))
    by_hand = prepare(name, PAPER)
    for image in images(3):
        run(by_hand, image)
    h.compute_qparams(by_hand)
    h.enable_fake_quant(by_hand)
    _assert_same(called, by_hand)
    assert torch.equal(run(called), run(by_hand))


def test_enable_fake_quant_settles_what_forward_calls_observed() -> None:
    by_hand = prepare("linears", PAPER)
    for image in images(3):
        run(by_hand, image)
    assert not has_qparams(by_hand)
    h.enable_fake_quant(by_hand)
    _assert_same(by_hand, calibrated("linears", PAPER))


def test_calibrate_returns_the_model_it_was_given_with_observers_off() -> None:
    prepared = prepare("linears", PAPER)
    assert h.calibrate(prepared, images(2)) is prepared
    quantizers = [q for m in prepared.sites() for q in m.quantizers()]
    assert quantizers
    assert all(q.fake_quant_enabled[0] and not q.observer_enabled[0] for q in quantizers)


@pytest.mark.parametrize("config", [PAPER, DEPLOY, HarmoqConfig(3, 4, observer="percentile")])
def test_the_same_data_and_seed_give_the_same_bounds_bit_for_bit(config: HarmoqConfig) -> None:
    crops = images(4, (24, 24))
    first = h.calibrate(prepare("SwinIR/light", config), crops)
    torch.manual_seed(12345)
    torch.rand(7)
    _assert_same(first, h.calibrate(prepare("SwinIR/light", config), crops))


def test_calibration_leaves_the_random_state_alone() -> None:
    prepared = prepare("SwinIR/light", PAPER)
    torch.manual_seed(5)
    h.calibrate(prepared, images(2))
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: (x, torch.zeros(1)),
        lambda x: [x],
        lambda x: {"path": "a.png", "lq": x, "gt": torch.zeros(1)},
        lambda x: ("a.png", x),
        lambda x: ("a.png", {"lq": x}),
        lambda x: x[0],
        lambda x: x.double(),
    ],
    ids=["tuple", "list", "dict", "name first", "nested", "unbatched", "float64"],
)
def test_batches_come_as_loaders_yield_them(wrap: Any) -> None:
    prepared = h.calibrate(prepare("linears", PAPER), [wrap(x) for x in images(3)])
    _assert_same(prepared, calibrated("linears", PAPER))


def test_one_tensor_of_images_is_an_iterable_of_images() -> None:
    _assert_same(h.calibrate(prepare("linears", PAPER), torch.cat(images(3))), calibrated("linears", PAPER))


def test_max_batches_stops_an_endless_iterable() -> None:
    def endless() -> Iterator[Tensor]:
        while True:
            yield from images(3)

    _assert_same(h.calibrate(prepare("linears", PAPER), endless(), max_batches=3), calibrated("linears", PAPER))


def test_the_progress_bar_is_shown_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    h.calibrate(prepare("linears", PAPER), images(2), show_progress=True)
    assert "Calibrating" in capsys.readouterr().err
    h.calibrate(prepare("linears", PAPER), images(2), show_progress=False)
    assert capsys.readouterr().err == ""


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "error", "word"),
    [
        ([], CalibrationError, "empty iterable"),
        (iter(()), CalibrationError, "empty iterable"),
        (None, CalibrationError, "iterated"),
        (3, CalibrationError, "iterated"),
        (["a.png"], CalibrationError, "no tensor"),
        ([()], CalibrationError, "no tensor"),
        ([{}], CalibrationError, "no tensor"),
        ([None], CalibrationError, "no tensor"),
        ([torch.rand(16, 16)], InputError, "rank"),
        ([torch.rand(1, 1, 3, 16, 16)], InputError, "rank"),
        ([torch.full((1, 3, 16, 16), float("nan"))], InputError, "no numbers"),
        ([torch.full((1, 3, 16, 16), float("inf"))], InputError, "no numbers"),
        ([torch.zeros(1, 3, 16, 16, dtype=torch.uint8)], InputError, "type"),
        ([torch.rand(1, 1, 16, 16)], InputError, "channels"),
        ([torch.rand(1, 4, 16, 16)], InputError, "channels"),
        ([torch.rand(0, 3, 16, 16)], InputError, "empty"),
    ],
)
def test_unusable_data_is_refused(data: Any, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        h.calibrate(prepare("linears", PAPER), data)


@pytest.mark.parametrize("count", [0, -1, True, 2.0, "3"])
def test_unusable_max_batches_is_refused(count: Any) -> None:
    with pytest.raises(ConfigError, match="max_batches"):
        h.calibrate(prepare("linears", PAPER), images(1), max_batches=count)


@pytest.mark.parametrize("model", [None, nn.Linear(3, 3), "model"])
def test_only_a_prepared_model_is_calibrated(model: Any) -> None:
    with pytest.raises(CalibrationError, match="prepare_harmoq"):
        h.calibrate(model, images(1))


def test_a_bad_batch_in_the_middle_is_refused_and_calibration_can_start_over() -> None:
    prepared = prepare("linears", DEPLOY)
    with pytest.raises(InputError):
        h.calibrate(prepared, [images(1)[0], torch.full((1, 3, 16, 16), float("nan"))])
    assert not has_qparams(prepared)
    assert has_qparams(h.calibrate(prepared, images(2)))


@pytest.mark.parametrize("settle", [h.compute_qparams, h.enable_fake_quant])
def test_nothing_is_settled_without_data(settle: Any) -> None:
    with pytest.raises(CalibrationError, match="saw no calibration data") as caught:
        settle(prepare("linears", PAPER))
    assert "calibrate" in str(caught.value.remedy)


@given(st.recursive(st.none() | st.text(max_size=2) | st.integers(), lambda x: st.lists(x, max_size=2) | st.tuples(x)))
def test_whatever_holds_no_tensor_is_a_typed_error(batch: Any) -> None:
    with pytest.raises(CalibrationError, match="no tensor"):
        image_of(batch)


def test_a_list_within_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(CalibrationError, match="no tensor"):
        image_of(endless)


# --- memory -----------------------------------------------------------------------------------------------------------


def _observed_bytes(prepared: h.PreparedModel) -> int:
    return sum(q.observer.nbytes for m in prepared.sites() for q in m.quantizers() if q.observer is not None)


@pytest.mark.parametrize(
    "observer", ["minmax", *(pytest.param(name, marks=pytest.mark.slow) for name in ("percentile", "mse", "histogram"))]
)
def test_statistics_of_200_crops_take_the_memory_of_20(observer: Any) -> None:
    prepared = prepare("SwinIR/light", HarmoqConfig(4, 4, "paper", observer=observer))
    for image in images(20, (32, 32)):
        run(prepared, image)
    after_20 = _observed_bytes(prepared)
    for image in images(180, (32, 32), seed=2):
        run(prepared, image)
    assert _observed_bytes(prepared) == after_20 > 0


_PEAK = """
import resource, sys, torch, harmoq_ao as h
from tests.models import images, prepare
torch.set_num_threads(1)
stream = (image for seed in range(int(sys.argv[1])) for image in images(1, (48, 48), seed))
h.calibrate(prepare("SwinIR/light", h.HarmoqConfig(4, 4, "paper")), stream)
sys.stdout.write(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="resource is of Unix")
def test_peak_memory_of_200_crops_is_at_most_a_fifth_above_that_of_20() -> None:
    def peak(crops: int) -> int:
        command = [sys.executable, "-c", _PEAK, str(crops)]
        root = Path(__file__).parents[2]
        return int(subprocess.run(command, capture_output=True, check=True, cwd=root, text=True).stdout)

    assert peak(200) <= 1.2 * peak(20)


# --- the float function -----------------------------------------------------------------------------------------------


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


def test_calibration_does_not_touch_the_original() -> None:
    original = build("SwinIR/light")
    before = copy.deepcopy(original.state_dict())
    prepared = h.prepare_harmoq(original, PAPER, images(1))
    h.calibrate(prepared, images(2))
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse", "histogram"])
def test_static_bounds_lie_within_what_was_seen(observer: Any) -> None:
    prepared = calibrated("SwinIR/light", HarmoqConfig(8, 8, "paper", observer=observer, joint_scale="none"))
    for module in prepared.sites():
        quantizer = module.act_quantizer
        assert quantizer is not None
        assert quantizer.observer is not None
        lo, hi = (float(v) for v in quantizer.bounds())
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
