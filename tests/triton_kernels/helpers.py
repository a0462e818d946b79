"""Random quantized linears for the tests of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from harmoq_ao.lowering.reference import Affine, LinearOperands
from harmoq_ao.packing import pack
from triton_kernels.operands import PackedLinear, from_operands


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
