"""Attention maps relative to their rows: what is kept exactly, what gains, and that all paths compute the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import harmoq_ao as h
from harmoq_ao.common.errors import ConfigError
from harmoq_ao.config import HarmoqConfig, SiteRule
from harmoq_ao.harmonization.harmonize import harmonize
from harmoq_ao.harmonization.paper.settings import AlgorithmSettings
from harmoq_ao.harmonization.presets import HarmonizeSettings
from harmoq_ao.harmonization.settings import RefineSettings
from harmoq_ao.quant.quantizer import Scheme, fake_quantize, quantize
from harmoq_ao.quant.relative_maps import map_product, relative_rows, renormalized, row_sums
from harmoq_ao.sites.prepared import PreparedMatmul
from harmoq_ao.sites.quantized import QuantizedMatmul
from tests.harmonization.helpers import crops
from tests.models import build, calibrated, converted, images

CONFIG = HarmoqConfig(4, 4, "paper", relative_maps=True, storage_dtype="float32")
ZERO, ONE = torch.zeros(()), torch.ones(())


def maps(seed: int, rows: int, keys: int, spread: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Softmaxes of scores of that standard deviation, `[rows, keys]`."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, keys, generator=generator, dtype=dtype) * spread).softmax(-1)


def product(attention_map: Tensor, values: Tensor, bits: int, lo: Tensor = ZERO, hi: Tensor = ONE) -> Tensor:
    """What a site computes with its values in float, step by step."""
    rounded = fake_quantize(relative_rows(attention_map), lo, hi, bits)
    return renormalized(rounded @ values, attention_map, rounded.sum(-1, keepdim=True))


def with_gradients(function: Callable[..., Tensor], *operands: Tensor) -> list[Tensor]:
    """The value of a function of a map, values and two bounds, and its gradients by all of them."""
    leaves = [operand.clone().requires_grad_() for operand in operands]
    value = function(*leaves)
    upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(3), dtype=value.dtype)
    return [value, *torch.autograd.grad(value, leaves, upstream)]


def in_one(attention_map: Tensor, values: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """At 3 bits."""
    return map_product(attention_map, values, lo, hi, 3)


def step_by_step(attention_map: Tensor, values: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """Likewise."""
    return product(attention_map, values, 3, lo, hi)


sizes = {"seed": st.integers(0, 2**32), "rows": st.integers(1, 6), "keys": st.integers(1, 40)}


@given(**sizes, spread=st.sampled_from([0.0, 0.3, 3.0, 30.0]))
def test_without_rounding_it_is_the_product(seed: int, rows: int, keys: int, spread: float) -> None:
    attention_map = maps(seed, rows, keys, spread, torch.float64) * torch.arange(rows).double()[:, None]  # a row of 0
    values = torch.randn(keys, 5, dtype=torch.float64)
    relative = relative_rows(attention_map)
    assert float(relative.amax()) <= 1
    found = renormalized(relative @ values, attention_map, relative.sum(-1, keepdim=True))
    torch.testing.assert_close(found, attention_map @ values, rtol=1e-12, atol=1e-12)


@given(**sizes, spread=st.sampled_from([0.0, 0.3, 3.0, 30.0]), bits=st.integers(2, 8))
def test_rows_keep_their_sums_and_their_own_range(seed: int, rows: int, keys: int, spread: float, bits: int) -> None:
    attention_map = maps(seed, rows, keys, spread)
    torch.testing.assert_close(product(attention_map, torch.ones(keys, 1), bits), torch.ones(rows, 1))
    values = torch.randn(keys, 3)
    scaled = attention_map * 2.0 ** torch.arange(-rows, 0)[:, None]
    torch.testing.assert_close(
        product(scaled, values, bits), product(attention_map, values, bits) * 2.0 ** torch.arange(-rows, 0)[:, None]
    )


@given(**sizes, bits=st.integers(2, 8))
def test_the_sum_of_codes_is_that_of_what_they_stand_for(seed: int, rows: int, keys: int, bits: int) -> None:
    relative = relative_rows(maps(seed, rows, keys, 2.0))
    lower, upper = torch.tensor(-0.25), torch.tensor(0.75)
    codes = quantize(relative, lower, upper, bits)
    expected = fake_quantize(relative.double(), lower, upper, bits).sum(-1, keepdim=True)
    found = row_sums(codes, (upper - lower) / (2**bits - 1), lower)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@given(**sizes, spread=st.sampled_from([0.3, 3.0, 30.0]), lo=st.sampled_from([0, 1, 2]), hi=st.floats(0.3, 1.2))
def test_in_few_passes_it_has_the_same_value_and_gradients(
    seed: int, rows: int, keys: int, spread: float, lo: int, hi: float
) -> None:
    """Also with levels below zero and with entries that are clipped."""
    attention_map = maps(seed, 2 * rows, keys, spread, torch.float64).unflatten(0, (2, rows))
    values = torch.randn(2, keys, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    step = torch.tensor(hi, dtype=torch.float64) / (7 - lo)
    bounds = -lo * step, (7 - lo) * step
    position = attention_map / attention_map.amax(-1, keepdim=True).clamp_min(1e-30) / step
    assume(bool(((position - position.round()).abs() < 0.5 - 1e-9).all()))  # no tie
    assume(bool(((position - (7 - lo)).abs() > 1e-3).all()))  # neither inside nor clipped
    found = with_gradients(in_one, attention_map, values, *bounds)
    torch.testing.assert_close(
        found, with_gradients(step_by_step, attention_map, values, *bounds), rtol=1e-9, atol=1e-9
    )


def test_many_rows_give_the_ranges_gradient_by_some_of_them() -> None:
    """Where each row is there eight times, that is all of it."""
    attention_map, values = maps(0, 16, 9, 2.0), torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    bounds = torch.tensor(0.0), torch.tensor(0.83)
    leaves = [bound.clone().requires_grad_() for bound in bounds]
    whole = step_by_step(attention_map.repeat_interleave(8, 0), values, *leaves).square().sum()
    some = in_one(attention_map.repeat_interleave(8, 0), values, *leaves).square().sum()
    torch.testing.assert_close(
        torch.autograd.grad(some, leaves), torch.autograd.grad(whole, leaves), rtol=1e-4, atol=1e-5
    )


def test_half_precision_keeps_its_type() -> None:
    attention_map, values = (
        maps(0, 5, 6, 2.0).bfloat16().requires_grad_(),
        torch.randn(6, 3).bfloat16().requires_grad_(),
    )
    y = map_product(attention_map, values, ZERO, ONE, 4)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    for leaf in (attention_map, values):
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.bfloat16


def test_a_map_of_flat_and_peaked_rows_gains() -> None:
    """One step for all rows drops flat rows, whose entries are below half of it."""
    attention_map = torch.cat([maps(0, 32, 64, 0.2), maps(1, 32, 64, 5.0)])
    values = torch.randn(64, 16, generator=torch.Generator().manual_seed(2))
    exact = attention_map @ values
    together = fake_quantize(attention_map, ZERO, attention_map.max(), 4) @ values
    own = product(attention_map, values, 4)
    assert (own - exact).square().mean() < 0.2 * (together - exact).square().mean()


@pytest.mark.parametrize("name", ["DAT/light", "SwinIR/light", "HAT", "forms"])
def test_with_rounding_off_nothing_changes(name: str) -> None:
    prepared = h.prepare_harmoq(build(name), CONFIG)
    for size in ((16, 16), (20, 28)):
        image = images(1, size)[0]
        with torch.no_grad():
            assert torch.equal(prepared(image), build(name)(image))


@pytest.mark.parametrize("name", ["DAT/light", "SwinIR/light", "HAT", "forms"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_integers_compute_what_the_simulation_does(name: str, bits: int) -> None:
    prepared, image = calibrated(name, replace(CONFIG, weight_bits=bits, act_bits=bits)), images(1, (20, 28))[0]
    with torch.no_grad():
        simulated, exact = prepared(image), build(name)(image)
        quantized = h.convert_harmoq(prepared)
        for backend in ("auto", "reference"):
            quantized.use_backend(backend)
            found = quantized(image)
            assert (found - simulated).square().mean() < 1e-2 * (simulated - exact).square().mean()


def test_only_static_maps_are_concerned_and_their_bounds_are_0_and_1() -> None:
    prepared = calibrated("DAT/light", CONFIG)
    products = [s for s in prepared.sites() if isinstance(s, PreparedMatmul)]
    assert {s.relative for s in products if s.site.role == "attention-value"} == {True}
    assert {s.relative for s in products if s.site.role != "attention-value"} == {False}
    for site in products:
        assert site.act_quantizer is not None
        if site.relative:
            assert site.act_quantizer.spec.scheme is Scheme.INTEGER_ZERO_POINT
            assert [float(b) for b in site.act_quantizer.bounds()] == pytest.approx([0, 1], abs=1e-4)
        else:
            assert site.act_quantizer.spec.scheme is Scheme.ASYMMETRIC
    per_token = replace(CONFIG, rules=(SiteRule("*", kind="matmul", dynamic=True),))
    for config in (per_token, replace(CONFIG, relative_maps=False), replace(CONFIG, profile="deploy")):
        sites = h.prepare_harmoq(build("DAT/light"), config).sites()
        assert not any(s.relative for s in sites if isinstance(s, PreparedMatmul))


def test_it_survives_saving(tmp_path: Path) -> None:
    quantized, image = converted("SwinIR/light", CONFIG), images(1)[0]
    h.save_quantized(quantized, tmp_path / "model")
    loaded = h.load_quantized(tmp_path / "model", build("SwinIR/light"))
    assert loaded.config.relative_maps
    assert any(s.relative for s in loaded.sites().values() if isinstance(s, QuantizedMatmul))
    assert torch.equal(loaded(image), quantized(image))


@torch.no_grad()
def test_bfloat16_around_it_is_as_near() -> None:
    image = images(1)[0]
    exact = build("HAT")(image)
    configs = (CONFIG, replace(CONFIG, relative_maps=False))
    own, plain = (float((converted("HAT", c, torch.bfloat16)(image) - exact).square().mean()) for c in configs)
    assert own < 1.2 * plain


def test_refinement_learns_the_upper_bound_and_algorithm_1_leaves_the_map() -> None:
    prepared = calibrated("DAT/light", CONFIG)
    settings = HarmonizeSettings(AlgorithmSettings(images=1), RefineSettings(steps=4, checks=1, warm_up=0))
    trace = harmonize(prepared, crops(4), settings)
    relative = [s for s in prepared.sites() if isinstance(s, PreparedMatmul) and s.relative]
    assert trace.algorithm is not None
    assert all("relative" in trace.algorithm.skipped[s.site.name] for s in relative)
    bounds = [s.act_quantizer.bounds() for s in relative if s.act_quantizer is not None]
    assert {float(lower) for lower, _ in bounds} == {0.0}
    assert any(float(upper) != 1 for _, upper in bounds)


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ConfigError, match="relative_maps"):
        HarmoqConfig(relative_maps="yes")  # type: ignore[arg-type]
    assert not HarmoqConfig.from_dict({"weight_bits": 4}).relative_maps
