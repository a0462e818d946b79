"""The ways authors write a product of two activations, and the canonical form in which it is quantized."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harmoq_ao.graph.contractions import EinsumForm, einsum_form

_UNIT_TOLERANCE = 1e-3
_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "matmul": torch.matmul,
    "bmm": torch.bmm,
    "mm": torch.mm,
    "baddbmm": torch.baddbmm,
}


@dataclass(frozen=True)
class MatmulForm:
    """How the author wrote a product: ``matmul``, ``bmm``, ``mm``, ``baddbmm`` or an einsum equation.

    Args:
        op: Name of the function.
        equation: Equation of an einsum.
        to_rms: Whether both operands, of length one along the contracted axis, are brought to a root mean square of one
            before they are quantized: entries of a unit vector shrink with the root of its length ``K``, those of
            ``sqrt(K)`` times it do not, so that one range fits images of all sizes.
    """

    op: str
    equation: str | None = None
    to_rms: bool = False

    def original(self, *operands: Tensor, **options: Any) -> Tensor:
        """The author's own call, unchanged."""
        if self.op == "einsum":
            return torch.einsum(self.equation, *operands)
        return _FUNCTIONS[self.op](*operands, **options)

    def canonical(self, *operands: Tensor) -> tuple[Tensor, Tensor]:
        """The two operands as `[..., M, K]` and `[..., K, N]`, as they are quantized."""
        a, b = self._matrices(*operands)
        if not self.to_rms:
            return a, b
        root = _root_of_length(a)
        return a * root, b * root

    def finish(self, product: Tensor, *operands: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
        """The result of the author's call, from the canonical product `[..., M, N]`."""
        if self.to_rms:
            product = product / self._matrices(*operands)[0].shape[-1]
        if self.op == "einsum":
            return self._einsum().result(product, *operands)
        if self.op == "baddbmm":
            return beta * operands[0] + alpha * product
        return product

    def _matrices(self, *operands: Tensor) -> tuple[Tensor, Tensor]:
        a, b = operands[-2:]
        return (a, b) if self.op != "einsum" else self._einsum().operands(a, b)

    def _einsum(self) -> EinsumForm:
        form = einsum_form(str(self.equation))
        assert form is not None  # only equations with such a form become sites
        return form


def has_unit_length(x: Tensor, axis: int) -> bool:
    """Whether all vectors along an axis have length one, up to rounding; not known of a tensor without values."""
    if x.is_meta:
        return False
    lengths = torch.linalg.vector_norm(x.detach().float(), dim=axis)
    return lengths.numel() > 0 and bool(((lengths - 1).abs() < _UNIT_TOLERANCE).all())


def _root_of_length(x: Tensor) -> Tensor | float:
    """Root of the length of the last axis; a tensor in graphs for any size, since ONNX has no roots of symbols."""
    length = x.shape[-1]
    return math.sqrt(length) if isinstance(length, int) else (x.new_ones(()) * length).sqrt()
