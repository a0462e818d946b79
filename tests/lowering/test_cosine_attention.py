"""Attention islands with cosine scores: fused where the kernel computes them, and with a reason where it does not."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from harmoq_ao.config import HarmoqConfig
from harmoq_ao.graph import island_state
from harmoq_ao.lowering.window_attention import LoweredAttention
from tests.lowering.helpers import Network, assert_same_image, both_ways, check_interpreted, kernel_references, quantize
from tests.models import converted, images
from tests.triton_kernels.interpreter import interpreted

#: Where authors put the logit scale: all of these are the same function.
PLACES = ("scores", "queries", "after the bias")
#: What no kernel computes.
TWISTS = (
    "queries only", "other eps", "other norm", "measured scale", "measured qkv bias", "doubled", "capped",
    "two linears", "counted",
)  # fmt: skip


class CosineAttention(nn.Module):
    """Attention as in Swin Transformer v2, usual in everything or unusual in one thing."""

    def __init__(self, heads: int, bias: str, qkv_bias: str, place: str = "scores", twist: str = "none") -> None:
        super().__init__()
        self.heads, self.bias, self.qkv_bias, self.place, self.twist = heads, bias, qkv_bias, place, twist
        self.qkv = nn.Linear(8, 24, bias=qkv_bias == "own")
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
        self.proj = nn.Linear(8, 8)
        self.logit_scale = nn.Parameter(torch.linspace(1.0, 6.0, heads)[:, None, None])  # the last one is clamped
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 16), nn.ReLU(inplace=True), nn.Linear(16, heads, bias=False))
        self.table = nn.Parameter(torch.randn(heads, 16, 16))
        steps = torch.cartesian_prod(torch.linspace(-1, 1, 7), torch.linspace(-1, 1, 7))
        self.register_buffer("coordinates", steps)
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4))
        difference = places[:, None] - places[None] + 3
        self.register_buffer("index", difference[..., 0] * 7 + difference[..., 1])
        self.drop = nn.Dropout(0.1)

    def position_bias(self) -> Tensor:
        if self.bias == "table":
            return self.table
        table = self.cpb_mlp(self.coordinates)[self.index.view(-1)]
        return 16 * torch.sigmoid(table.view(16, 16, self.heads).permute(2, 0, 1).contiguous())

    def project(self, x: Tensor) -> Tensor:
        bias = self.qkv.bias
        if self.qkv_bias == "parts":
            bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias, requires_grad=False), self.v_bias])
        if self.twist == "measured qkv bias":
            bias = torch.cat([self.q_bias * x.mean(), torch.zeros_like(self.v_bias), self.v_bias])
        return F.linear(x, self.qkv.weight, bias)

    def normalize(self, part: Tensor, is_query: bool) -> Tensor:
        if self.twist == "queries only" and not is_query:
            return part
        if self.twist == "other norm":
            return F.normalize(part, p=1.0, dim=-1)
        return F.normalize(part, dim=-1, eps=1e-6 if self.twist == "other eps" else 1e-12)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.project(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scale = torch.clamp(self.logit_scale, max=math.log(100.0)).exp()
        if self.twist == "counted":
            scale = scale / b
        if self.twist == "measured scale":
            scale = scale * x.abs().mean()
        q, k = self.normalize(q, True), self.normalize(k, False)
        scores = (q * scale if self.place == "queries" else q) @ k.transpose(-2, -1)
        if self.twist == "capped":
            scores = scores.clamp(-0.9, 0.9)
        if self.place == "scores":
            scores = scores * scale
        if self.bias != "none":
            scores = scores + self.position_bias().unsqueeze(0)
        if self.place == "after the bias":
            scores = scores * scale
        if mask is not None:
            scores = scores.view(b // mask.shape[0], mask.shape[0], self.heads, n, n)
            scores = (scores + mask.unsqueeze(1).unsqueeze(0)).view(-1, self.heads, n, n)
        weights = self.drop(scores.softmax(-1))
        if self.twist == "doubled":
            weights.mul_(2.0)
        y = self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))
        return self.proj(y) if self.twist == "two linears" else y


CONFIGS = [HarmoqConfig(8, 8), HarmoqConfig(4, 4, "paper"), HarmoqConfig(3, 3)]


@settings(max_examples=25)
@given(
    heads=st.sampled_from([1, 2, 4]),
    bias=st.sampled_from(["none", "table", "mlp"]),
    qkv_bias=st.sampled_from(["none", "own", "parts"]),
    place=st.sampled_from(PLACES),
    masked=st.booleans(),
    twist=st.sampled_from(TWISTS),
    usual=st.booleans(),
    config=st.sampled_from(CONFIGS),
)
def test_random_islands(
    heads: int, bias: str, qkv_bias: str, place: str, masked: bool, twist: str, usual: bool, config: HarmoqConfig
) -> None:
    """The kernel computes an island if and only if that is an attention as usual, and never changes the result."""
    torch.manual_seed(0)
    twist = "none" if usual else twist
    quantized = quantize(Network(CosineAttention(heads, bias, qkv_bias, place, twist), masked), config)
    expected, found, calls = both_ways(quantized, torch.rand(2, 3, 12, 8), "attention")
    # Where operands are quantized, the kernel rounds queries of length one.
    assert calls == (usual and (config.profile == "deploy" or place != "queries"))
    assert_same_image(found, expected)
    for name in ("attention::linear_0", "attention.proj"):
        lowering = quantized.lowerings().get(name)
        assert lowering is None or (lowering.kernel == "triton window_attention") == (lowering.reason is None) == calls


@pytest.mark.parametrize(
    ("twist", "place", "reason"),
    [
        ("queries only", "scores", "the keys are computed in another way"),
        ("other eps", "scores", "the queries are computed in another way"),
        ("other norm", "scores", "are computed in another way"),
        ("measured scale", "scores", "the scores are computed in another way"),
        ("measured qkv bias", "scores", "computed in another way"),
        ("counted", "scores", "the scores are computed in another way"),
        ("doubled", "scores", "the attention map is computed in another way"),
        ("capped", "scores", "the scores are computed in another way"),
        ("two linears", "scores", "3 linears"),
        ("none", "queries", "scaled at another place"),
    ],
)
def test_every_miss_has_its_reason(twist: str, place: str, reason: str) -> None:
    attention = CosineAttention(2, "mlp", "none" if twist == "measured qkv bias" else "parts", place, twist)
    quantized = quantize(Network(attention), HarmoqConfig(8, 8, "paper"))
    names = ("attention.qkv", "attention.proj")
    linears = [low for name, low in quantized.lowerings("cuda").items() if name in names or "::linear" in name]
    assert linears
    assert all(low.kernel == "triton lowbit_linear" and reason in str(low.reason) for low in linears)


@pytest.mark.parametrize("config", CONFIGS, ids=["deploy w8", "paper w4", "deploy w3"])
def test_the_lowered_island_equals_its_graph_up_to_flipped_codes(config: HarmoqConfig) -> None:
    """Neither 16-bit floats nor the image's 8 bits hide a difference here: float32 and the island alone."""
    quantized = quantize(Network(CosineAttention(2, "mlp", "parts")), config)
    island, tokens = quantized.model.attention, torch.randn(24, 16, 8)
    quantized.use_backend("reference")
    with torch.no_grad():
        expected = island(tokens)
        quantized.use_backend("triton")
        with kernel_references() as kernels:
            found = island(tokens)
    assert kernels["attention"].call_count == 1
    assert ((found - expected).abs() > 1e-5 * expected.abs().max()).float().mean() < 0.01


@pytest.mark.parametrize("config", CONFIGS[:2], ids=["deploy", "paper"])
@pytest.mark.parametrize("masked", [True, False])
def test_in_the_interpreter(config: HarmoqConfig, masked: bool) -> None:
    quantized = quantize(Network(CosineAttention(2, "mlp", "parts"), masked), config)
    check_interpreted(quantized, torch.rand(1, 3, 8, 8))
    assert quantized.lowerings()["attention.proj"].kernel == "triton window_attention"


def test_constants_that_change_are_met_with_new_operands() -> None:
    """Position bias and logit scale are computed once; a write into either is seen, and so is another float type."""
    quantized = quantize(Network(CosineAttention(2, "mlp", "parts")), HarmoqConfig(8, 8))
    island = quantized.model.attention
    image = torch.rand(1, 3, 8, 12)
    (variant,) = island_state(island).all_variants()
    (kernel,) = (lowered for lowered in variant.lowered if isinstance(lowered, LoweredAttention))
    quantized.use_backend("triton")
    with kernel_references():
        before = quantized(image)
        packed = kernel.packed
        assert packed.bias is not None
        quantized(image)
        assert kernel.packed is packed
    constants = [b for name, b in island.named_buffers() if name.startswith("harmoq_folded")]
    assert constants
    for constant in constants:
        constant.copy_(constant.flip(0) * 0.5)
    expected, found, calls = both_ways(quantized, image, "attention")
    assert calls == 1
    assert not torch.equal(found, before)
    assert_same_image(found, expected)
    quantized.use_backend("reference")
    expected, found, calls = both_ways(quantized.set_float_dtype(torch.bfloat16), image, "attention")
    assert calls == 1
    assert (found - expected).abs().max() <= 0.02


@pytest.mark.parametrize("config", [HarmoqConfig(8, 8), HarmoqConfig(3, 3, "paper")], ids=["deploy", "paper"])
def test_swin2sr_on_every_path(config: HarmoqConfig) -> None:
    model, image = converted("Swin2SR", config), images(1)[0]
    expected, found, calls = both_ways(model, image, "attention")
    assert calls == 4
    assert_same_image(found, expected)
    with interpreted():
        assert_same_image(model(image), expected, 0.98)
    kernels = {name: low.kernel for name, low in model.lowerings().items()}
    assert all(k == "triton window_attention" for name, k in kernels.items() if ".attn" in name)
