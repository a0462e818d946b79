"""Random quantized linears for the tests of the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harmoq_ao.quant.integer_reference import Affine, LinearOperands, MatmulOperand
from harmoq_ao.quant.packing import pack
from harmoq_ao.triton_kernels.attention_operands import MatmulQuantizers, PackedAttention, pack_attention
from harmoq_ao.triton_kernels.operands import PackedLinear, from_operands


def random_linear(
    generator: torch.Generator,
    rows: int,
    columns: int,
    weight_bits: int,
    act_bits: int,
    *,
    mid_rise: bool = True,
    static: bool = True,
    spread: float = 3.0,
) -> tuple[LinearOperands, PackedLinear]:
    """Operands with a joint scale, for inputs within ``spread``, as a site has them and as kernels want them."""
    codes = torch.randint(0, 1 << weight_bits, (rows, columns), dtype=torch.uint8, generator=generator)
    signed = (codes.to(torch.int16) - (1 << (weight_bits - 1))).to(torch.int8)
    scale = (torch.rand(rows, generator=generator) + 0.5) * 2 / ((1 << weight_bits) * columns**0.5)
    joint = torch.rand(columns, generator=generator) + 0.5
    act = None
    if static:
        step = torch.tensor(2 * spread / ((1 << act_bits) - 1))
        act = Affine(step, torch.tensor(-spread) * 0.97, act_bits)
    shift = torch.full((rows,), 0.5 if mid_rise else 0.0)
    bias = torch.randn(rows, generator=generator)
    operands = LinearOperands(signed, scale, shift, bias, act_bits, act, joint)
    return operands, from_operands(operands, pack(codes, weight_bits), weight_bits)


def codes_of(generator: torch.Generator, bits: int, *shape: int) -> Tensor:
    """Random unsigned codes."""
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)


def seeded(seed: int) -> torch.Generator:
    """A generator with this seed."""
    return torch.Generator().manual_seed(seed)


def site(
    generator: torch.Generator, rows: int, columns: int, bits: int, **options: Any
) -> tuple[LinearOperands, Tensor, int]:
    """A random linear as `pack_attention` takes it: operands, packed codes, width."""
    operands, _ = random_linear(generator, rows, columns, bits, 8, **options)
    unsigned = (operands.weight.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    return operands, pack(unsigned, bits), bits


def random_attention(
    generator: torch.Generator,
    tokens: int,
    channels: int,
    heads: int,
    bits: int,
    *,
    paper: bool = False,
    cosine: bool = False,
    scale_after: bool = False,
    bias: bool = True,
    relative: bool = False,
) -> PackedAttention:
    """An attention with 8-bit activations; in mode "paper" all operands of its products have ``8`` bits too."""
    head_dim = channels // heads
    joint = torch.rand(head_dim, generator=generator) + 0.5
    matmuls = None
    if paper:
        matmuls = MatmulQuantizers(
            MatmulOperand(8, affine(-2.0, 2.0), joint),
            MatmulOperand(8, affine(-3.0, 3.0), (1 / joint)[:, None]),
            MatmulOperand(8, affine(0.0, 1.0)),
            MatmulOperand(8, affine(-3.0, 3.0)),
            relative,
        )
    return pack_attention(
        site(generator, 3 * channels, channels, bits),
        site(generator, channels, channels, bits, spread=1.5),
        heads,
        head_dim,
        torch.full((heads,), head_dim**-0.5),
        bias=torch.randn(heads, tokens, tokens, generator=generator) if bias else None,
        cosine=cosine,
        scale_after=scale_after,
        matmuls=matmuls,
    )


def affine(lower: float, upper: float, bits: int = 8) -> Affine:
    """Static bounds."""
    return Affine(torch.tensor((upper - lower) / ((1 << bits) - 1)), torch.tensor(lower), bits)


def masks(generator: torch.Generator, count: int, tokens: int) -> Tensor:
    """`[count, tokens, tokens]` that block three of ten pairs, never a token from itself."""
    blocked = torch.rand(count, tokens, tokens, generator=generator) < 0.3
    blocked.diagonal(dim1=1, dim2=2).fill_(False)
    return torch.where(blocked, -100.0, 0.0)
