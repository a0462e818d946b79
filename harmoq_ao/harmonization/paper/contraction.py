"""A product of two quantized operands, its output error, and the gradient of that error by the ranges.

With ``X~ = Q(X / s)`` and ``Y~ = Q(Y s)`` the objective is ``L = E[(X~ Y~ - target)^2]``, which for ``target = X Y`` is
HarmoQ's ``E||W dx + dW x + dW dx||^2``; the printed one leaves the last, second-order term out. Theorem 3 gives

    dL/dtheta = 2 E[r^T (W dx' + dW' x)],    r the residual, ' = d/dtheta

and a quantized value is ``lo + (hi - lo) q / (2**b - 1)``, so almost everywhere, where no code changes,

    d/dhi = q / (2**b - 1),    d/dlo = 1 - q / (2**b - 1)

for clipped values (``q`` at an end of the codes) as for those inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from harmoq_ao.quant.quantizer import QuantizerSpec, dynamic_bounds_for, fake_quantize

TINY = 1e-30
"""Smallest width of a range that is divided by."""


@dataclass(frozen=True)
class Operand:
    """One side of a product with its quantizer.

    Args:
        values: Batched matrices `[G, M, K]` (left) or `[G, K, N]` (right), or with a batch of one.
        spec: The quantizer; None leaves the operand in float. A dynamic one needs no bounds.
        bounds: ``(lo, hi)`` of the scaled values, each broadcastable to them; None where nothing is to be learned.
        scale: Divides the values, broadcastable to them; None for ones.
        shift: Subtracted from the values first; None for zeros.
    """

    values: Tensor
    spec: QuantizerSpec | None = None
    bounds: tuple[Tensor, Tensor] | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None

    def scaled(self) -> Tensor:
        """``(values - shift) / scale``."""
        centred = self.values if self.shift is None else self.values - self.shift
        return centred if self.scale is None else centred / self.scale

    def unscaled(self, scaled: Tensor) -> Tensor:
        """The inverse of :meth:`scaled` for values of any kind."""
        centred = scaled if self.scale is None else scaled * self.scale
        return centred if self.shift is None else centred + self.shift

    def rounded(self) -> Tensor:
        """The quantized approximation of :meth:`scaled`."""
        if self.spec is None:
            return self.scaled()
        lo, hi = self.bounds or dynamic_bounds_for(self.values, self.spec, self.scale)
        return fake_quantize(self.values, lo, hi, self.spec.bits, self.scale, self.shift)


@dataclass(frozen=True)
class Contraction:
    """A batched product of two operands and its target.

    Args:
        left: `[G, M, K]`.
        right: `[G, K, N]`.
        target: `[G, M, N]`.
        free_mean: Whether a bias absorbs the mean error of each column `[N]`, so that it does not count.
    """

    left: Operand
    right: Operand
    target: Tensor
    free_mean: bool = False


class Gradient(NamedTuple):
    """Derivatives of the objective by the bounds of one operand, in their shape."""

    lo: Tensor
    hi: Tensor


class Evaluation(NamedTuple):
    """The objective (mean squared error of the output) and, for each operand with bounds, its gradient."""

    objective: float
    left: Gradient | None
    right: Gradient | None


def output_error(contraction: Contraction) -> float:
    """The objective: mean squared error of the product."""
    return evaluate(contraction, gradients=False).objective


@torch.no_grad()
def evaluate(contraction: Contraction, *, gradients: bool = True) -> Evaluation:
    """Objective and gradient of Theorem 3, derived by hand."""
    left, right = contraction.left, contraction.right
    x, y = left.rounded(), right.rounded()
    residual = x @ y - contraction.target
    if contraction.free_mean:
        residual -= residual.mean((0, 1))
    objective = float(residual.square().mean(dtype=torch.float64))
    if not gradients:
        return Evaluation(objective, None, None)
    residual *= 2.0 / residual.numel()
    grad_x = _bound_gradient(left, x, residual, y.mT, on_left=True)
    grad_y = _bound_gradient(right, y, residual, x.mT, on_left=False)
    return Evaluation(objective, grad_x, grad_y)


def _bound_gradient(
    operand: Operand, rounded: Tensor, residual: Tensor, partner: Tensor, *, on_left: bool
) -> Gradient | None:
    if operand.bounds is None:
        return None
    lo, hi = operand.bounds
    inner = residual @ partner if on_left else partner @ residual
    inner = inner.sum_to_size(rounded.shape)
    share = (rounded - lo) / (hi - lo).clamp_min(TINY)  # q / (2**b - 1)
    total, upper = inner.sum_to_size(lo.shape), (inner * share).sum_to_size(hi.shape)
    return Gradient(total - upper, upper)


def error_balance(contraction: Contraction) -> tuple[float, float]:
    """Mean squared output error that each operand's rounding causes alone, ``E||W dx||^2`` and ``E||dW x||^2``."""
    x, y = contraction.left.scaled(), contraction.right.scaled()
    from_left = _mean_square((contraction.left.rounded() - x) @ y, contraction.free_mean)
    return from_left, _mean_square(x @ (contraction.right.rounded() - y), contraction.free_mean)


def _mean_square(error: Tensor, free_mean: bool) -> float:
    error = error - error.mean((0, 1)) if free_mean else error
    return float(error.square().mean(dtype=torch.float64))
