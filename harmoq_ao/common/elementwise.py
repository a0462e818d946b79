"""Functions of one and two values that row programs name by number, and what each is in plain torch.

CPU kernels, Triton kernels and the programs that emit their instructions agree on these numbers.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor
from torch.nn import functional as F


class Unary(IntEnum):
    """Functions of one value."""

    GELU = 0  # x * (1 + erf(x / sqrt(2))) / 2
    GELU_TANH = 1
    SIGMOID = 2
    RELU = 3
    LEAKY_RELU = 4
    SILU = 5
    TANH = 6


class Binary(IntEnum):
    """Functions of two values."""

    ADD = 0
    SUB = 1
    MUL = 2


def unary(kind: Unary, x: Tensor, slope: float) -> Tensor:
    """A function of one value; ``slope`` is that of a leaky ReLU."""
    if kind == Unary.LEAKY_RELU:
        return F.leaky_relu(x, slope)
    return {
        Unary.GELU: F.gelu,
        Unary.GELU_TANH: lambda v: F.gelu(v, approximate="tanh"),
        Unary.SIGMOID: torch.sigmoid,
        Unary.RELU: torch.relu,
        Unary.SILU: F.silu,
        Unary.TANH: torch.tanh,
    }[kind](x)


def binary(kind: Binary, left: Tensor, right: Tensor | float) -> Tensor:
    """A function of two values."""
    if kind == Binary.ADD:
        return left + right
    return left - right if kind == Binary.SUB else left * right


def affine(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """``x * scale + shift``, each rounded; either may be None."""
    x = x if scale is None else x * scale
    return x if shift is None else x + shift
