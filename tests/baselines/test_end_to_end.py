"""Every baseline on small models: what it configures, and that what it leaves converts to the same function."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import harmoq_ao as h
from harmoq_ao.baselines import BASELINES, Budget
from harmoq_ao.common.errors import CalibrationError, ConfigError
from harmoq_ao.config import HarmoqConfig, SiteRule
from harmoq_ao.conversion.load import load_quantized
from harmoq_ao.conversion.save import save_quantized
from tests.baselines.helpers import applied, crops
from tests.models import build, images, prepare, run

PAPER = HarmoqConfig(3, 3, "paper", storage_dtype="float32")
CASES = {
    "forms-convolutions": ("forms", replace(PAPER, conv_bits=4)),
    "swinir-paper": ("SwinIR/light", replace(PAPER, weight_bits=2, act_bits=2)),
    "swinir-deploy": ("SwinIR/light", replace(PAPER, profile="deploy", weight_bits=4, act_bits=4)),
    "linears-W8A8": ("linears", replace(PAPER, weight_bits=8, act_bits=8)),
    "forms-weights": ("forms", replace(PAPER, act_bits=32)),
    "forms-activations": ("forms", replace(PAPER, weight_bits=32)),
}


def test_the_words_of_the_command_line() -> None:
    words = ["minmax", "percentile", "dobi", "2dquant", "condiquant", "brecq", "pams", "dbdc-pac", "granular-dq"]
    assert list(BASELINES) == words
    assert [BASELINES[word].name for word in words] == words
    assert len({baseline.title for baseline in BASELINES.values()}) == 9
    assert [word for word in words if BASELINES[word].learns] == ["2dquant", "condiquant", "brecq", "pams", "dbdc-pac"]


@pytest.mark.parametrize("method", BASELINES)
def test_configurations_lose_what_is_harmoqs_own_and_keep_the_rest(method: str) -> None:
    rules = (SiteRule("*.qkv", act_bits=8), SiteRule("*", joint_scale="hso"))
    config = HarmoqConfig(3, 4, "paper", rules=rules, joint_scale="hso", conv_bits=8, seed=5)
    configured = BASELINES[method].configure(config)
    for name in ("a.qkv", "a.proj"):
        settings = configured.settings(name, "linear")
        given = config.settings(name, "linear")
        assert settings.joint_scale == "none"
        assert (settings.weight, settings.act) == (given.weight, given.act)
    assert (configured.conv_bits, configured.seed, configured.profile) == (8, 5, "paper")


@pytest.mark.parametrize("method", BASELINES)
@pytest.mark.parametrize("case", CASES)
def test_the_converted_model_computes_what_was_simulated(method: str, case: str) -> None:
    name, config = CASES[case]
    prepared = applied(method, name, config, steps=2, count=2)
    assert all(site.joint_scale is None for site in prepared.sites())
    simulated, integer = run(prepared), run(h.convert_harmoq(prepared))
    assert bool(torch.isfinite(integer).all())
    noise = (simulated - run(build(name))).abs().mean()
    assert (simulated - integer).abs().mean() < 0.3 * noise + 1e-5


@pytest.mark.parametrize("method", [word for word, baseline in BASELINES.items() if baseline.learns])
def test_a_seed_repeats_what_is_learned(method: str) -> None:
    first, second, other = (applied(method, "linears", PAPER, steps=4, seed=seed).state_dict() for seed in (1, 1, 3))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("method", BASELINES)
def test_the_global_random_state_is_left_alone(method: str) -> None:
    before = torch.get_rng_state()
    applied(method, "linears", PAPER, steps=1, count=2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", BASELINES)
def test_without_crops_there_is_an_error(method: str) -> None:
    baseline = BASELINES[method]
    with pytest.raises(CalibrationError, match="No calibration images"):
        baseline.apply(prepare("linears", baseline.configure(PAPER)), [], Budget(1))


def test_a_saved_model_keeps_the_bits_of_single_sites(tmp_path: Path) -> None:
    """Granular-DQ alone changes the configuration after preparation."""
    converted = h.convert_harmoq(applied("granular-dq", "SwinIR/light", PAPER))
    save_quantized(converted, tmp_path / "model")
    loaded = load_quantized(tmp_path / "model", build("SwinIR/light"))
    assert {s.settings.act.bits for s in loaded.sites().values()} == {2, 3, 4}
    image = images(1, seed=99)[0]
    assert torch.equal(converted(image), loaded(image))


@pytest.mark.parametrize("method", ["2dquant", "brecq"])
def test_a_step_sees_images_of_the_size_asked_for(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    baseline = BASELINES[method]
    prepared = prepare("linears", baseline.configure(PAPER))
    shapes: list[tuple[int, ...]] = []
    hook = prepared.model.register_forward_pre_hook
    watch = partial(hook, lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    monkeypatch.setattr(baseline, "adjust_qparams", lambda _: watch())
    baseline.apply(prepared, crops(3), Budget(4, batch_size=2, crop_size=8))
    assert set(shapes) == {(2, 3, 8, 8)}
    shapes.clear()
    baseline.apply(prepared, crops(4), Budget(4, batch_size=2))
    assert set(shapes[4:]) == {(2, 3, 16, 16)}, "calibration sees one whole crop at a time"


@pytest.mark.parametrize("wrong", [{"steps": -1}, {"batch_size": 0}, {"crop_size": 0}, {"seed": -1}])
def test_budgets_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="budget"):
        Budget(**{"steps": 1, **wrong})


def test_crops_of_different_sizes_are_refused() -> None:
    baseline = BASELINES["brecq"]
    mixed = [*crops(2), images(1, (16, 24))[0][0]]
    with pytest.raises(CalibrationError, match="one size"):
        baseline.apply(prepare("linears", baseline.configure(PAPER)), mixed, Budget(1))
