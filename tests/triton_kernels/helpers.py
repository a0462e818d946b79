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


def regions(generator: torch.Generator, windows: int, tokens: int) -> Tensor:
    """`[windows, tokens]` ids of up to three regions; the first window has one."""
    ids = torch.randint(0, 3, (windows, tokens), generator=generator, dtype=torch.uint8)
    ids[0] = 1
    return ids


def shifted_windows(height: int, width: int, size: int, shift: int) -> tuple[Tensor, Tensor]:
    """Index `[nW, size * size]` int32 and regions, uint8, of the shifted windows of an image, as Swin has them."""

    def parted(values: Tensor) -> Tensor:
        grid = values.view(height // size, size, width // size, size).transpose(1, 2)
        return grid.reshape(-1, size * size).contiguous()

    rows = torch.arange(height * width, dtype=torch.int32).view(height, width)
    bands = [torch.bucketize(torch.arange(n), torch.tensor([n - size, n - shift]), right=True) for n in (height, width)]
    ids = (bands[0][:, None] * 3 + bands[1]).to(torch.uint8)
    return parted(rows.roll((-shift, -shift), (0, 1))), parted(ids)
