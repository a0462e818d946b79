"""Window attention: integers exact in mode "paper", 16-bit rounding in mode "deploy", and the authors' own module."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spandrel.architectures.SwinIR.__arch.SwinIR import WindowAttention
from torch import Tensor

from harmoq_ao.common.errors import KernelError
from harmoq_ao.quant.integer_reference import LinearOperands
from harmoq_ao.quant.packing import pack
from harmoq_ao.quant.quantizer import quantize, step_size
from harmoq_ao.triton_kernels import window_attention
from harmoq_ao.triton_kernels.attention_operands import pack_attention
from tests.strategies import SEEDS
from tests.triton_kernels.helpers import affine, masks, random_attention, seeded

few = settings(max_examples=8)
BITS = st.sampled_from([2, 3, 4, 8])


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


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((4, 16, 20), {"mask": torch.zeros(3, 16, 16)}, "mask does not fit"),
        ((4, 9, 20), {}, "position bias"),
        ((4, 16, 21), {}, "activation does not fit"),
        ((4, 16, 20), {"residual": torch.zeros(4, 16, 21)}, "residual does not fit"),
    ],
)
def test_what_the_kernel_does_not_take(shape: tuple[int, ...], options: dict[str, Tensor], message: str) -> None:
    operands = random_attention(seeded(0), 16, 20, 2, 4)
    with pytest.raises(KernelError, match=message):
        window_attention.launch_window_attention(torch.zeros(shape), operands, **options)


def test_windows_have_a_largest_size() -> None:
    wide = random_attention(seeded(0), 300, 20, 2, 4, bias=False)
    with pytest.raises(KernelError, match="too many tokens"):
        window_attention.launch_window_attention(torch.zeros(1, 300, 20), wide)
