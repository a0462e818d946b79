"""Calibration: the same as forward calls, on bounded memory, and nothing but quantization changes the function."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import harmoq_ao as h
from harmoq_ao.calibration.calibrate import image_of
from harmoq_ao.calibration.solve import has_qparams
from harmoq_ao.common.errors import CalibrationError, ConfigError, InputError
from harmoq_ao.config import HarmoqConfig
from tests.calibration.helpers import DEPLOY, NAMES, PAPER, assert_same
from tests.models import calibrated, images, prepare, run

# --- what calibration is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_calibrate_equals_forward_calls_and_compute_qparams(name: str) -> None:
    called = h.calibrate(prepare(name, PAPER), images(3))
    by_hand = prepare(name, PAPER)
    for image in images(3):
        run(by_hand, image)
    h.compute_qparams(by_hand)
    h.enable_fake_quant(by_hand)
    assert_same(called, by_hand)
    assert torch.equal(run(called), run(by_hand))


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
    assert_same(first, h.calibrate(prepare("SwinIR/light", config), crops))


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
    assert_same(prepared, calibrated("linears", PAPER))


@pytest.mark.parametrize(("data", "limit"), [(torch.cat(images(3)), None), (itertools.cycle(images(3)), 3)])
def test_any_iterable_of_images_is_taken_up_to_max_batches(data: Any, limit: int | None) -> None:
    assert_same(h.calibrate(prepare("linears", PAPER), data, max_batches=limit), calibrated("linears", PAPER))


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
        ([torch.full((1, 3, 16, 16), float("nan"))], InputError, "not finite"),
        ([torch.full((1, 3, 16, 16), float("inf"))], InputError, "not finite"),
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


ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)


@example(ENDLESS)
@given(st.recursive(st.none() | st.text(max_size=2) | st.integers(), lambda x: st.lists(x, max_size=2) | st.tuples(x)))
def test_whatever_holds_no_tensor_is_a_typed_error(batch: Any) -> None:
    with pytest.raises(CalibrationError, match="no tensor"):
        image_of(batch)


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
