"""The OpenVINO backend: our integers in its integer kernels, the same outputs as the native path."""

from __future__ import annotations

import math
import sys
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn

import harmoq_ao as h
from harmoq_ao.common.errors import ConfigError, InputError, OpenVinoError
from harmoq_ao.config import HarmoqConfig, SiteRule
from harmoq_ao.quant import integer_reference
from harmoq_ao.runtime.openvino import lower_openvino
from tests import models

ov = pytest.importorskip("openvino", reason="needs OpenVINO: pip install harmoq-ao[openvino]")

from harmoq_ao.runtime.openvino import ops  # noqa: E402
from harmoq_ao.runtime.openvino.views import merge_views, permutation_of  # noqa: E402

STATIC = (SiteRule(dynamic=False),)
ROUNDING = 2e-5  # of the largest output: float32 sums in another order
SIZE = (1, 3, 16, 16)


def both(name: str, config: HarmoqConfig, size: tuple[int, int] = (16, 16), **options: Any) -> tuple[Any, Any, Any]:
    """The lowered model, its output and the native one."""
    quantized = models.converted(name, config)
    lowered = lower_openvino(quantized, precision=options.pop("precision", "f32"), **options)
    image = models.images(1, size, seed=7)[0]
    return lowered, lowered(image), quantized(image)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to float32 rounding, but for the rare code on a tie that rounds to the other side."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    difference = (found - expected).abs() / expected.abs().max()
    assert (difference > ROUNDING).double().mean() <= 0.01
    assert difference.max() <= 0.1


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_static_linears_run_in_integers_at_every_width(bits: int) -> None:
    lowered, found, expected = both("linears", HarmoqConfig(bits, bits, rules=STATIC))
    assert_same(found, expected)
    if bits == 8 and ops.pairs_saturate():
        return  # floats, which may lose their names
    kernels = lowered.kernels(SIZE)
    assert set(kernels) == {"one", "two"}
    if _has_vnni() or ops.pairs_saturate():
        assert {k.precision for k in kernels.values()} == {"u8"}
        assert all("I8" in k.kernel for k in kernels.values())


@pytest.mark.parametrize(
    "config",
    [
        HarmoqConfig(4, 4, rules=models.PER_TOKEN),
        HarmoqConfig(8, 8, conv_bits=8),
        HarmoqConfig(8, 8, conv_bits=4, profile="paper"),
        HarmoqConfig(4, 4, rules=models.PER_TOKEN, matmul_bits=8),
        HarmoqConfig(4, 32, profile="paper"),
        HarmoqConfig(4, 4, profile="paper", relative_maps=True),
    ],
    ids=["per token", "convolutions", "products", "products per token", "weights only", "relative maps"],
)
def test_every_kind_of_site_equals_the_native_path(config: HarmoqConfig) -> None:
    lowered, found, expected = both("forms", config)
    assert_same(found, expected)
    if _has_vnni() and config.act_bits != 32:
        assert {k.precision for k in lowered.kernels(SIZE).values()} == {"u8"}
        sites = models.converted("forms", config).sites()
        missing = set(sites) - set(lowered.kernels(SIZE))
        assert len(missing) <= 1  # a scale after a product can take its name


def test_where_pairs_of_products_saturate_large_codes_are_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "pairs_saturate", lambda: True)
    lowered, found, expected = both("forms", HarmoqConfig(8, 8, conv_bits=8, profile="paper"))
    assert_same(found, expected)
    layers = lowered.layers(SIZE)
    assert {x.precision for x in layers if x.kind in ("FullyConnected", "MatMul", "Convolution")} == {"f32"}
    assert ops._in_integers(64)
    assert not ops._in_integers(65)


def test_other_sizes_are_compiled_and_the_oldest_forgotten() -> None:
    quantized = models.converted("linears", HarmoqConfig(8, 8))
    lowered = lower_openvino(quantized, precision="f32", keep=2)
    for size in [(16, 16), (8, 24), (16, 16), (10, 6)]:
        image = models.images(1, size, seed=8)[0].expand(2, -1, -1, -1)
        assert_same(lowered(image), quantized(image))
    assert list(lowered._programs) == [(2, 3, 16, 16), (2, 3, 10, 6)]


@pytest.mark.parametrize("size", [(16, 16), (24, 40)])
def test_ranges_relative_to_a_root_mean_square(size: tuple[int, int]) -> None:
    _, found, expected = both("channels", HarmoqConfig(8, 8, profile="paper"), size)
    assert_same(found, expected)


def test_bfloat16_rest_is_close() -> None:
    _, found, expected = both("forms", HarmoqConfig(8, 8), precision="bf16")
    assert (found - expected).abs().max() <= 0.05 * expected.abs().max()


def test_a_window_model_with_masks_and_attention() -> None:
    _, found, expected = both("SwinIR/light", HarmoqConfig(8, 8))
    assert_same(found, expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_and_accumulators_are_ours(bits: int) -> None:
    quantized = models.converted("linears", HarmoqConfig(bits, bits, rules=STATIC))
    operands = quantized.sites()["one"].operands()
    x = torch.rand(1, 50, 3, generator=torch.Generator().manual_seed(2)) * 1.4 - 0.2
    parameter = openvino_parameter(x)
    codes = ops._static_codes(parameter, operands)
    found = run(codes, parameter, x)
    factor, offset = integer_reference.static_qparams(operands.act, operands.joint_scale, operands.joint_shift)
    expected = integer_reference.quantize_codes(x, factor, offset, bits)
    assert torch.equal(found, expected.float())
    unit = integer_reference.LinearOperands(
        operands.weight, torch.ones(16), operands.weight_shift, None, bits, operands.act, operands.joint_scale
    )
    weight = ops._weight(unit, torch.ones(16))
    product = run(ops._product(codes, weight, "product"), parameter, x)
    shift = operands.weight_shift * expected.sum(-1, keepdim=True)
    assert torch.equal(product, integer_reference.linear_accumulate(expected, operands.weight) + shift)


def test_unusual_arguments_are_refused() -> None:
    quantized = models.converted("linears", HarmoqConfig(8, 8))
    for options in ({"precision": "f16"}, {"threads": 0}, {"keep": True}):
        with pytest.raises(ConfigError):
            lower_openvino(quantized, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="convert_harmoq"):
        lower_openvino(nn.Identity())  # type: ignore[arg-type]
    with pytest.raises(InputError):
        lower_openvino(quantized)(torch.rand(1, 4, 16, 16))
    with pytest.raises(InputError):
        lower_openvino(quantized)(torch.full(SIZE, math.nan))


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(OpenVinoError, match=r"harmoq-ao\[openvino\]"):
        lower_openvino(models.converted("linears", HarmoqConfig(8, 8)))


def test_what_openvino_cannot_take_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    fails = Mock(side_effect=RuntimeError("no such operation"))
    monkeypatch.setattr("harmoq_ao.runtime.openvino.model.convert_at", fails)
    with pytest.raises(OpenVinoError, match="no such operation"):
        lower_openvino(models.converted("linears", HarmoqConfig(8, 8)))(torch.rand(SIZE))


def test_the_quantized_model_is_left_as_it_was() -> None:
    quantized = models.converted("forms", HarmoqConfig(4, 4, rules=models.PER_TOKEN, matmul_bits=8))
    image = models.images(1, seed=3)[0]
    before, names = quantized(image), set(quantized.state_dict())
    lower_openvino(quantized)(image)
    assert torch.equal(quantized(image), before)
    assert set(quantized.state_dict()) == names
    assert isinstance(quantized, h.QuantizedModel)


# --- chains of views --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_a_chain_of_views_is_one_permutation(seed: int) -> None:
    generator = np.random.default_rng(seed)
    x = np.arange(2 * 1 * 12 * 6, dtype=np.int64).reshape(2, 1, 12, 6)
    y, steps = x, []
    for _ in range(4):
        order = tuple(int(i) for i in generator.permutation(y.ndim))
        y = y.transpose(order)
        steps.append(("transpose", order))
        shape = [(2, 3, 2, 2, 6), (4, 36), (1, 12, 12), (144,), (2, 2, 3, 2, 6)][generator.integers(5)]
        y = y.reshape(shape)
        steps.append(("reshape", shape))
    found = permutation_of(x.shape, steps)
    if found is not None:
        assert np.array_equal(x.reshape(found.sizes).transpose(found.order).reshape(y.shape), y)


def test_windows_and_back_cost_nothing() -> None:
    x = torch.rand(1, 4, 8, 8)
    parameter = openvino_parameter(x)
    nodes = ops.ops
    windows = nodes.transpose(nodes.reshape(parameter, [1, 4, 2, 4, 2, 4], False), [0, 2, 4, 3, 5, 1])
    tokens = nodes.reshape(windows, [4, 16, 4], False)
    back = nodes.transpose(nodes.reshape(tokens, [1, 2, 2, 4, 4, 4], False), [0, 5, 1, 3, 2, 4])
    model = ov.Model([nodes.reshape(back, [1, 4, 8, 8], False)], [parameter])
    assert merge_views(model) == 2
    assert not [n for n in model.get_ops() if n.get_type_name() == "Transpose"]
    assert torch.equal(torch.from_numpy(ov.compile_model(model, "CPU")(x.numpy())[0]), x)


# --- helpers ----------------------------------------------------------------------------------------------------------


def openvino_parameter(x: torch.Tensor) -> Any:
    return ops.ops.parameter(list(x.shape), np.float32)


def run(node: Any, parameter: Any, x: torch.Tensor) -> torch.Tensor:
    compiled = ov.compile_model(ov.Model([node], [parameter]), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(compiled(x.numpy())[0])


def _has_vnni() -> bool:
    return torch.cpu._is_vnni_supported()
