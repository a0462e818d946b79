"""Small contractions that tests of the objective and of its refinement share."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from harmoq_ao.harmonization.paper.contraction import Contraction, Operand
from harmoq_ao.quant.quantizer import Granularity, QuantizerSpec, Scheme, quantize

WEIGHT = QuantizerSpec(3, Scheme.SYMMETRIC, Granularity.PER_CHANNEL, axis=0)


def linear(seed: int, bits: int = 3, *, scaled: bool = True, free_mean: bool = False, clip: float = 0.7) -> Contraction:
    """Rows times a weight with clipping bounds per row, joint scale and shift, and a target not quite theirs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 20, 6, generator=generator, dtype=torch.float64) + 0.5
    w = torch.randn(1, 6, 5, generator=generator, dtype=torch.float64)
    s = torch.rand(6, generator=generator, dtype=torch.float64) + 0.5 if scaled else None
    z = torch.rand(6, generator=generator, dtype=torch.float64) if scaled else None
    left = Operand(x, QuantizerSpec(bits), None, s, z)
    right = Operand(w, replace(WEIGHT, bits=bits), None, None if s is None else (1 / s)[:, None])
    values, columns = left.scaled(), right.scaled()
    hi = clip * columns.abs().amax((0, 1))[None]
    left = replace(left, bounds=(clip * values.amin(), clip * values.amax()))
    target = x @ w + 0.1 * torch.randn(1, 20, 5, generator=generator, dtype=torch.float64)
    return Contraction(left, replace(right, bounds=(-hi, hi)), target, free_mean)


def product(seed: int, bits: int = 3, clip: float = 0.8) -> Contraction:
    """A batch of products of two activations, with one pair of bounds each."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(3, *shape, generator=generator, dtype=torch.float64) for shape in ((7, 4), (4, 6)))
    left, right = (Operand(t, QuantizerSpec(bits), (clip * t.amin(), clip * t.amax())) for t in (q, k))
    return Contraction(left, right, q @ k)


def bounds_of(operand: Operand) -> tuple[Tensor, Tensor]:
    """The bounds of an operand that has some."""
    assert operand.bounds is not None
    return operand.bounds


def codes_of(operand: Operand) -> Tensor:
    """Codes of a static operand."""
    lo, hi = bounds_of(operand)
    return quantize(operand.scaled(), lo, hi, operand.spec.bits)


def problem(kind: str, seed: int, bits: int, free_mean: bool) -> Contraction:
    return product(seed, bits) if kind == "product" else linear(seed, bits, free_mean=free_mean)


KINDS = st.sampled_from(["linear", "product"])


def explicit(contraction: Contraction, left: list[Tensor], right: list[Tensor]) -> Tensor:
    """The objective written out with fixed codes, differentiable by the bounds."""

    def rounded(operand: Operand, bounds: list[Tensor]) -> Tensor:
        assert operand.spec is not None
        return bounds[0] + (bounds[1] - bounds[0]) * codes_of(operand).double() / operand.spec.qmax

    x, w = contraction.left.scaled(), contraction.right.scaled()
    dx, dw = rounded(contraction.left, left) - x, rounded(contraction.right, right) - w
    error = x @ w + dx @ w + x @ dw + dx @ dw - contraction.target
    if contraction.free_mean:
        error = error - error.mean((0, 1))
    return error.square().mean()
