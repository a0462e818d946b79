"""What reaches a block, and what should come out of it."""

from __future__ import annotations

import pytest
import torch

import harmoq_ao as h
from harmoq_ao.baselines.block_reconstruction import capture_stage, stage_calls
from harmoq_ao.common.errors import CalibrationError
from harmoq_ao.harmonization.stages import find_stages
from harmoq_ao.harmonization.teacher import Teacher
from tests.models import calibrated, images

W3A3 = h.HarmoqConfig(3, 3, profile="paper")


def test_a_captured_call_reproduces_the_stage() -> None:
    prepared = calibrated("SwinIR/light", W3A3)
    stage = find_stages(prepared)[1]
    for call in capture_stage(prepared, stage.name, images(2)):
        with torch.no_grad():
            assert torch.equal(stage.module(*call.args, **call.kwargs), call.output)


def test_no_images_are_refused() -> None:
    prepared = calibrated("SwinIR/light", W3A3)
    with pytest.raises(CalibrationError, match="0 batches"):
        stage_calls(prepared, Teacher(prepared), find_stages(prepared)[0], [])
