"""Fused kernels take the place of what they compute, and of nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import harmoq_ao as h
from harmoq_ao.config import HarmoqConfig
from harmoq_ao.graph.exchange import replacement_of
from harmoq_ao.lowering.fusing import Misfit
from harmoq_ao.lowering.mlp import FusedMlp, find_mlp
from harmoq_ao.recipes.architectures import ARCHITECTURES, Architecture
from harmoq_ao.recipes.architectures import forward as run_model
from harmoq_ao.sites.quantized import Derived
from tests.lowering.helpers import Network, assert_same_image, both_ways, kernel_references, quantize
from tests.models import PER_TOKEN, converted, images
from tests.triton_kernels.interpreter import interpreted

# --- islands of all kinds ---------------------------------------------------------------------------------------------

TWISTS = ("none", "relu", "scrambled", "columns", "residual", "squared")


class Attention(nn.Module):
    """Window attention, usual in everything or unusual in one thing."""

    def __init__(self, heads: int, order: tuple[int, ...], scale: float, bias: bool, twist: str) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.heads, self.order, self.scale, self.twist = heads, order, scale, twist
        self.bias = nn.Parameter(torch.randn(heads, 16, 16)) if bias else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, n, c = x.shape
        parts = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = (parts[i] for i in self.order)
        if self.twist == "relu":
            v = F.relu(v)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        if self.bias is not None:
            scores = scores + self.bias.unsqueeze(0)
        if mask is not None:
            windows = mask.shape[0]
            scores = scores.view(b // windows, windows, self.heads, n, n) + mask.unsqueeze(1).unsqueeze(0)
            scores = scores.view(-1, self.heads, n, n)
        weights = scores.softmax(-2 if self.twist == "columns" else -1)
        if self.twist == "squared":
            weights = weights * weights
        mixed = weights @ v
        y = mixed.reshape(b, n, c) if self.twist == "scrambled" else mixed.transpose(1, 2).reshape(b, n, c)
        y = self.proj(y)
        return y + x if self.twist == "residual" else y


@settings(max_examples=25)
@given(
    heads=st.sampled_from([1, 2]),
    order=st.permutations([0, 1, 2]),
    usual=st.booleans(),
    scale=st.sampled_from([1.0, 0.5, 0.408]),
    bias=st.booleans(),
    masked=st.booleans(),
    twist=st.sampled_from(TWISTS),
    config=st.sampled_from([HarmoqConfig(8, 8), HarmoqConfig(4, 4, "paper"), HarmoqConfig(2, 2)]),
)
def test_random_islands(
    heads: int,
    order: list[int],
    usual: bool,
    scale: float,
    bias: bool,
    masked: bool,
    twist: str,
    config: HarmoqConfig,
) -> None:
    """The kernel computes an island if and only if that is an attention as usual, and never changes the result."""
    places = (0, 1, 2) if usual else tuple(order)
    twist = "none" if usual else twist
    torch.manual_seed(0)
    example = torch.rand(2, 3, 8, 12)
    quantized = quantize(Network(Attention(heads, places, scale, bias, twist), masked), config, example)
    expected, found, calls = both_ways(quantized, example, "attention", "auto")
    usual = places == (0, 1, 2) and (twist == "none" or (twist == "scrambled" and heads == 1))
    assert calls == usual
    assert_same_image(found, expected)
    lowering = quantized.lowerings()["attention.qkv"]
    assert (lowering.kernel == "triton window_attention") == (lowering.reason is None) == usual


def test_one_island_for_windows_with_and_without_mask() -> None:
    """SwinIR calls the same attention both ways; new weights and new windows are met with new operands."""
    model = converted("SwinIR/light", HarmoqConfig(8, 8))
    model.use_backend("triton")
    other = images(1, (16, 32))[0]
    with kernel_references() as kernels:
        model(images(1)[0])
        count = kernels["attention"].call_count
        assert any(call.kwargs["mask"] is not None for call in kernels["attention"].call_args_list)
        assert any(call.kwargs["mask"] is None for call in kernels["attention"].call_args_list)
        model(other)
        assert kernels["attention"].call_count == 2 * count
        first = model(other)
        site = next(s for name, s in model.sites().items() if name.endswith("attn.qkv"))
        site.codes.copy_(site.codes.flip(0))
        assert not torch.equal(model(other), first)


def test_a_copy_has_operands_of_its_own() -> None:
    model, image = converted("SwinIR/light", HarmoqConfig(8, 8)), images(1)[0]
    model.use_backend("triton")
    with kernel_references():
        before = model(image)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(image), before)
        other = converted("SwinIR/light", HarmoqConfig(8, 8, seed=1))
        for name, site in twin.sites().items():
            site.codes.copy_(other.sites()[name].codes.flip(0))
            site._derived = Derived()
        changed = twin(image)
        assert not torch.equal(changed, before)
        assert torch.equal(model(image), before)
        twin.use_backend("reference")
        assert_same_image(changed, twin(image))


# --- perceptrons ------------------------------------------------------------------------------------------------------


class Perceptron(nn.Module):
    def __init__(self, act: nn.Module, extra: str = "") -> None:
        super().__init__()
        self.fc1, self.act, self.fc2, self.extra = nn.Linear(8, 16), act, nn.Linear(16, 8), extra
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.act(self.fc1(x)))
        if self.extra == "branch" and x.shape[0] > 3:
            y = y * 2
        if self.extra == "scaled":
            y = y * 0.999
        y = self.drop(self.fc2(y))
        return y + x if self.extra == "residual" else y


@pytest.mark.parametrize(
    ("act", "extra", "expected"),
    [
        (nn.GELU(), "", "erf"),
        (nn.GELU(approximate="tanh"), "", "tanh"),
        (nn.ReLU(), "", None),
        (nn.GELU(), "branch", None),
        (nn.GELU(), "scaled", None),
        (nn.GELU(), "residual", None),
    ],
    ids=["erf", "tanh", "relu", "branch", "scaled", "residual"],
)
def test_perceptrons(act: nn.Module, extra: str, expected: str | None) -> None:
    class Pixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.mlp, self.tail = nn.Linear(3, 8), Perceptron(act, extra), nn.Linear(8, 3)

        def forward(self, image: Tensor) -> Tensor:
            return self.tail(self.mlp(self.head(image.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)

    torch.manual_seed(0)
    example = torch.rand(1, 3, 8, 8)
    quantized = quantize(Pixels(), HarmoqConfig(8, 8), example)
    module = quantized.model.mlp
    found = replacement_of(module, FusedMlp)
    assert (None if found is None else found.gelu) == expected
    if expected is None:
        with pytest.raises(Misfit):
            find_mlp(module)
    plain, lowered, calls = both_ways(quantized, example, "mlp", "auto")
    assert_same_image(lowered, plain)
    assert calls == (expected is not None)
    assert {name.partition(".")[0] for name in module.state_dict()} == {"fc1", "fc2"}


def test_a_sequence_is_a_perceptron_and_its_slices_are_none() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 8))
    model = nn.Sequential(nn.Conv2d(3, 8, 8), nn.Flatten(), layers, nn.Unflatten(1, (2, 2, 2)))
    example = torch.rand(4, 3, 8, 8)
    quantized = quantize(model, HarmoqConfig(8, 8), example)
    lowered, ones = quantized.model[2], torch.ones(1, 8)
    assert torch.equal(lowered[:2](ones), lowered[1](lowered[0](ones)))
    expected, found, calls = both_ways(quantized, example, "mlp", "auto")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert calls == 1


# --- whole models -----------------------------------------------------------------------------------------------------

WITH_WINDOWS = ("SwinIR/light", "SwinIR/classical", "SwinIR/real", "HAT", "DRCT", "Swin2SR")
FUSED = dict.fromkeys(WITH_WINDOWS, frozenset({"window_attention", "mlp"}))
FUSED |= dict.fromkeys(("CRAFT", "GRL", "SCUNet", "DCTLSA"), frozenset({"mlp"}))
#: GFPGAN draws other noise in every call.
REPEATABLE = [a for a in ARCHITECTURES if a.name != "GFPGAN"]


@pytest.mark.parametrize("architecture", REPEATABLE, ids=lambda a: a.name)
def test_every_architecture_computes_the_same_when_lowered(
    architecture: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some examples are large enough for programs, whose products of floats are bfloat16; the modules' are not.
    monkeypatch.setenv("HARMOQ_CPU_KERNELS", "off")
    example = architecture.example()
    prepared = h.prepare_harmoq(architecture.build(), HarmoqConfig(8, 8), [example])
    quantized = h.convert_harmoq(h.calibrate(prepared, [example], show_progress=False))
    expected = run_model(quantized, example)
    quantized.use_backend("triton")
    with kernel_references():
        found = run_model(quantized, example)
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * scale)
    assert (found - expected).abs().mean() < 1e-4 * scale
    kernels = {low.kernel.removeprefix("triton ") for low in quantized.lowerings().values()}
    assert kernels & {"window_attention", "mlp"} == FUSED.get(architecture.name, set())


@pytest.mark.parametrize(
    "config",
    [HarmoqConfig(8, 8), HarmoqConfig(3, 3, "paper"), HarmoqConfig(3, 3, "paper", relative_maps=True)],
    ids=["deploy", "paper", "relative maps"],
)
def test_the_same_image_on_every_path(config: HarmoqConfig) -> None:
    """Triton (interpreted), the CPU's own kernels, and plain integers."""
    model, image = converted("SwinIR/light", config), images(1)[0]
    paths: dict[str, Tensor] = {}
    for backend in ("auto", "reference", "triton"):
        model.use_backend(backend)
        with interpreted():
            paths[backend] = model(image)
    assert_same_image(paths["auto"], paths["reference"])
    assert_same_image(paths["triton"], paths["reference"])


# --- reports ----------------------------------------------------------------------------------------------------------


def test_the_report_names_the_kernels_of_a_gpu_without_one() -> None:
    model = converted("DAT", HarmoqConfig(8, 8))
    here, there = model.report(), model.report("cuda")
    assert all("triton" not in str(row.kernel) for row in here.rows)
    rows: dict[str, Any] = {row.name: row for row in there.rows if row.quantized and row.kind == "linear"}
    assert all(row.kernel == "triton lowbit_linear" and row.miss for row in rows.values())
    dynamic = converted("SwinIR/light", HarmoqConfig(4, 4, rules=PER_TOKEN)).lowerings("cuda")
    assert "per token" in str(next(low.reason for name, low in dynamic.items() if name.endswith("fc1")))


def test_attention_with_relative_maps_is_fused() -> None:
    model = converted("SwinIR/light", HarmoqConfig(4, 4, "paper", relative_maps=True))
    products = [low.kernel for name, low in model.lowerings("cuda").items() if "matmul" in name]
    assert products
    assert set(products) == {"triton window_attention"}


def test_unknown_backends_are_refused() -> None:
    with pytest.raises(h.HarmoqError, match="backend"):
        converted("linears", HarmoqConfig(8, 8)).use_backend("vulkan")
