"""BRECQ: weights go to a neighbouring level, and every block comes closer to its float twin, or stays."""

from __future__ import annotations

import pytest
import torch

import harmoq_ao as h
from harmoq_ao.baselines.block_reconstruction import StageCall, block_error, stage_calls
from harmoq_ao.baselines.brecq import ReconstructionSettings, blocks, reconstruct
from harmoq_ao.config import HarmoqConfig
from harmoq_ao.harmonization.stages import Stage, find_stages
from harmoq_ao.harmonization.teacher import Teacher
from harmoq_ao.sites.prepared import PreparedConv2d, PreparedLinear
from tests.baselines.helpers import applied, changed
from tests.models import PER_TOKEN, calibrated, images

CONFIG = HarmoqConfig(2, 2, "paper", joint_scale="none")


def first_block(name: str, config: HarmoqConfig = CONFIG) -> tuple[h.PreparedModel, Stage, list[StageCall]]:
    """A calibrated model, its first block, and what goes in and should come out."""
    prepared = calibrated(name, config)
    prepared.requires_grad_(False)
    stage = blocks(prepared)[0]
    return prepared, stage, stage_calls(prepared, Teacher(prepared), stage, images(4))


@pytest.mark.parametrize("name", ["SwinIR/light", "forms"])
def test_the_error_of_a_block_falls(name: str) -> None:
    _, stage, calls = first_block(name)
    before, after = reconstruct(stage, calls, 40)
    assert after < 0.9 * before
    assert block_error(stage, calls) == pytest.approx(after, rel=1e-5), "with quantizers, not their stand-ins"


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("SwinIR/light", HarmoqConfig(3, 3, "paper")),
        ("linears", HarmoqConfig(8, 8, "paper")),
        ("linears", HarmoqConfig(4, 4, "deploy", rules=PER_TOKEN)),
        ("forms", HarmoqConfig(3, 3, "paper", conv_bits=4)),
    ],
)
def test_rounded_weights_are_floor_or_ceil_on_the_first_grid(name: str, config: HarmoqConfig) -> None:
    initial, learned = (applied("brecq", name, config, steps=steps) for steps in (0, 15))
    moved = 0
    for before, after in zip(initial.sites(), learned.sites(), strict=True):
        if not isinstance(after, (PreparedLinear, PreparedConv2d)):
            continue
        step, lower = before.weight_quantizer.calculate_qparams()
        assert torch.equal(after.weight_quantizer.calculate_qparams()[0], step), "the grid stays"
        position = (before.weight - lower) / step
        assert after.weight_quantizer is not None
        codes = (after.weight_quantizer(after.weight) - lower) / step
        down, up = ((position.floor() + one).clamp(0, before.weight_quantizer.spec.qmax) for one in (0, 1))
        assert bool(((codes - codes.round()).abs() < 1e-2).all())
        assert bool(((codes.round() == down) | (codes.round() == up)).all())
        moved += int((codes.round() != position.round().clamp(0, before.weight_quantizer.spec.qmax)).sum())
    assert moved > 0, "some weights are not at their nearest level"


def test_only_sites_inside_of_blocks_change() -> None:
    initial, learned = (applied("brecq", "SwinIR/light", CONFIG, steps=steps) for steps in (0, 6))
    inside = tuple(f"model.{stage.name}." for stage in find_stages(learned))
    names = changed(initial, learned)
    assert names
    assert all(name.startswith(inside) for name in names)
    assert all(name.endswith((".weight", ".lower", ".upper")) for name in names)
    assert all(p.grad is None for p in learned.parameters())
    assert [p.requires_grad for p in learned.parameters()] == [p.requires_grad for p in initial.parameters()]


def test_a_block_that_does_not_gain_is_left_as_it_was() -> None:
    prepared, stage, calls = first_block("SwinIR/light")
    before = {name: tensor.clone() for name, tensor in prepared.state_dict().items()}
    errors = reconstruct(stage, calls, 3, settings=ReconstructionSettings(bounds_rate=50.0))
    assert errors[0] == errors[1] == block_error(stage, calls)
    after = prepared.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_weight_that_is_rounded_already_is_not_rounded_again() -> None:
    _, stage, calls = first_block("forms")
    linears = [site for site in stage.sites if isinstance(site, PreparedLinear)]
    done = {id(linears[0].weight)}
    kept = linears[0].weight.detach().clone()
    _, after = reconstruct(stage, calls, 60, rounded=done)
    assert torch.equal(linears[0].weight, kept)
    assert done == {id(site.weight) for site in linears}
    assert after > 0


def test_joint_scales_are_rounded_along() -> None:
    _, stage, calls = first_block("SwinIR/light", HarmoqConfig(2, 2, "paper", joint_scale="hso", joint_shift=False))
    before, after = reconstruct(stage, calls, 30)
    assert after < 0.9 * before
    site = next(site for site in stage.sites if isinstance(site, PreparedLinear))
    step, lower = site.weight_quantizer.calculate_qparams()
    codes = (site.weight * site.joint_scale - lower) / step
    assert bool(((codes - codes.round()).abs() < 1e-3).all())


def test_a_network_without_blocks_is_one_block() -> None:
    prepared = calibrated("forms", CONFIG)
    assert find_stages(prepared) == []
    assert [stage.sites for stage in blocks(prepared)] == [tuple(prepared.sites())]
