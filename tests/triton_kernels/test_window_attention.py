"""Window attention: integers exact in mode "paper", 16-bit rounding in mode "deploy", and the authors' own module."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spandrel.architectures.SwinIR.__arch.SwinIR import WindowAttention
from torch import Tensor

from harmoq_ao.common.errors import KernelError
from harmoq_ao.quant.integer_reference import LinearOperands, MatmulOperand
from harmoq_ao.quant.packing import pack
from harmoq_ao.quant.quantizer import quantize, step_size
from harmoq_ao.triton_kernels import window_attention
from harmoq_ao.triton_kernels.attention_operands import MatmulQuantizers, pack_attention
from tests.strategies import SEEDS
from tests.triton_kernels.helpers import affine, random_attention, seeded, site

few = settings(max_examples=8)
BITS = st.sampled_from([2, 3, 4, 8])


def masks(generator: torch.Generator, count: int, tokens: int) -> Tensor:
    blocked = torch.rand(count, tokens, tokens, generator=generator) < 0.3
    blocked.diagonal(dim1=1, dim2=2).fill_(False)
    return torch.where(blocked, -100.0, 0.0)


@few
@given(
    seed=SEEDS, tokens=st.integers(1, 80), heads=st.integers(1, 3), head_dim=st.integers(1, 32), bits=BITS,
    cosine=st.booleans(), scale_after=st.booleans(), masked=st.booleans(), norm=st.booleans(), residual=st.booleans(),
    relative=st.booleans(),
)  # fmt: skip
def test_paper_mode_equals_the_reference_up_to_flipped_codes(
    seed: int,
    tokens: int,
    heads: int,
    head_dim: int,
    bits: int,
    cosine: bool,
    scale_after: bool,
    masked: bool,
    norm: bool,
    residual: bool,
    relative: bool,
) -> None:
    generator = seeded(seed)
    twist = {"cosine": cosine, "scale_after": scale_after, "relative": relative}
    operands = random_attention(generator, tokens, heads * head_dim, heads, bits, paper=True, **twist)
    x = torch.randn(2, tokens, heads * head_dim, generator=generator)
    mask = masks(generator, 2, tokens) if masked else None
    options = {"mask": mask, "eps": 1e-5 if norm else None, "residual": x if residual else None}
    error = (
        window_attention.launch_window_attention(x, operands, **options)
        - window_attention.reference(x, operands, **options)
    ).abs()
    # Only exp2 and the sum of the softmax are rounded differently: now and then a probability lies at a tie.
    assert error.max() <= 0.2
    assert (error > 1e-4).float().mean() <= 0.05


@few
@given(
    seed=SEEDS, tokens=st.integers(1, 80), heads=st.integers(1, 3), head_dim=st.integers(1, 32), bits=BITS,
    cosine=st.booleans(), masked=st.booleans(), norm=st.booleans(),
)  # fmt: skip
def test_deploy_mode_is_within_sixteen_bit_rounding(
    seed: int, tokens: int, heads: int, head_dim: int, bits: int, cosine: bool, masked: bool, norm: bool
) -> None:
    generator = seeded(seed)
    operands = random_attention(generator, tokens, heads * head_dim, heads, bits, cosine=cosine)
    x = torch.randn(2, tokens, heads * head_dim, generator=generator)
    mask = masks(generator, 1, tokens) if masked else None
    eps = 1e-5 if norm else None
    y = window_attention.launch_window_attention(x, operands, mask=mask, eps=eps)
    error = (y - window_attention.reference(x, operands, mask=mask, eps=eps)).abs()
    # The projection's codes are 1.5 / 127 apart; a value that float16 moves over a tie moves by one of them.
    assert operands.proj is not None
    weight = operands.proj.effective_codes().float() * operands.proj.scale[:, None]
    assert error.mean() <= 0.02 * weight.abs().sum(1).mean()
    assert error.max() <= 3 * weight.abs().sum(1).max()


@pytest.mark.parametrize("tokens", [64, 128])
def test_deploy_mode_in_float32_differs_at_ties_only(tokens: int) -> None:
    generator = seeded(tokens)
    operands = random_attention(generator, tokens, 60, 6, 4)
    x, mask = torch.randn(2, tokens, 60, generator=generator), masks(generator, 2, tokens)
    y = window_attention.launch_window_attention(x, operands, mask=mask, compute=torch.float32)
    error = (y - window_attention.reference(x, operands, mask=mask)).abs()
    assert (error > 1e-4).float().mean() <= 0.01


@few
@given(
    seed=SEEDS, tokens=st.integers(1, 140), keys=st.integers(1, 140), head_dim=st.integers(1, 32),
    cosine=st.booleans(), scale_after=st.booleans(), mode=st.sampled_from(["deploy", "paper", "relative"]),
    masked=st.booleans(),
)  # fmt: skip
def test_attention_of_given_q_k_v(
    seed: int, tokens: int, keys: int, head_dim: int, cosine: bool, scale_after: bool, mode: str, masked: bool
) -> None:
    generator, paper = seeded(seed), mode != "deploy"
    twist = {"cosine": cosine, "scale_after": scale_after, "paper": paper, "relative": mode == "relative"}
    whole = random_attention(generator, tokens, 2 * head_dim, 2, 4, **twist)
    q = torch.randn(2, tokens, 2, head_dim, generator=generator)
    k, v = torch.randn(2, 2, keys, 2, head_dim, generator=generator).unbind(1)
    bias = torch.randn(2, tokens, keys, generator=generator)
    operands = replace(whole, qkv=None, proj=None, proj_heads=None, bias=bias)
    mask = torch.where(torch.rand(2, tokens, keys, generator=generator) < 0.3, -100.0, 0.0) if masked else None
    o = window_attention.launch_attention(q, k, v, operands, mask=mask, compute=torch.float32)
    error = (o - window_attention.reference_attention(q, k, v, operands, mask=mask)).abs()
    assert error.mean() <= 1e-5
    assert error.max() <= (0.1 if paper else 1e-4)


@pytest.mark.parametrize("keys", [48, 100])
def test_relative_maps_give_every_row_its_own_range(keys: int) -> None:
    """Entries of a row that attends to all keys alike vanish in 2 bits; relative to their row none does."""
    generator = seeded(keys)
    attention = random_attention(generator, 16, 32, 2, 4, paper=True, relative=True, bias=False)
    assert attention.bounds is not None
    bounds = attention.bounds.clone()
    bounds[2] = torch.tensor([3.0, 0.0, 1 / 3, 0.0])  # reciprocal, offset, step and lower bound of 2 bits on 0..1
    operands = replace(attention, qkv=None, proj=None, proj_heads=None, bounds=bounds, left_bits=2)
    q = torch.zeros(1, 16, 2, 16)
    k, v = torch.stack([torch.zeros(1, keys, 2, 16), torch.randn(1, keys, 2, 16, generator=generator)])
    o = window_attention.launch_attention(q, k, v, operands, compute=torch.float32).view(1, 16, 2, 16)
    expected = v.clamp(-3, 3).mean(1, keepdim=True).expand_as(o)
    torch.testing.assert_close(o, expected, atol=0.01, rtol=0)
    absolute = window_attention.launch_attention(q, k, v, replace(operands, relative=False), compute=torch.float32)
    assert float(absolute.abs().max()) < 1e-4


def test_equals_the_module_of_swinir() -> None:
    generator = seeded(5)
    module = WindowAttention(60, (8, 8), 6).eval()
    x, mask = torch.randn(4, 64, 60, generator=generator), masks(generator, 2, 64)
    qkv, proj = (_at_eight_bits(linear, bound) for linear, bound in ((module.qkv, 4.0), (module.proj, 1.0)))
    index = module.relative_position_index.view(-1)
    bias = module.relative_position_bias_table[index].view(64, 64, 6).permute(2, 0, 1).detach()
    operands = pack_attention(qkv, proj, 6, 10, torch.full((6,), module.scale), bias=bias)
    with torch.no_grad():
        expected = module(x, mask)
    y = window_attention.launch_window_attention(x, operands, mask=mask)
    assert (y - expected).abs().max() <= 0.03
    assert (y - expected).abs().mean() <= 0.05 * expected.abs().mean()


def _at_eight_bits(linear: torch.nn.Linear, bound: float) -> tuple[LinearOperands, Tensor, int]:
    weight = linear.weight.detach()
    lower = -weight.abs().amax(1, keepdim=True)
    scale = step_size(lower, -lower, 8) * 128 / 127
    codes = quantize(weight, -128 * scale, 127 * scale, 8)
    shift = torch.zeros(len(weight))
    signed = (codes.to(torch.int16) - 128).to(torch.int8)
    bias = None if linear.bias is None else linear.bias.detach()
    operands = LinearOperands(signed, scale[:, 0].contiguous(), shift, bias, 8, affine(-bound, bound))
    return operands, pack(codes, 8), 8


def test_what_the_kernels_do_not_take() -> None:
    generator = seeded(0)
    operands = random_attention(generator, 16, 20, 2, 4)
    x = torch.zeros(4, 16, 20)
    with pytest.raises(KernelError, match="mask does not fit"):
        window_attention.launch_window_attention(x, operands, mask=torch.zeros(3, 16, 16))
    with pytest.raises(KernelError, match="position bias"):
        window_attention.launch_window_attention(torch.zeros(4, 9, 20), operands)
    with pytest.raises(KernelError, match="activation does not fit"):
        window_attention.launch_window_attention(torch.zeros(4, 16, 21), operands)
    with pytest.raises(KernelError, match="residual does not fit"):
        window_attention.launch_window_attention(x, operands, residual=torch.zeros(4, 16, 21))
    wide = random_attention(generator, 300, 20, 2, 4, bias=False)
    with pytest.raises(KernelError, match="too many tokens"):
        window_attention.launch_window_attention(torch.zeros(1, 300, 20), wide)
    q = torch.zeros(1, 16, 2, 10)
    with pytest.raises(KernelError, match="q, k and v"):
        window_attention.launch_attention(q, q, q.transpose(1, 2), operands)
    unit = torch.ones(2)
    with pytest.raises(KernelError, match="this head"):
        pack_attention(None, None, 2, 33, unit)
    with pytest.raises(KernelError, match="qkv linear"):
        pack_attention(site(generator, 50, 20, 4), None, 2, 10, unit)
    with pytest.raises(KernelError, match="projection does not fit"):
        pack_attention(None, site(generator, 20, 21, 4), 2, 10, unit)
    dynamic = MatmulOperand(8)
    with pytest.raises(KernelError, match="static bounds"):
        MatmulQuantizers(dynamic, dynamic, dynamic, dynamic)
    static, narrow = MatmulOperand(8, affine(0.0, 1.0)), MatmulOperand(4, affine(0.0, 1.0, 4))
    with pytest.raises(KernelError, match="same widths"):
        MatmulQuantizers(static, static, narrow, static)
