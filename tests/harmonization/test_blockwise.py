"""The block-wise stage: blocks come closer to their float twins or stay, and it can be interrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import harmoq_ao as h
from harmoq_ao.common.errors import CalibrationError, ConfigError
from harmoq_ao.harmonization.blockwise import block_error, refine_block, refine_blocks, stage_calls
from harmoq_ao.harmonization.learner import Rates
from harmoq_ao.harmonization.reference import float_reference
from harmoq_ao.harmonization.refine import RefineSettings, RefineTrace, refine
from harmoq_ao.harmonization.stages import find_stages
from tests.harmonization.helpers import DyingLearner, KilledError, crops, fidelity
from tests.models import calibrated, images

W3A3 = h.HarmoqConfig(3, 3, profile="paper")
QUICK = RefineSettings(steps=4, checks=2, warm_up=1, block_steps=3, block_images=4)


def frozen_model(name: str) -> h.PreparedModel:
    prepared = calibrated(name, W3A3)
    float_reference(prepared)
    prepared.requires_grad_(False)
    return prepared


@pytest.mark.parametrize("name", ["DAT/light", "SwinIR/light", "HAT"])
def test_a_block_comes_closer_to_its_float_twin_on_images_it_has_not_seen(name: str) -> None:
    prepared = frozen_model(name)
    stage, unseen = find_stages(prepared)[1], images(2, (16, 16), 70)
    before = block_error(stage, stage_calls(prepared, stage, unseen))
    errors = refine_block(prepared, stage, images(6, (16, 16)), Rates(), 40)
    assert errors.name == stage.name
    assert errors.after < 0.9 * errors.before
    assert block_error(stage, stage_calls(prepared, stage, unseen)) < 0.95 * before


def test_a_block_that_does_not_gain_stays_as_it_was() -> None:
    prepared = frozen_model("SwinIR/light")
    before = {name: tensor.clone() for name, tensor in prepared.state_dict().items()}
    rates = Rates(bounds=5.0, scales=5.0, weights=50.0)
    errors = refine_blocks(prepared, images(2, (16, 16)), rates, 3)
    assert all(found.before == found.after for found in errors)
    for name, tensor in prepared.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-5, atol=1e-9)


def test_blocks_are_done_in_order_and_nothing_outside_of_them_changes() -> None:
    prepared = frozen_model("DAT/light")
    before = {name: p.clone() for name, p in prepared.named_parameters()}
    seen: list[int] = []
    errors = refine_blocks(
        prepared, images(2, (16, 16)), Rates(), 3, after_block=lambda done: seen.append(len(done)), show_progress=False
    )
    names = [stage.name for stage in find_stages(prepared)]
    assert [found.name for found in errors] == names
    assert seen == list(range(1, len(names) + 1))
    changed = [name for name, p in prepared.named_parameters() if not torch.equal(p, before[name])]
    assert changed
    assert all(name.startswith(tuple(f"model.{block}." for block in names)) for name in changed)
    assert not any(p.requires_grad for p in prepared.parameters())


def test_the_whole_network_gains_from_its_blocks() -> None:
    prepared, unseen = frozen_model("SwinIR/light"), crops(3, 70)
    before = fidelity(prepared, unseen)
    refine_blocks(prepared, images(6, (16, 16)), Rates().at(3), 30)
    assert fidelity(prepared, unseen) > before + 0.3


def test_a_network_without_repeated_blocks_has_no_such_stage() -> None:
    results = []
    for settings in (QUICK, replace(QUICK, block_steps=0)):
        prepared = calibrated("linears", W3A3)
        trace = refine(prepared, crops(2), settings)
        assert trace.blocks == []
        results.append(prepared.state_dict())
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())


@pytest.mark.parametrize(("at", "again"), [(5, 2), (13, 2)])
def test_kill_and_resume_equals_an_uninterrupted_run(
    at: int, again: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three blocks of three steps each, then four through the whole network: killed in the second block, at the end."""
    whole = calibrated("DAT/light", W3A3)
    blocks = len(find_stages(whole))
    expected = refine(whole, crops(3), QUICK, held_out=crops(1, 9))
    assert len(expected.blocks) == blocks
    assert RefineTrace.from_dict(expected.to_dict()) == expected
    state = tmp_path / "progress.safetensors"
    killed = DyingLearner(monkeypatch, at)
    with pytest.raises(KilledError):
        refine(calibrated("DAT/light", W3A3), crops(3), QUICK, held_out=crops(1, 9), checkpoint=state)
    resumed = calibrated("DAT/light", W3A3)
    trace = refine(resumed, crops(3), QUICK, held_out=crops(1, 9), checkpoint=state)
    assert killed.count == 3 * blocks + 4 + again, "what was saved is not done again"
    assert trace == expected
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_no_images_are_refused() -> None:
    with pytest.raises(CalibrationError, match="0 batches"):
        refine_blocks(frozen_model("SwinIR/light"), [], Rates(), 3)


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"block_steps": -1}, {"block_images": 0}, {"block_steps": True}):
        with pytest.raises(ConfigError, match="out of range"):
            replace(QUICK, **wrong)
