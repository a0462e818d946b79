"""Attention of queries, keys and values that other modules make, with quantized products."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import harmoq_ao as h
from harmoq_ao.config import HarmoqConfig, SiteRule
from harmoq_ao.triton_kernels import attention
from tests.lowering.helpers import Network, assert_same_image, both_ways, check_interpreted, kernel_references, quantize
from tests.models import converted, images

#: Each is what the kernel computes.
USUAL = ("scaled queries", "scaled scores", "cosine", "fewer keys")
#: None is, for the reason given.
UNUSUAL = {
    "columns": "softmax over the keys",
    "squared": "attention map is used elsewhere",
    "measured": "attention map is used elsewhere",
    "scaled bias": "another order",
    "mask without view": "What is added to its scores has the shape",
    "mask on heads": "Its mask has the shape",
    "wide values": "its operands",
    "channels": "this head",
    "per row": "static bounds",
}


class Core(nn.Module):
    """Window attention from q, k, v to before the projection, in the words of DAT."""

    def __init__(self, heads: int, bias: bool, twist: str) -> None:
        super().__init__()
        self.heads, self.twist = heads, twist
        self.bias = nn.Parameter(torch.randn(heads, 16, 16)) if bias else None
        self.scale = nn.Parameter(torch.linspace(0.5, 3.0, heads)[:, None, None])
        self.drop = nn.Dropout(0.1)

    def split(self, part: Tensor) -> Tensor:
        return part.reshape(-1, 16, self.heads, 8 // self.heads).permute(0, 2, 1, 3).contiguous()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.split(q), self.split(k), self.split(v)
        windows, _, n, _ = q.shape
        if self.twist == "fewer keys":
            k, v = k[:, :, :9], v[:, :, :9]
        if self.twist == "wide values":
            v = torch.cat([v, v], -1)
        if self.twist == "channels":
            q, k, v = (part.reshape(-1, self.heads, n * 3, 8 // self.heads).transpose(2, 3) for part in (q, k, v))
        if self.twist == "cosine":
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        if self.twist == "scaled queries":
            q = q * 0.4
        scores = q @ k.transpose(-2, -1)
        if self.twist in ("scaled scores", "cosine"):
            scores = scores * self.scale
        if self.twist == "measured":
            scores = scores * scores.abs().amax(-1, keepdim=True)
        if self.bias is not None and self.twist != "channels":
            scores = scores + self.bias[..., : k.shape[2]].unsqueeze(0)
        if self.twist == "scaled bias":
            scores = scores * 0.5
        if mask is not None and self.twist != "channels":
            mask = mask[..., : k.shape[2]]
            if self.twist == "mask without view":
                scores = scores + mask.repeat(windows // len(mask), 1, 1).unsqueeze(1)
            else:
                extra = mask.unsqueeze(1).unsqueeze(0)
                if self.twist == "mask on heads":
                    extra = extra * self.scale
                scores = scores.view(windows // mask.shape[0], mask.shape[0], self.heads, n, scores.shape[3]) + extra
                scores = scores.view(-1, self.heads, n, k.shape[2])
        weights = F.softmax(scores, dim=-2 if self.twist == "columns" else -1, dtype=scores.dtype)
        if self.twist == "squared":
            weights = weights * weights
        mixed = self.drop(weights) @ v
        if self.twist == "channels":
            mixed = mixed.transpose(2, 3).reshape(windows, self.heads, n, 8 // self.heads)
        return mixed[..., : 8 // self.heads].transpose(1, 2).reshape(-1, n, 8)


class Around(nn.Module):
    """q, k, v and the projection lie outside of the attention."""

    def __init__(self, core: Core) -> None:
        super().__init__()
        self.core, self.qkv, self.proj = core, nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        return self.proj(self.core(*self.qkv(tokens).chunk(3, -1), mask))


def quantized_core(
    core: Core, bits: int = 8, masked: bool = False, rules: tuple[SiteRule, ...] = (), relative: bool = False
) -> h.QuantizedModel:
    config = HarmoqConfig(bits, bits, "paper", rules=rules, relative_maps=relative)
    return quantize(Network(Around(core), masked), config, torch.rand(3, 3, 8, 12))


@settings(max_examples=25)
@given(
    heads=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
    twist=st.sampled_from(USUAL),
    masked=st.booleans(),
    bits=st.sampled_from([2, 4, 8]),
    relative=st.booleans(),
)
def test_random_cores(heads: int, bias: bool, twist: str, masked: bool, bits: int, relative: bool) -> None:
    torch.manual_seed(0)
    quantized = quantized_core(Core(heads, bias, twist), bits, masked, relative=relative)
    expected, found, calls = both_ways(quantized, torch.rand(3, 3, 12, 8), "core")
    assert calls == 1
    assert_same_image(found, expected)
    lowerings = quantized.lowerings()
    assert {lowerings[name].kernel for name in lowerings if name.startswith("attention.core")} == {"triton attention"}


@pytest.mark.parametrize("twist", UNUSUAL)
def test_what_the_kernel_does_not_compute_keeps_its_graph(twist: str) -> None:
    rules = (SiteRule("attention.core*", dynamic=True),) if twist == "per row" else ()
    quantized = quantized_core(Core(2, True, twist), masked=True, rules=rules)
    expected, found, calls = both_ways(quantized, torch.rand(3, 3, 12, 8), "core")
    assert calls == 0
    assert_same_image(found, expected)
    for device in (None, "cuda"):
        lowered = [low for n, low in quantized.lowerings(device).items() if n.startswith("attention.core")]
        assert len(lowered) == 2
        for low in lowered:
            assert low.kernel == "reference integer"
            assert UNUSUAL[twist] in str(low.reason)


@pytest.mark.parametrize("twist", USUAL)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("relative", [True, False])
def test_in_the_interpreter(twist: str, masked: bool, relative: bool) -> None:
    quantized = quantized_core(Core(2, True, twist), 8, masked, relative=relative)
    check_interpreted(quantized, torch.rand(1, 3, 8, 8))


def test_copies_and_loaded_tensors_have_operands_of_their_own() -> None:
    quantized, image = quantized_core(Core(2, True, "scaled queries")), torch.rand(1, 3, 8, 12)
    _, before, _ = both_ways(quantized, image, "core")
    twin = copy.deepcopy(quantized)
    other = {n: t * 0.5 if n.endswith("left_bounds") else t for n, t in quantized.state_dict().items()}
    twin.load_state_dict(other)
    expected, found, calls = both_ways(twin, image, "core")
    assert calls == 1
    assert not torch.equal(found, before)
    assert_same_image(found, expected)
    assert torch.equal(both_ways(quantized, image, "core")[1], before)


@pytest.mark.parametrize("masked", [True, False])
def test_compiled_calls_run_the_operator(masked: bool) -> None:
    quantized = quantized_core(Core(2, True, "scaled scores"), 8, masked)
    tokens = torch.randn(3, 6, 16, 8).unbind(0)
    mask = torch.where(torch.rand(3, 16, 16) < 0.3, -100.0, 0.0) if masked else None
    quantized.use_backend("triton")
    with torch.no_grad(), kernel_references():
        expected = quantized.model.attention.core(*tokens, mask)
        torch._dynamo.reset()
        compiled = torch.compile(quantized.model.attention.core, fullgraph=True, backend="aot_eager")
        with mock.patch.object(attention, "reference", wraps=attention.reference) as operator:
            assert torch.equal(compiled(*tokens, mask), expected)
    assert operator.call_count == 1


@pytest.mark.parametrize("name", ["DAT", "DAT/light", "RGT"])
def test_models_with_windows_of_two_shapes(name: str) -> None:
    """Heads are split between two window shapes, and every other block is shifted and masked."""
    model, image = converted(name, HarmoqConfig(4, 4, "paper")), images(1, (16, 24))[0]
    expected, found, calls = both_ways(model, image, "core")
    assert calls > 0
    assert_same_image(found, expected)
