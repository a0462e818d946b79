"""Images of gradient steps: mirrorings, and batches of parts."""

from __future__ import annotations

import pytest
import torch

import harmoq_ao as h
from harmoq_ao.common.errors import CalibrationError
from harmoq_ao.harmonization.sampling import image_batches, mirrored
from tests.harmonization.helpers import crops
from tests.models import calibrated

W3A3 = h.HarmoqConfig(3, 3, profile="paper")


def test_mirrorings_are_eight() -> None:
    crop = torch.arange(3 * 4 * 4.0).reshape(3, 4, 4)
    turned = {tuple(mirrored(crop, turn).flatten().tolist()) for turn in range(8)}
    assert len(turned) == 8


def test_image_batches() -> None:
    prepared = calibrated("SwinIR/light", W3A3)
    parts = image_batches(prepared, crops(3), 5, 2, 8, 0)
    assert [tuple(part.shape) for part in parts] == [(2, 3, 8, 8), (2, 3, 8, 8), (1, 3, 8, 8)]
    whole = image_batches(prepared, crops(3), 5, 2, None, 0)
    assert torch.equal(torch.cat(whole), torch.stack(crops(3)))
    with pytest.raises(CalibrationError, match="nothing"):
        image_batches(prepared, [], 5, 2, None, 0)
