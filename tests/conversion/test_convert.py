"""Converted models: integers between quantizer and contraction, nothing left of the float weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import harmoq_ao as h
from harmoq_ao.common.errors import CalibrationError, ConfigError
from harmoq_ao.config import HarmoqConfig, SiteRule
from harmoq_ao.kernels import float_matmul, onednn
from harmoq_ao.quant import integer_reference
from harmoq_ao.sites.prepared import PreparedConv2d, PreparedLinear
from harmoq_ao.sites.quantized import QuantizedConv2d, QuantizedLinear, QuantizedMatmul
from tests.kernels.test_float_matmul import unit
from tests.kernels.test_onednn import contract_exactly
from tests.models import PER_TOKEN, build, calibrated, converted, images, run

EXACT: dict[str, Any] = {"storage_dtype": "float32"}
PAPER = HarmoqConfig(8, 8, "paper", **EXACT)
NAMES = ("forms", "long", "SwinIR/light", "DAT", "FDAT")


# --- the same function as fake quantization ---------------------------------------------------------------------------

CONFIGS = [
    *(HarmoqConfig(w, a, "paper", **EXACT) for w in (2, 3, 4, 8) for a in (2, 3, 4, 8)),
    *(HarmoqConfig(w, a, **EXACT) for w, a in ((2, 2), (3, 3), (4, 4), (8, 8), (4, 8), (8, 4))),
    HarmoqConfig(4, 32, **EXACT),
    HarmoqConfig(32, 4, **EXACT),
    HarmoqConfig(32, 8, "paper", **EXACT),
    HarmoqConfig(5, 6, "paper", joint_scale="none", observer="histogram", **EXACT),
    HarmoqConfig(4, 4, rules=PER_TOKEN, matmul_bits=7, **EXACT),
    HarmoqConfig(4, 8, rules=PER_TOKEN, **EXACT),
    HarmoqConfig(8, 4, rules=PER_TOKEN, **EXACT),
]


def _label(config: HarmoqConfig) -> str:
    return f"W{config.weight_bits}A{config.act_bits}-{config.profile}-{config.observer}-{config.matmul_bits}"


@pytest.mark.parametrize("config", CONFIGS, ids=_label)
def test_one_step_of_rounding_apart_at_most_from_fake_quantization(config: HarmoqConfig) -> None:
    """Float32 sums in another order may move a rare value across a rounding threshold: typically nothing differs."""
    simulated, integer = run(calibrated("linears", config)), run(converted("linears", config))
    error = (simulated - integer).abs()
    assert error.median() < 1e-5
    assert (error > 1e-3).float().mean() < 0.02


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_fake_quantization(name: str) -> None:
    simulated, integer = run(calibrated(name, PAPER)), run(converted(name, PAPER))
    noise = (simulated - run(build(name))).abs().mean()
    assert (simulated - integer).abs().mean() < 0.3 * noise + 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_weight_codes_dequantize_to_the_fake_quantized_weights(name: str) -> None:
    prepared = {m.site.name: m for m in calibrated(name, PAPER).sites()}
    for site_name, site in converted(name, PAPER).sites().items():
        if isinstance(site, QuantizedLinear):
            twin = prepared[site_name]
            assert isinstance(twin, PreparedLinear)
            inverse = None if twin.joint_scale is None else 1.0 / twin.joint_scale
            assert twin.weight_quantizer is not None
            expected = twin.weight_quantizer(twin.weight, inverse).detach()
            operands = site.operands()
            values = (operands.weight + operands.weight_shift[:, None]) * operands.weight_scale[:, None]
            steps = (values - expected).abs() / operands.weight_scale[:, None]
            assert steps.max() < 1.01  # the largest weights lie halfway between two codes
            assert (steps > 1e-3).float().mean() < 0.01


def test_codes_are_in_range_and_use_the_range() -> None:
    for bits in (2, 3, 4, 8):
        config = HarmoqConfig(bits, bits, **EXACT)
        for site in converted("SwinIR/light", config).sites().values():
            assert isinstance(site, QuantizedLinear)
            codes = site.weight_codes()
            assert codes.dtype == torch.int8
            assert -(1 << (bits - 1)) <= int(codes.min()) < 0 < int(codes.max()) < 1 << (bits - 1)


# --- integers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "right"), [("linear", torch.int8), ("matmul", torch.uint8)])
@pytest.mark.parametrize("name", ["forms", "SwinIR/light"])
def test_integers_reach_every_contraction(name: str, kind: str, right: torch.dtype) -> None:
    model, function = converted(name, PAPER), f"{kind}_accumulate"
    model.use_reference(True)
    with mock.patch.object(integer_reference, function, wraps=getattr(integer_reference, function)) as spy:
        run(model)
    assert spy.call_count == [s.site.kind for s in model.sites().values()].count(kind) > 0
    assert {(a.dtype, b.dtype) for (a, b), _ in spy.call_args_list} == {(torch.uint8, right)}


@pytest.mark.skipif(not onednn.is_available(), reason="this processor has no exact int8 kernels")
@pytest.mark.parametrize("config", [PAPER, HarmoqConfig(4, 4, rules=PER_TOKEN, **EXACT)], ids=["static", "per token"])
def test_unsigned_bytes_reach_the_kernel_of_every_linear(config: HarmoqConfig) -> None:
    model = converted("SwinIR/light", config)
    with mock.patch.object(onednn, "_qlinear", wraps=onednn._qlinear) as spy:
        run(model)
    linears = [s for s in model.sites().values() if s.site.kind == "linear"]
    assert spy.call_count >= len(linears) > 0
    assert {call.args[0].dtype for call in spy.call_args_list} == {torch.uint8}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("profile", ["deploy", "paper"])
def test_accumulators_of_both_paths_are_equal_bit_for_bit(bits: int, profile: Any) -> None:
    model = converted("SwinIR/light", HarmoqConfig(bits, bits, profile, **EXACT))
    checked = 0
    for site, inputs in _inputs_of(model):
        if isinstance(site, QuantizedLinear):
            operands = site.operands()
            packed = onednn.pack_linear(operands)
            fast = onednn.quantize(inputs[0].reshape(-1, inputs[0].shape[-1]), packed)
            act = operands.act
            if act is None:
                slow, _ = integer_reference.quantize_dynamic(inputs[0], -1, operands.act_bits, operands.joint_scale)
            else:
                slow = integer_reference.quantize_codes(
                    inputs[0], *integer_reference.static_qparams(act, operands.joint_scale, operands.joint_shift), bits
                )
            slow = slow.reshape(fast.shape)
            assert torch.equal(fast, slow)
            assert int(fast.max()) < 1 << bits
            expected = integer_reference.linear_accumulate(slow, operands.weight).float()
            assert torch.equal(contract_exactly(fast, operands.weight, 0.0)[0], expected)
            checked += 1
    assert checked > 0


def _inputs_of(model: h.QuantizedModel) -> list[tuple[nn.Module, tuple[Tensor, ...]]]:
    """Every site with the activations that a real image gives it."""
    seen: list[tuple[nn.Module, tuple[Tensor, ...]]] = []
    handles = [
        s.register_forward_hook(lambda m, i, o: seen.append((m, tuple(t.clone() for t in i))))
        for s in model.sites().values()
    ]
    run(model)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_each_site_gives_the_same_on_both_paths(name: str) -> None:
    for site, inputs in _inputs_of(converted(name, PAPER)):
        options = {"alpha": 0.5} if len(inputs) == 3 else {}
        fast = site(*inputs, **options)
        site.backend = "reference"
        torch.testing.assert_close(site(*inputs, **options), fast, rtol=1e-4, atol=1e-4 * float(fast.abs().max()))


# --- no float weights left --------------------------------------------------------------------------------------------


def _tensors_within(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor that can be reached from an object's attributes and containers."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _tensors_within(entry, seen)
    elif isinstance(value, (list, tuple, set)):
        for entry in value:
            yield from _tensors_within(entry, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from _tensors_within(vars(value), seen)


@pytest.mark.parametrize("name", ["forms", "SwinIR/light", "DAT"])
def test_no_float_copy_of_a_quantized_weight_remains(name: str) -> None:
    config = HarmoqConfig(8, 8, "paper", conv_bits=8, **EXACT)
    prepared = calibrated(name, config)
    sites = [
        m
        for m in prepared.sites()
        if isinstance(m, (PreparedLinear, PreparedConv2d)) and m.weight_quantizer is not None
    ]
    shapes = {m.weight.shape for m in sites} | {m.weight.flatten(1).shape for m in sites}
    float_weights = [m.weight.detach() for m in sites]
    assert float_weights
    model = h.convert_harmoq(prepared)
    for tensor in _tensors_within(model, set()):
        if tensor.device.type == "meta" or not tensor.is_floating_point() or tensor.shape not in shapes:
            continue
        for weight in float_weights:
            assert tensor.numel() != weight.numel() or not torch.allclose(tensor.flatten(), weight.flatten(), atol=1e-3)


@pytest.mark.parametrize("name", ["forms", "SwinIR/light", "DAT"])
def test_the_output_does_not_change_when_the_float_weights_are_deleted(name: str) -> None:
    original = build(name)
    config = HarmoqConfig(8, 8, "paper", **EXACT)
    prepared = h.calibrate(h.prepare_harmoq(original, config, images(1)), images(2))
    model = h.convert_harmoq(prepared)
    expected = run(model)
    with torch.no_grad():
        for parameter in [*original.parameters(), *prepared.parameters()]:
            parameter.fill_(float("nan"))
    assert torch.equal(run(model), expected)
    quantized = {id(s) for s in model.sites().values()}
    for module in model.modules():
        if id(module) in quantized:
            assert not [p for p in module.parameters() if p.is_floating_point()]
    assert torch.equal(run(copy.deepcopy(model)), expected)


def test_codes_decide_the_output() -> None:
    model = converted("linears", PAPER)
    expected = run(model)
    site = model.sites()["two"]
    state = site.state_dict()
    state["codes"] = 255 - state["codes"]
    site.load_state_dict(state)
    assert not torch.equal(run(model), expected)


def test_converting_leaves_the_prepared_model_as_it_was() -> None:
    prepared = calibrated("forms", PAPER)
    before, output = copy.deepcopy(prepared.state_dict()), run(prepared)
    first = run(h.convert_harmoq(prepared))
    assert all(torch.equal(value, before[name]) for name, value in prepared.state_dict().items())
    assert torch.equal(run(prepared), output)
    assert torch.equal(run(h.convert_harmoq(prepared)), first)
    observers = [q.observer for m in prepared.sites() for q in m.quantizers()]
    assert any(observer is not None for observer in observers)


# --- forms ------------------------------------------------------------------------------------------------------------


def test_every_way_to_write_a_contraction_is_quantized() -> None:
    names = set(converted("forms", PAPER).sites())
    for part in ("qkv", "baddbmm_0", "einsum_0", "sdpa_0.qk", "sdpa_0.av", "matmul_0", "bmm_0", "linear_0"):
        assert any(name.endswith(part) for name in names), (part, names)


def test_a_weight_shared_by_a_functional_call_is_released() -> None:
    model = converted("forms", PAPER)
    assert model.model.shared.device.type == "meta"
    assert model.model.shared_bias.device.type == "cpu"
    image = images(1)[0]
    before = run(model, image)
    assert torch.equal(run(model.to("cpu"), image), before)
    assert model.model.shared.device.type == "meta"


def test_contractions_beyond_the_range_of_float32_stay_exact() -> None:
    generator = torch.Generator().manual_seed(3)
    for length in (257, 259, 4096, 40_000):
        qa = torch.randint(0, 256, (2, 3, length), generator=generator, dtype=torch.uint8)
        qb = torch.randint(0, 256, (2, length, 4), generator=generator, dtype=torch.uint8)
        found = float_matmul.quantized_matmul(qa.float(), qb.float(), unit(8), unit(8))
        assert torch.equal(found, integer_reference.matmul_accumulate(qa, qb).float())
    image = images(1, (48, 48))[0]
    model = converted("long", PAPER)
    fast = run(model, image)
    model.use_reference(True)
    torch.testing.assert_close(run(model, image), fast, rtol=1e-3, atol=1e-4)


def test_convolutions_run_on_integers() -> None:
    config = HarmoqConfig(8, 8, conv_bits=8, **EXACT)
    model, simulated = converted("SwinIR/light", config), run(calibrated("SwinIR/light", config))
    convs = [s for s in model.sites().values() if isinstance(s, QuantizedConv2d)]
    assert len(convs) >= 3
    torch.testing.assert_close(run(model), simulated, rtol=0, atol=0.02)
    assert (run(model) - simulated).abs().mean() < 2e-3
    for conv, inputs in _inputs_of(model):
        if isinstance(conv, QuantizedConv2d) and conv.act_bounds is not None:
            codes = integer_reference.quantize_codes(inputs[0], 1 / conv.act_bounds[0], conv.act_bounds[1], 8)
            centred = codes.long() - conv.act_bounds[1].long()
            weight = conv.weight_codes().long().reshape(conv.site.shape)
            exact = nn.functional.conv2d(centred.double(), weight.double(), None, **conv.geometry)
            assert torch.equal(conv.accumulate(codes).double(), 2 * exact)  # 8-bit weights have no shift
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(conv.accumulate(codes).double(), 2 * exact)


def test_rules_choose_sites() -> None:
    rules = [SiteRule("*", weight_bits=32, act_bits=32), SiteRule("*.qkv", weight_bits=3, act_bits=5)]
    sites = converted("SwinIR/light", HarmoqConfig(8, 8, rules=rules)).sites()
    assert len(sites) == 4
    assert all(name.endswith(".qkv") for name in sites)
    assert {(s.settings.weight.bits, s.settings.act.bits) for s in sites.values()} == {(3, 5)}


@pytest.mark.parametrize("size", [(16, 16), (64, 64)])
def test_everything_off_is_the_float_model(size: tuple[int, int]) -> None:
    config = HarmoqConfig(32, 32, **EXACT)
    assert not converted("SwinIR/light", config).sites()
    # Not bit for bit: float attention runs in one fused call.
    (image,) = images(1, size)
    expected = run(build("SwinIR/light"), image)
    torch.testing.assert_close(run(converted("SwinIR/light", config), image), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(16, 16), (16, 24), (19, 13)])
@pytest.mark.parametrize("name", ["SwinIR/light", "DAT"])
def test_other_image_sizes_work(name: str, size: tuple[int, int]) -> None:
    image = torch.rand(2, 3, *size)
    assert (run(converted(name, PAPER), image) - run(build(name), image)).abs().mean() < 0.05


# --- float types and errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [None, nn.Linear(3, 3), "x"])
def test_only_a_prepared_model_is_converted(model: Any) -> None:
    with pytest.raises(CalibrationError, match="prepare"):
        h.convert_harmoq(model)


def test_conversion_computes_no_qparams_behind_the_callers_back() -> None:
    prepared = h.prepare_harmoq(build("linears"), PAPER, images(1))
    for seen in (False, True):
        if seen:
            prepared(images(1)[0])
        with pytest.raises(CalibrationError, match="no quantization parameters") as caught:
            h.convert_harmoq(prepared)
        assert "quantizers without, first at" in str(caught.value.found)
        assert "calibrate" in str(caught.value.remedy)
        assert "compute_qparams" in str(caught.value.remedy)
    h.compute_qparams(prepared)
    assert torch.isfinite(run(h.convert_harmoq(prepared))).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8, None, "bfloat16"])
def test_other_float_types_are_refused(dtype: Any) -> None:
    with pytest.raises(ConfigError, match="float type"):
        h.convert_harmoq(calibrated("linears", PAPER), float_dtype=dtype)


def test_matmul_sites_are_left_float_in_the_deploy_profile() -> None:
    model = converted("SwinIR/light", HarmoqConfig(4, 4))
    assert not [s for s in model.sites().values() if isinstance(s, QuantizedMatmul)]
    assert [r for r in model.report().rows if r.kind == "matmul" and "deploy profile" in str(r.reason)]
