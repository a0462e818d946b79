"""Algorithm 1 on small models: what it may change, that it never makes a site worse, and that its trace is true."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import harmoq_ao as h
from harmoq_ao.common.errors import CalibrationError, ConfigError, InputError
from harmoq_ao.config import HarmoqConfig, SiteRule
from harmoq_ao.harmonization.paper.algorithm import run_algorithm
from harmoq_ao.harmonization.paper.capture import common_batch
from harmoq_ao.harmonization.paper.settings import AlgorithmSettings
from harmoq_ao.harmonization.paper.trace import AlgorithmTrace
from harmoq_ao.harmonization.teacher import Teacher
from harmoq_ao.sites.model import PreparedModel
from harmoq_ao.sites.prepared import PreparedLinear, PreparedMatmul
from tests.models import PER_TOKEN, build, calibrated, images, prepare, run

SMALL = AlgorithmSettings(rows=256, updates=10)
OFF = replace(SMALL, src=False, hso=False, abr=False)
PAPER = HarmoqConfig(weight_bits=3, act_bits=3, profile="paper")

CONFIGS = {
    "w2a2": replace(PAPER, weight_bits=2, act_bits=2),
    "w4a4 without scales": replace(PAPER, weight_bits=4, act_bits=4, joint_scale="none"),
    "w8a8 min/max": replace(PAPER, weight_bits=8, act_bits=8, observer="minmax"),
    "w4a32": replace(PAPER, weight_bits=4, act_bits=32),
    "w32a4": replace(PAPER, weight_bits=32, act_bits=4),
    "dynamic": HarmoqConfig(4, 4, "deploy", rules=PER_TOKEN, matmul_bits=4),
    "one dynamic operand": replace(PAPER, rules=[SiteRule("*", "linear", dynamic=True)]),
    "convolutions": replace(PAPER, conv_bits=8),
}


def state(prepared: PreparedModel) -> dict[str, Tensor]:
    """Everything a prepared model holds, bounds and scales included."""
    return {key: value.clone() for key, value in prepared.state_dict().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Kinds of entries that differ: the last part of their names, with the side of a quantizer."""
    names = before.keys() | after.keys()
    differing = [n for n in names if n not in before or n not in after or not torch.equal(before[n], after[n])]
    return {
        ".".join(n.split(".")[-2:]) if ".act_quantizer." in n or ".weight_quantizer." in n else n.split(".")[-1]
        for n in differing
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two models hold the same values bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def solved(
    name: str, config: HarmoqConfig, settings: AlgorithmSettings = SMALL
) -> tuple[PreparedModel, AlgorithmTrace]:
    """A calibrated model after the algorithm."""
    prepared = calibrated(name, config)
    return prepared, run_algorithm(prepared, images(3), settings)


def execution_order(prepared: PreparedModel) -> list[str]:
    """Names of the linears and products that quantize something, in the order of their first calls."""
    names: dict[str, None] = {}
    sites = [s for s in prepared.sites() if s.site.kind != "conv2d" and any(q.active for q in s.quantizers())]
    hooks = [s.register_forward_pre_hook(lambda site, _: names.setdefault(site.site.name)) for s in sites]
    run(prepared, images(1)[0])
    for hook in hooks:
        hook.remove()
    return list(names)


def uneven() -> PreparedModel:
    """A model without joint scales whose features differ in magnitude from channel to channel."""
    model = build("linears")
    with torch.no_grad():
        factors = torch.logspace(-1.5, 1, 16)
        model.one.weight.mul_(factors[:, None] * 0.3)
        model.two.weight.div_(factors)
    config = replace(PAPER, joint_scale="none")
    return h.calibrate(h.prepare_harmoq(model, config, images(1)), images(3))


def probe(prepared: PreparedModel, teacher: Teacher) -> AlgorithmTrace:
    """The objective of every site of a model as it is: refinement with no update changes nothing."""
    before = state(prepared)
    trace = run_algorithm(prepared, images(3), replace(SMALL, src=False, hso=False, updates=0), teacher=teacher)
    assert same(before, state(prepared))
    return trace


# --- what it promises -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_no_site_ends_above_its_start_and_the_trace_tells_the_truth(config: HarmoqConfig) -> None:
    """The objectives are measured again on the finished model, with the quantized prefix as it has become."""
    prepared = calibrated("forms", config)
    teacher = Teacher(prepared)
    trace = run_algorithm(prepared, images(3), SMALL, teacher=teacher)
    relative = {s.site.name for s in prepared.sites() if isinstance(s, PreparedMatmul) and s.relative}
    order = [name for name in execution_order(prepared) if name not in relative]
    assert [site.name for site in trace.sites] == order
    assert all(site.end <= site.start for site in trace.sites)
    assert any(site.end < 0.99 * site.start for site in trace.sites)
    for site, again in zip(trace.sites, probe(prepared, teacher).sites, strict=True):
        assert again.start == pytest.approx(site.end, rel=1e-3, abs=1e-9)
    assert set(trace.skipped) == {s.site.name for s in prepared.sites()} - set(order)
    converted = h.convert_harmoq(prepared)
    assert float((run(converted) - run(prepared)).abs().mean()) < 0.01  # codes at a threshold may round otherwise


@pytest.mark.parametrize("name", ["forms", "linears"])
def test_with_everything_off_the_model_is_left_as_calibrated(name: str) -> None:
    before = state(calibrated(name, PAPER))
    prepared, trace = solved(name, PAPER, OFF)
    assert same(before, state(prepared))
    assert trace.sites == []


RANGES = {side: {f"{side}_quantizer.lower", f"{side}_quantizer.upper"} for side in ("act", "weight")}


@pytest.mark.parametrize(
    ("component", "own", "allowed"),
    [
        ("src", "weight", {"bias", "shared"} | RANGES["weight"]),
        ("hso", "joint_scale", RANGES["act"] | RANGES["weight"]),
        ("abr", "act_quantizer.upper", RANGES["act"] | RANGES["weight"]),
    ],
)
def test_each_component_changes_what_is_its_own(component: str, own: str, allowed: set[str]) -> None:
    prepared = uneven()
    before = state(prepared)
    run_algorithm(prepared, images(3), replace(OFF, **{component: True}))
    kinds = changed(before, state(prepared))
    assert own in kinds
    assert kinds <= allowed | {own}


def test_the_two_other_components_off_leave_weights_or_bounds_alone_in_products() -> None:
    before = state(calibrated("forms", PAPER))
    prepared, trace = solved("forms", PAPER, replace(OFF, src=True))
    assert {site.kind for site in trace.sites} == {"linear", "matmul"}
    for key in before:
        if "matmul" in key or "sdpa" in key:
            assert torch.equal(before[key], prepared.state_dict()[key])


@pytest.mark.parametrize("memory", [SMALL.memory, 1])
def test_it_is_deterministic_with_passes_of_any_length(memory: int) -> None:
    first, trace = solved("forms", PAPER)
    torch.manual_seed(99)
    second, repeated = solved("forms", PAPER, replace(SMALL, memory=memory))
    assert same(state(first), state(second))
    assert replace(repeated, settings=trace.settings) == trace


@pytest.mark.parametrize(("config", "factor"), [(CONFIGS["w2a2"], 0.9), (PAPER, 1.0)], ids=["w2a2", "w3a3"])
def test_the_network_comes_closer_to_its_float_self(config: HarmoqConfig, factor: float) -> None:
    prepared = calibrated("forms", config)
    batch = torch.cat(images(3))
    exact, before = run(Teacher(prepared).exact, batch), run(prepared, batch)
    run_algorithm(prepared, images(3), SMALL)
    after = float((run(prepared, batch) - exact).square().mean())
    assert after < factor * float((before - exact).square().mean())


# --- what reaches a site ----------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One layer that runs twice, and one weight that two calls share."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(3, 8)
        self.again = nn.Linear(8, 8)
        self.tied = nn.Parameter(torch.randn(8, 8) * 0.3)
        self.leave = nn.Linear(8, 3)

    def forward(self, image: Tensor) -> Tensor:
        x = self.enter(image.permute(0, 2, 3, 1))
        x = self.again(torch.tanh(self.again(x)))
        x = F.linear(F.linear(x, self.tied).relu(), self.tied)
        result: Tensor = self.leave(x).permute(0, 3, 1, 2)
        return result


def test_a_site_that_runs_twice_is_solved_once_and_a_shared_weight_is_kept() -> None:
    prepared = h.calibrate(h.prepare_harmoq(Twice().eval(), PAPER, images(1)), images(3))
    tied = prepared.model.tied.clone()
    trace = run_algorithm(prepared, images(3), SMALL)
    names = [site.name for site in trace.sites]
    assert sorted(names) == sorted(s.site.name for s in prepared.sites())
    assert names.count("again") == 1
    assert torch.equal(prepared.model.tied, tied)
    kinds = {site.name: {event.kind for event in site.events} for site in trace.sites}
    assert "src" in kinds["again"]
    assert all("src" not in kinds[name] for name in names if "::linear" in name)


@pytest.mark.parametrize("projection", ["laplacian", "learned"])
def test_the_trace_names_the_projection(projection: Any) -> None:
    _, trace = solved("forms", PAPER, replace(OFF, src=True, projection=projection))
    assert {site.projection for site in trace.sites if site.kind == "linear"} == {projection}
    assert {site.projection for site in trace.sites if site.kind == "matmul"} == {None}


def test_a_filter_without_a_grid_is_the_identity_and_the_trace_says_so() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(3, 3)

        def forward(self, image: Tensor) -> Tensor:
            return image * self.gate(image.mean((2, 3)))[..., None, None]

    prepared = h.calibrate(h.prepare_harmoq(Pooled().eval(), PAPER, images(1)), images(3))
    trace = run_algorithm(prepared, images(3), SMALL)
    assert [site.projection for site in trace.sites] == ["identity"]


def test_the_printed_form_is_kept_whatever_it_does() -> None:
    _, trace = solved("forms", PAPER, replace(OFF, src=True, printed=True))
    events = [event for site in trace.sites for event in site.events]
    assert {event.kind for event in events} == {"src"}
    assert all(event.kept for event in events)


def test_a_convolution_is_skipped_with_the_reason() -> None:
    _, trace = solved("forms", CONFIGS["convolutions"])
    assert trace.skipped["head"] == "convolutions are left as calibrated"


def test_images_of_different_sizes_are_cut_to_the_smallest() -> None:
    batches = [*images(1, (16, 24)), *images(2, (20, 16), seed=5)]
    batch = common_batch(batches, 8)
    assert batch.shape == (3, 3, 16, 16)
    assert torch.equal(batch[0], batches[0][0, :, :, 4:20])
    assert torch.equal(batch[1], batches[1][0, :, 2:18])
    trace = run_algorithm(calibrated("linears", PAPER), batches, SMALL)
    assert len(trace.sites) == 2


def test_only_the_first_images_count() -> None:
    assert len(common_batch(images(5), 3)) == 3
    assert len(common_batch([torch.cat(images(5))], 3)) == 3
    assert common_batch([images(1)[0][0]], 3).shape == (1, 3, 16, 16)


def test_nothing_is_left_behind_and_the_float_reference_is_not_touched() -> None:
    """No hooks and no switched quantizers, also when a forward fails."""
    prepared = calibrated("forms", PAPER)
    teacher = Teacher(prepared)
    original = state(teacher.exact)
    run_algorithm(prepared, images(3), SMALL, teacher=teacher)
    assert same(original, state(teacher.exact))
    last = [s for s in prepared.sites() if isinstance(s, PreparedLinear)][-1]
    broken = last.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        run_algorithm(prepared, images(3), SMALL, teacher=teacher)
    broken.remove()
    for model in (prepared, teacher.exact):
        assert all(not s._forward_pre_hooks for s in model.sites())
    assert all(q.active for s in prepared.sites() for q in s.quantizers())


# --- settings and traces ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [SMALL, replace(OFF, src=True, edge_weight=float("inf"))], ids=["all", "edges only"]
)
def test_a_trace_is_written_as_json(settings: AlgorithmSettings) -> None:
    _, trace = solved("forms", CONFIGS["convolutions"], settings)
    found = json.loads(json.dumps(trace.to_dict(), allow_nan=False))
    assert float(found["settings"]["edge_weight"]) == settings.edge_weight
    assert found["skipped"] == trace.skipped
    for site, expected in zip(found["sites"], trace.sites, strict=True):
        for name, value in vars(expected).items():
            assert site[name] == ([list(entry) for entry in value] if name in ("balances", "events") else value)


@pytest.mark.parametrize(
    "bad",
    [{"rows": 0}, {"images": 0}, {"projection": "x"}, {"updates": -1}, {"ridge": -1.0}, {"inherited": 1.5}],
    ids=str,
)
def test_settings_are_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        AlgorithmSettings(**bad)


def test_a_model_without_calibration_or_images_is_refused() -> None:
    with pytest.raises(CalibrationError, match="not calibrated"):
        run_algorithm(prepare("linears", PAPER), images(1))
    with pytest.raises(CalibrationError, match="No calibration images"):
        run_algorithm(calibrated("linears", PAPER), [])
    with pytest.raises(InputError):
        run_algorithm(calibrated("linears", PAPER), [torch.full((1, 3, 8, 8), torch.nan)])
