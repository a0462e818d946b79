"""What gradient steps see: every crop once an epoch, mirrored, and of several places the one with most detail."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import harmoq_ao as h
from harmoq_ao.common.errors import CalibrationError
from harmoq_ao.harmonization import refine as refinement
from harmoq_ao.harmonization.sampling import detail, detailed_cut, image_batches, mirrored, random_cut, sample_order
from harmoq_ao.harmonization.settings import RefineSettings
from tests.harmonization.helpers import crops
from tests.models import calibrated

W3A3 = h.HarmoqConfig(3, 3, profile="paper")


def test_every_epoch_sees_every_crop_once() -> None:
    chosen = [sample_order(7, 3, position)[0] for position in range(21)]
    assert all(sorted(chosen[i : i + 7]) == list(range(7)) for i in (0, 7, 14))
    assert chosen[:7] != chosen[7:14]
    assert {sample_order(50, 0, p)[1] for p in range(50)} == set(range(8))
    assert sample_order(7, 3, 9) == sample_order(7, 3, 9)
    crop = torch.arange(3 * 4 * 4.0).reshape(3, 4, 4)
    turned = {tuple(mirrored(crop, turn).flatten().tolist()) for turn in range(8)}
    assert len(turned) == 8


def test_detail_is_the_energy_of_the_steps_between_neighbours() -> None:
    assert detail(torch.full((3, 4, 5), 0.7)) == 0
    ramp = torch.arange(5.0).expand(3, 4, 5)
    assert detail(ramp) == 1
    assert detail(ramp + 2 * torch.arange(4.0)[:, None]) == 1 + 4
    coloured = torch.stack((ramp[0], -ramp[0], torch.zeros(4, 5)))
    assert detail(coloured) == 0, "that of the brightness"
    assert detail(torch.rand(3, 1, 1)) == 0
    assert detail(ramp[:, :1]) == 1


@given(st.integers(1, 6), st.integers(0, 2**32), st.integers(1, 20))
def test_the_cut_with_most_detail_is_taken(cuts: int, seed: int, side: int) -> None:
    image = torch.rand(3, 12, 17, generator=torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed)
    drawn = [random_cut(image, side, generator) for _ in range(cuts)]
    taken = detailed_cut(image, side, cuts, torch.Generator().manual_seed(seed))
    assert taken.shape == (3, min(12, side), min(17, side))
    assert detail(taken) == max(map(detail, drawn))
    assert any(torch.equal(taken, cut) for cut in drawn)


def test_refinement_sees_such_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Mock(wraps=detailed_cut)
    monkeypatch.setattr(refinement, "detailed_cut", seen)
    images = crops(2)
    settings = RefineSettings(steps=1, batch_size=2, crop_size=8, cuts=5, checks=1)
    refinement.refine(calibrated("SwinIR/light", W3A3), images, settings)
    assert [call.args[1:3] for call in seen.call_args_list] == [(8, 5)] * 2
    seen.reset_mock()
    refinement.refine(calibrated("SwinIR/light", W3A3), images, replace(settings, crop_size=None))
    seen.assert_not_called()


def test_image_batches() -> None:
    prepared = calibrated("SwinIR/light", W3A3)
    parts = image_batches(prepared, crops(3), 5, 2, 8, 0)
    assert [tuple(part.shape) for part in parts] == [(2, 3, 8, 8), (2, 3, 8, 8), (1, 3, 8, 8)]
    whole = image_batches(prepared, crops(3), 5, 2, None, 0)
    assert torch.equal(torch.cat(whole), torch.stack(crops(3)))
    with pytest.raises(CalibrationError, match="nothing"):
        image_batches(prepared, [], 5, 2, None, 0)
