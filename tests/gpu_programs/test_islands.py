"""A kernel computes an attention if and only if that is what it computes, and never changes the result."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from harmoq_ao.config import HarmoqConfig
from harmoq_ao.gpu_programs.kernels import Linear, WindowAttention
from harmoq_ao.gpu_programs.operands import Operands
from harmoq_ao.gpu_programs.program import make_program
from tests.lowering.helpers import Network, assert_same_image, quantize

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
    twist=st.sampled_from(TWISTS),
    config=st.sampled_from([HarmoqConfig(8, 8), HarmoqConfig(4, 4, "paper"), HarmoqConfig(2, 2)]),
)
def test_random_islands(
    heads: int, order: list[int], usual: bool, scale: float, bias: bool, twist: str, config: HarmoqConfig
) -> None:
    places = (0, 1, 2) if usual else tuple(order)
    twist = "none" if usual else twist
    torch.manual_seed(0)
    example = torch.rand(2, 3, 8, 12)
    quantized = quantize(Network(Attention(heads, places, scale, bias, twist)), config, example)
    program = make_program(quantized.model, example, torch.float32, Operands())
    quantized.use_reference()
    assert_same_image(program(example), quantized(example))
    whole = any(isinstance(module, WindowAttention) for module in program.children())
    fits = places == (0, 1, 2) and (twist in ("none", "residual") or (twist == "scrambled" and heads == 1))
    assert whole == fits
    lowering = quantized.lowerings("cuda")["attention.qkv"]
    assert (lowering.kernel == "triton window_attention") == (lowering.reason is None) == fits


@pytest.mark.parametrize("masked", ["shared", "far", "own"])
def test_masks(masked: str) -> None:
    """Region ids where a mask is one of regions, which all windows of an image share; another mask is no kernel's."""
    example = torch.rand(2, 3, 8, 12)

    class Masked(Network):
        def mask(self, windows: int) -> Tensor:
            if masked == "own":
                return super().mask(windows)
            ids = torch.arange(windows * 16).reshape(-1, 16) % 5 < 2
            return torch.where(ids[:, :, None] == ids[:, None, :], 0.0, -100.0 if masked == "shared" else -1e4)

    torch.manual_seed(0)
    model = Masked(Attention(2, (0, 1, 2), 0.5, True, "none"), masked=True)
    quantized = quantize(model, HarmoqConfig(8, 8), example)
    program = make_program(quantized.model, example, torch.float32, Operands())
    quantized.use_reference()
    assert_same_image(program(example), quantized(example))
    kernels = [module for module in program.children() if isinstance(module, WindowAttention)]
    assert [k.windows.regions is not None for k in kernels] == ([] if masked == "own" else [True])
    assert bool(program.meta["missed"]) == (masked == "own")


class Gated(nn.Module):
    """Two halves of what a linear makes multiplied in front of another one, or a half that something else reads too."""

    def __init__(self, used_twice: bool) -> None:
        super().__init__()
        self.fc1, self.fc2, self.used_twice = nn.Linear(8, 32), nn.Linear(16, 8), used_twice

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        left, right = self.fc1(x).chunk(2, dim=-1)
        gated = left * right
        y = self.fc2(gated)
        return y + gated[..., :8] if self.used_twice else y + x


@pytest.mark.parametrize("used_twice", [False, True])
def test_a_gate_is_multiplied_inside_the_linear_behind_it(used_twice: bool) -> None:
    torch.manual_seed(0)
    example = torch.rand(2, 3, 8, 12)
    quantized = quantize(Network(Gated(used_twice)), HarmoqConfig(8, 8), example)
    program = make_program(quantized.model, example, torch.float32, Operands())
    quantized.use_reference()
    assert_same_image(program(example), quantized(example))
    linears = [module for module in program.children() if isinstance(module, Linear)]
    assert sorted(-1 if linear.gate is None else linear.gate for linear in linears) == [-1, -1 if used_twice else 16]
