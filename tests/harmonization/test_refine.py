"""Refinement: what it learns, that it helps on images it has not seen, and that it can be interrupted."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import harmoq_ao as h
from harmoq_ao.common.errors import CalibrationError, CheckpointError, ConfigError
from harmoq_ao.config import Profile
from harmoq_ao.cpu_kernels import library
from harmoq_ao.cpu_kernels.instruction_sets import SWITCH
from harmoq_ao.harmonization.learner import Learner
from harmoq_ao.harmonization.paper.settings import AlgorithmSettings
from harmoq_ao.harmonization.refine import RefineTrace, refine
from harmoq_ao.harmonization.settings import Rates, RefineSettings
from harmoq_ao.harmonization.teacher import Teacher
from harmoq_ao.quant.operators import operators_for
from harmoq_ao.sites.prepared import PreparedLinear
from tests.harmonization.helpers import DyingLearner, KilledError, crops, fidelity
from tests.models import calibrated, images

W3A3 = h.HarmoqConfig(3, 3, profile="paper")
QUICK = RefineSettings(steps=12, checks=3, warm_up=1)


@pytest.mark.parametrize("name", ["HAT", "SwinIR/light"])
def test_refinement_brings_unseen_images_closer_to_the_float_network(name: str) -> None:
    prepared = calibrated(name, W3A3)
    held_out, unseen = crops(2, 90), crops(3, 70)
    teacher = Teacher(prepared)
    before, flags = fidelity(prepared, teacher, unseen), [p.requires_grad for p in prepared.parameters()]
    trace = refine(prepared, crops(6), replace(QUICK, steps=30, rates=Rates(rest=0)), held_out=held_out)
    assert fidelity(prepared, teacher, unseen) > before + 0.3
    assert len(trace.losses) == 30
    assert trace.held_out[0][0] == 0
    best = max(psnr for _, psnr in trace.held_out)
    assert fidelity(prepared, teacher, held_out) == pytest.approx(best, abs=1e-3)
    assert [p.requires_grad for p in prepared.parameters()] == flags


def test_a_state_that_is_worse_on_held_out_images_is_not_kept() -> None:
    prepared = calibrated("DAT/light", W3A3)
    before = copy.deepcopy(prepared.state_dict())
    destructive = replace(QUICK, rates=Rates(bounds=5.0, scales=5.0, weights=50.0), warm_up=0)
    trace = refine(prepared, crops(2), destructive, held_out=crops(1, 9))
    assert trace.best_step == 0
    for key, value in prepared.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("rates", "kinds"),
    [
        (Rates(5e-3, 0, 0, 0), {"upper", "lower"}),
        (Rates(0, 5e-3, 0, 0), {"log_scale", "joint_shift"}),
        (Rates(0, 0, 1e-2, 0), {"weight", "bias"}),
        (Rates(0, 0, 0, 1e-2), None),  # the rest, outside of all sites
        (Rates(0, 0, 0, 0), set()),
    ],
)
def test_only_what_has_a_rate_changes(rates: Rates, kinds: set[str] | None) -> None:
    prepared = calibrated("DAT/light", W3A3)
    before = {name: p.clone() for name, p in prepared.named_parameters()}
    refine(prepared, crops(2), replace(QUICK, steps=2, rates=rates))
    changed = {name for name, p in prepared.named_parameters() if not torch.equal(p, before[name])}
    sites = tuple(f"model.{site.site.path}." for site in prepared.sites())
    assert all(name.startswith(sites) == (kinds is not None) for name in changed)
    if kinds is None:
        assert changed
    else:
        assert {name.rpartition(".")[2].replace("joint_scale", "log_scale") for name in changed} == kinds


@pytest.mark.parametrize(("bits", "profile"), [(4, "deploy"), (8, "deploy"), (2, "paper")])
def test_a_refined_model_converts_and_computes_the_same(bits: int, profile: Profile) -> None:
    config = h.HarmoqConfig(bits, bits, profile=profile, storage_dtype="float32")
    prepared = calibrated("SwinIR/light", config)
    teacher = Teacher(prepared)
    refine(prepared, crops(2), replace(QUICK, steps=3))
    image = images(1, (20, 28))[0]
    with torch.no_grad():
        simulated, integer = prepared(image), h.convert_harmoq(prepared)(image)
        exact = teacher.exact(image)
    assert (simulated - integer).square().mean() < 1e-3 * (simulated - exact).square().mean()


@pytest.mark.skipif(not library.status().available, reason="the C++ kernels cannot be built here")
def test_cpp_operators_change_nothing_but_the_order_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither does their absence, for want of a compiler."""
    losses, used, step = [], [], Learner.step

    def noted(learner: Learner, loss: torch.Tensor) -> None:
        used.append(operators_for(loss) is not None)
        step(learner, loss)

    monkeypatch.setattr(Learner, "step", noted)
    for switch in ("", "off"):
        monkeypatch.setenv(SWITCH, switch)
        prepared = calibrated("DAT/light", replace(W3A3, relative_maps=True))
        losses.append(refine(prepared, crops(4), replace(QUICK, steps=3)).losses)
    assert used == [True] * 3 + [False] * 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)


def test_it_is_deterministic() -> None:
    results = []
    for _ in range(2):
        prepared = calibrated("DAT/light", W3A3)
        refine(prepared, crops(3), replace(QUICK, steps=4))
        results.append(prepared.state_dict())
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())


@pytest.mark.parametrize(
    ("settings", "killed_at", "saved"),
    [(QUICK, 7, 4), (replace(QUICK, steps=4, cycles=3, checks=2), 6, 4), (replace(QUICK, steps=6, cycles=2), 11, 10)],
    ids=["one cycle", "where a cycle begins", "within the second cycle"],
)
def test_kill_and_resume_equals_an_uninterrupted_run(
    settings: RefineSettings, killed_at: int, saved: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = calibrated("DAT/light", W3A3)
    expected = refine(whole, crops(3), settings, held_out=crops(1, 9))
    state = tmp_path / "progress.safetensors"
    killed = DyingLearner(monkeypatch, at=killed_at)
    with pytest.raises(KilledError):
        refine(calibrated("DAT/light", W3A3), crops(3), settings, held_out=crops(1, 9), checkpoint=state)
    assert state.exists()
    resumed = calibrated("DAT/light", W3A3)
    trace = refine(resumed, crops(3), settings, held_out=crops(1, 9), checkpoint=state)
    assert killed.count == killed_at + settings.total_steps - saved, f"it goes on from step {saved}"
    assert trace == expected
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_a_cycle_begins_from_the_kept_state_at_half_the_rates() -> None:
    once, twice = calibrated("DAT/light", W3A3), calibrated("DAT/light", W3A3)
    first = refine(once, crops(3), QUICK, held_out=crops(1, 9))
    both = refine(twice, crops(3), replace(QUICK, cycles=2), held_out=crops(1, 9))
    assert both.losses[:12] == first.losses
    assert len(both.losses) == 24
    assert both.held_out[: len(first.held_out)] == first.held_out
    assert [step for step, _ in both.held_out] == [0, 4, 8, 12, 16, 20, 24]
    assert max(psnr for _, psnr in both.held_out) >= max(psnr for _, psnr in first.held_out)

    destructive = Rates(bounds=5.0, scales=5.0, weights=50.0)
    back = replace(QUICK, steps=1, cycles=2, checks=1, rates=destructive, warm_up=0)
    restarted = refine(calibrated("DAT/light", W3A3), crops(3), back, held_out=crops(1, 9))
    still = refine(calibrated("DAT/light", W3A3), crops(3), replace(QUICK, steps=2, rates=Rates(0, 0, 0, 0)))
    assert restarted.losses == pytest.approx(still.losses, rel=1e-3), "the first step was worse and is taken back"

    learner = Learner(once.sites(), Rates(), 4, cycles=3, warm_up=1)
    paces = []
    for learner.steps_done in range(13):
        paces.append(learner.pace)
    assert paces[4:8] == pytest.approx([pace / 2 for pace in paces[:4]])
    assert paces[8:12] == pytest.approx([pace / 4 for pace in paces[:4]])
    assert paces[12] == 0, "the last cycle ends at zero"


def test_a_cycle_begins_without_the_momentum_of_the_one_before() -> None:
    learner = Learner(calibrated("DAT/light", W3A3).sites(), Rates(), 4, cycles=2)
    start = learner.snapshot()
    moved = []
    for _ in range(2):
        learner.step(torch.stack([p.square().sum() for p in learner.parameters.values()]).sum())
        moved.append(learner.snapshot())
        learner.restart(start)
        assert all(torch.equal(value, start[name]) for name, value in learner.snapshot().items())
        learner.steps_done = 0
    assert any(not torch.equal(value, start[name]) for name, value in moved[0].items())
    assert all(torch.equal(value, moved[1][name]) for name, value in moved[0].items())


def _other_weights() -> h.PreparedModel:
    prepared = calibrated("DAT/light", W3A3)
    site = prepared.sites()[0]
    assert site.own_weight is not None
    site.own_weight.data[0, 0] += 1e-3
    return prepared


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"settings": replace(QUICK, steps=3)}, "refinement.steps: 2 in the file, 3 now"),
        ({"crops": crops(2, seed=6)}, "calibration images: '2, "),
        ({"crops": crops(3)}, "calibration images: '2, "),
        ({"held_out": crops(1, 10)}, "held-out images: '1, "),
        ({"prepared": lambda: calibrated("DAT/light", replace(W3A3, act_bits=4))}, "quantization.act_bits: 3 in"),
        ({"prepared": lambda: calibrated("SwinIR/light", W3A3)}, "float weights: "),
        ({"prepared": _other_weights}, "float weights: "),
        ({"algorithm": AlgorithmSettings()}, "algorithm: None in the file"),
    ],
    ids=["settings", "images", "more images", "held out", "bits", "model", "weights", "algorithm"],
)
def test_a_checkpoint_of_other_work_is_refused(tmp_path: Path, changed: dict[str, Any], named: str) -> None:
    state = tmp_path / "progress.safetensors"
    work: dict[str, Any] = {"crops": crops(2), "settings": replace(QUICK, steps=2), "held_out": crops(1, 9)}
    refine(calibrated("DAT/light", W3A3), **work, checkpoint=state)
    prepared = changed.get("prepared", lambda: calibrated("DAT/light", W3A3))()
    work |= {name: value for name, value in changed.items() if name != "prepared"}
    before = {name: value.clone() for name, value in prepared.state_dict().items()}
    with pytest.raises(CheckpointError, match="other work") as caught:
        refine(prepared, **work, checkpoint=state)
    assert named in str(caught.value.found)
    learned = [name for name in before if not name.endswith("_enabled")]
    assert all(torch.equal(prepared.state_dict()[name], before[name]) for name in learned)


@pytest.mark.parametrize("content", ["first bytes", "another file", "another kind of entry"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, content: str) -> None:
    state = tmp_path / "progress.safetensors"
    refine(calibrated("DAT/light", W3A3), crops(2), replace(QUICK, steps=2), checkpoint=state)
    if content == "first bytes":
        state.write_bytes(state.read_bytes()[:100])
    else:
        other = {} if content == "another file" else {"harmoq_ao_progress": "[1]"}
        save_file({"weight": torch.zeros(1)}, state, other)
    with pytest.raises(CheckpointError, match="not a progress file"):
        refine(calibrated("DAT/light", W3A3), crops(2), replace(QUICK, steps=2), checkpoint=state)


def test_unusable_input_is_refused() -> None:
    prepared = calibrated("DAT/light", W3A3)
    with pytest.raises(CalibrationError, match="nothing to refine on"):
        refine(prepared, [])
    with pytest.raises(CalibrationError, match="one size"):
        refine(prepared, [torch.rand(3, 16, 16), torch.rand(3, 24, 24)])
    with pytest.raises(CalibrationError, match="not finite"):
        refine(prepared, crops(1), replace(QUICK, rates=Rates(0, 0, 1e30), warm_up=0))
    counts = [{name: 0} for name in ("steps", "cycles", "batch_size")]
    for wrong in (*counts, {"precision": "float8"}, {"feature_weight": -1.0}, {"focus": -1.0}):
        with pytest.raises(ConfigError):
            replace(QUICK, **wrong)
    with pytest.raises(ConfigError):
        Rates(bounds=-1.0)


def test_the_trace_survives_json() -> None:
    trace = RefineTrace([0.5, 0.25], [(0, 30.0), (2, 31.0)], 2)
    assert RefineTrace.from_dict(trace.to_dict()) == trace


def test_parameters_of_like_rates_are_updated_together_at_about_the_rate_asked_for() -> None:
    prepared = calibrated("DAT/light", W3A3)
    learner = Learner(prepared.sites(), Rates(rest=0.0), 10)
    assert learner._optimizer is not None
    groups = learner._optimizer.param_groups
    assert len(groups) < len(learner.parameters) / 3
    rate = {parameter: group["lr"] for group in groups for parameter in group["params"]}
    assert set(rate) == set(learner.parameters.values())
    for site in prepared.sites():
        if isinstance(site, PreparedLinear):
            assert rate[site.weight] == pytest.approx(1e-2 * float(site.weight.detach().std()), rel=0.05)


def test_rates_shrink_with_the_step() -> None:
    rates = Rates(1e-2, 2e-2, 3e-2, 4e-2)
    assert rates.at(2) == rates
    assert rates.at(4).weights == pytest.approx(3e-2 / 5**1.5)
    assert rates.at(4).bounds == pytest.approx(1e-2 / 5**0.5)
    assert rates.at(8).bounds < rates.at(3).bounds
